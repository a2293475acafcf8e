"""Which pod has which address, and since when.

- `ranges` is the arithmetic of address ranges.
- `pools` says which addresses a pod may get: the node's `IpamConfig` and podCIDRs, and the pod's `Wish`,
  become one `Demand` for each address it is to have. Pure.
- `Ledger` is the truth: one SQLite file of `Attachment` records, written by the daemon and, when the
  daemon is down, by the CNI binary. `records` are its values and errors, `attachments` its main table.
- `allocator` picks an address: kept for this pod, never used, or the one freed longest ago.
- `container_lock` lets one process at a time work on a container.

    reserve ──▶ pending ──commit──▶ attached ──release──▶ released ──forget──▶ quarantine ──▶ free again
                   └────────────────────release──────────────┘           └──▶ kept for its pod ──┘
                                                         (its link is gone before `forget`)
"""
