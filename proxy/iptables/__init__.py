"""The iptables dataplane: kube-proxy's chains, name for name, from the same frontends.

- `names` are the chains: kube-proxy's by name and digest, and those that are podwire's own.
- `text` writes rules as iptables-save prints them, so that what is there is compared as text.
- `rules` turns the frontends of one service port into its chains, and its rules in the shared chains.
- `shared` makes the chains that all services share: entries, masquerade, the way out of pods.
- `live` is what is read and edited: tables of one variant (legacy or nft), and which one the host uses.
- `dataplane` applies: adopt what is there, send the chains that differ, take exactly our own away again.
- `walk` follows a packet through such rules, down every random choice, as values.

    [Frontend] ──rules──▶ chains of a service port ─┐
    NodeRanges ──shared──▶ chains of everybody ─────┴─ compare ──▶ iptables-restore --noflush ──▶ kernel
"""
