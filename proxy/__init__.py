"""The service proxy: what a packet to a Service meets on this node.

- `model` holds frozen Service, Endpoint, Node and Snapshot values, parsed once at the edge.
- `frontends` decides, purely, which `Frontend`s a service has: one thing a packet can be addressed to,
  with its endpoints, masquerade and verdict.
- `table` keeps all frontends by key and says what a change changed.
- `nftables/` turns frontends into map elements of a constant ruleset, `iptables/` into kube-proxy's chains.
- `l7/` is the proxy of the client's node, for services that ask for it: HAProxy, and what it is told.

    Snapshot ──frontends──▶ [Frontend] ──table──▶ changes ──nftables──▶ one batch ──▶ kernel
"""
