"""What podwire says to the kernel, and the only place that speaks netlink.

- `Family` is IPv4 or IPv6 as a value.
- `Rtnl` is a route netlink socket in one network namespace: typed verbs for links, addresses, routes
  and neighbours. Its messages are pyroute2's classes; several go out in one write.
- `netns` runs a function inside another network namespace, in a thread of its own.
- `nftables/` holds expressions and rules as values, the element encoder and the atomic `Batch`; `fake`
  is a kernel in memory that refuses what the kernel refuses and can walk a packet through the rules.

    values (links, routes, rules, elements) ──encode──▶ one message batch ──▶ kernel ──▶ NetlinkError
"""
