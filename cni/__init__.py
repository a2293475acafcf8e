"""The CNI plugin: from the runtime's request to a wired pod.

- `shim` is the binary: it forwards one request to the daemon, or does it in process when the daemon is down.
- `h2` is as much HTTP/2 as one gRPC call needs; importing grpc would take longer than all else together.
- `spec` knows requests, results, versions and error codes (CNI specification 1.1.0).
- `plugin` handles one request, the same in daemon and shim: ledger first, then the kernel.
- `wiring` is the pod interface: a pure plan (`PodLink`) and its apply, for routed and bridge mode.
- `install` writes the binary and the conflist.

    runtime ─exec─▶ shim ─gRPC─▶ daemon ─┐
                      └─ daemon down ────┴▶ plugin ──▶ ipam.Ledger ──▶ wiring ──▶ netlink
"""
