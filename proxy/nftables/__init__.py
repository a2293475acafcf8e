"""The nftables dataplane: a constant ruleset, all data in maps (proxy/README.md draws the packet's path).

- `ruleset` is the constant part: chains, rules and empty maps, as values.
- `elements` turns a `Frontend` into map elements, and two versions of it into the elements that differ.
- `dataplane` applies: adopt what the kernel has, commit differences, rebuild when the layout differs.
"""
