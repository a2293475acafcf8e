"""nftables over netlink: rules as values, elements as bytes, one atomic batch.

- `expressions` are the parts of a rule (`Payload`, `Lookup`, `Nat`, …), frozen values that encode themselves.
- `objects` are `Table`, `Chain`, `Rule`, `Map`: what a batch creates and removes.
- `batch`: `Nft` commits operations on one table, all or none; a refusal names what was refused. `NftSocket`
  does so across tables and families, and tells the ruleset's generation.
- `dump` reads tables, chains, rules and elements back.
- `fake` is the same in memory; `trace` walks a packet through the rules of either.
"""
