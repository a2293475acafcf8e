"""What would happen to a packet: the live kernel state, followed hop by hop to every end.

- `Packet`, `Step`, `End`, `Branch`, `Trace` (`packet`) are what is traced and what is said of it.
- `State` (`state`) is all that decides on one node, read once by `read`; routes are looked up in it. `nft`
  has the rules as the kernel keeps them, everybody's; `nft_words` says them, `nft_walk` walks through,
  by what `nft_load` knows of a packet.
- `Rules` (`rules`) is the seam for kinds of packet filters: base chains, and the ways through each. The other
  kind is `iptables`: both variants, as their own programs print them.
- `Place` (`hooks`) is a state that can be asked, a `World` (`path`) all such places; a `Tracer` follows
  packets over them. `back` says what becomes of replies, `why` what an end is due to.
- `ask` finds what FROM and TO name, `show` prints a `Trace`, `svg` draws it.
- `live` sends a real packet, listens to nftables' trace events, and compares.

    kernel ─`read`─▶ State ─▶ Place ─┐
    FROM, TO ─`ask`─▶ Packet ────────┴▶ Tracer ─▶ Branches ─▶ `show`, `svg`
                                          └─ state_of(other node) ─▶ State

Everything but `read`, `live`, and what reads in `nft` and `iptables`, is pure. A value that cannot be known
beforehand leaves a rule undecided: it is shown as such and passed over, never guessed.
"""
