"""The CNI plugin: from the runtime's request to a wired pod.

- `shim` is the binary: it forwards one request to the daemon, or does it in process when the daemon is down.
- `h2` is as much HTTP/2 as one gRPC call needs; importing grpc would take longer than all else together.
- `spec`, `results`, `errors`, `fields` know the protocol (CNI 1.1.0); `options` is what a pod asks for.
- `plugin` handles one request, the same in daemon and shim: ledger first, then the kernel. `attachments` says
  what the kernel is to have for a record of the ledger; `settings` is what all pods of the node share.
- `wiring` is the pod interface: a pure plan (`PodLink`) and its apply; `flat` what flat mode adds,
  `bandwidth` its limits, `checks` its comparison (CHECK).
- `tables` and `rules` are the nftables tables of pods, guard and host ports; `flows` their stale connections.
- `reaper` does what ADD and DEL leave for later; `audit` compares ledger, kernel and runtime.
- `install` writes the binary and, once STATUS is good, the conflist.

    runtime ─exec─▶ shim ─gRPC─▶ daemon ─┐                    ┌▶ wiring ─▶ route netlink
                      └─ daemon down ────┴▶ plugin ─▶ Ledger ─┴▶ rules  ─▶ nftables
"""
