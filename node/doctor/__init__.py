"""What makes trouble on a node: looked for without changing anything, told in sentences with what mends it.

- A `Finding` is one sentence and its remedy, an error or a warning; a `Check` is what one look has found.
- `Context` is what checks look at beside the kernel: the daemon's `View`, how long to wait, how many peers.
- Each module has one check: `look` at what is there, and `judge`, which is pure: what was seen → findings.
- `icmp` sends probes, all at once, and says what became of each.

    kernel, /proc, files ──look──▶ observed ──judge──▶ Check ──▶ cli.doctor prints
    daemon ──▶ View ─────────┘

All of it is about the network namespace of the calling thread.
"""
