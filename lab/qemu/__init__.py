"""Virtual machines of the lab, of nothing but Debian's packages.

- `cache` keeps what is costly to make: layers, each whole or absent, made by one process at a time.
- `kernels` fetches Debian's kernels; `initrd` makes what they boot with (its scripts are in `boot/`).
- `image` makes the root disk of the lab's machines from Debian's packages and this checkout.
- `throwaway` runs one command in a machine that sees this one's files and can change none of them.

    Debian ──kernels, initrd──▶ Kernel ─┬─throwaway──▶ (status, output)
    Debian + checkout ──image──▶ disk ──┴─driver──▶ the lab's machines
"""
