"""A cluster of network namespaces on one machine, with a real daemon per node.

- `topology` is the plan: nodes, router, neighbour, internet host, client, and every address (pure).
- `network` builds it, starts the daemons, and takes all down; all of it lives inside namespaces.
- `state` is what a lab keeps on disk, `process` what it started: both are gone with it.
- `runtime` plays the container runtime: makes a pod's namespace, executes the CNI plugin, runs processes.
- `controller` plays the control plane: runs the pods of a file and publishes them as endpoints.
- `echo` is the server in every pod: it answers with its name and the address it saw.
- `cases` are the scenarios as data, and the judgement (pure); `probe` and `capture` observe real traffic.
- `world` deploys the sample, `checks` runs the cases, `demo` prints one table of verdicts.

    plan ──network──▶ Lab ──world──▶ World ──checks: cases, probe──▶ [Row] ──demo──▶ table
"""
