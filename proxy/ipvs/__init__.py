"""The IPVS dataplane: virtual servers of the kernel, and what only rules can say in a table of nftables.

- `ways`: which virtual server a frontend's connections go to, and what each is to be. Pure.
- `ruleset`: the table's constant part; `elements`: a frontend as elements of its maps. Pure.
- `drain`: real servers on their way out, which go when their last connection has.
- `dataplane` brings all of it to the kernel; `fake` is a kernel in memory.
"""
