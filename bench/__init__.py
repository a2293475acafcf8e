"""Figures side by side, in one run: `make bench`, or `make bench ARGS="proxy --services 10000"`.

- `proxy`: load and change services, beside the same layout as a chain per service loaded by `nft -f`.
- `cni`: ADD and DEL through the binary and the daemon, beside the Go `bridge` and `host-local` plugins.
"""
