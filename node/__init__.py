"""The node daemon: sources in, kernel state out.

- `sources/` deliver Kubernetes objects (today a folder of YAML; `Change`s into the `Store`).
- `Store` folds them into a frozen `Snapshot` and remembers which services changed.
- `Syncer` brings one snapshot to the kernel: service proxy, routes, node rules.
- `server` answers the CNI binary and the command line over gRPC.
- `daemon` composes them; stopping it leaves kernel and ledger as they are.

    source ──▶ Store ──Snapshot, changed names──▶ Syncer ──▶ proxy, routes, masquerade ──▶ netlink
"""
