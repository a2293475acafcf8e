"""What podwire says to the kernel, and the only place that speaks netlink.

- `Family` is IPv4 or IPv6 as a value.
- `requests` are the verbs (`veth_add`, `route_replace`, …): each encodes one change of links, addresses,
  routes, rules, neighbours or forwarding entries. `Rtnl`, a socket in one network namespace, commits several
  in one write.
- `entries` and `decode` turn the kernel's answers into values: by our own hand what there are thousands of,
  with pyroute2's message formats the links and addresses.
- `generic` is what families of generic netlink have in common: `ipvs`, `wireguard`.
- `Watch` tells when others have changed what routes between nodes depend on.
- `netns` makes and removes network namespaces, and runs a function inside one.
- `nftables/` holds expressions and rules as values, the element encoder and the atomic `Batch`; `fake`
  is a kernel in memory that refuses what the kernel refuses and can walk a packet through the rules.

    values (links, routes, rules, elements) ──encode──▶ one message batch ──▶ kernel ──▶ NetlinkError
"""
