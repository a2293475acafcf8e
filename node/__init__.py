"""The node daemon: sources in, kernel state out.

- `sources/` deliver Kubernetes objects: of an API server, or of a folder of YAML.
- `Store` folds them into a frozen `Snapshot` and remembers which services changed.
- `Syncer` brings one snapshot to the kernel: service proxy, routes, node rules.
- `L7` brings HAProxy to what services ask for, and says what the kernel may lead to it.
- `server` answers the CNI binary and the command line over gRPC.
- `daemon` composes them; stopping it leaves kernel and ledger as they are.

    source ──▶ Store ──Snapshot, changed names──▶ Syncer ──▶ proxy, routes, masquerade ──▶ netlink
"""
