"""Which pod has which address, and since when.

- `ranges` turns podCIDRs into the addresses that pods may have.
- `Ledger` is the truth: one SQLite file of `Attachment` records, written by the daemon and, when the
  daemon is down, by the CNI binary.
- `allocator` picks an address: never used first, then the one freed longest ago.
- `container_lock` lets one process at a time work on a container.

    reserve ──▶ pending ──commit──▶ attached ──release──▶ released ──forget──▶ address free again
                   └────────────────────release──────────────┘ (its link is gone before `forget`)
"""
