"""What only real machines can show: a boot, systemd, other kernels, other programs on the node.

- `base` is what every scenario is made of: verdicts, commands on machines, the lab that they share.
- Each other module holds scenarios of one kind; `catalogue` names them all and runs those asked for.

Each scenario leaves the lab as it found it.
"""
