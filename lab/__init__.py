"""A cluster of network namespaces on one machine, with a real daemon per node.

- `topology` is the plan: nodes, router, internet host, client, and every address (pure).
- `network` builds it and takes it down; all of it lives inside namespaces.
- `runtime` plays the container runtime: makes a pod's namespace, executes the CNI plugin, runs processes.
- `echo` is the server in every pod: it answers with its name and the address it saw.
- `demo` runs the scenarios on real traffic and prints one table of verdicts.
"""
