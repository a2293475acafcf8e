"""Client-side L7 proxy: services that ask for it are served by the HAProxy of the client's node.

- `policy` is what a service asks for, from its annotation.
- `model` is what HAProxy is to do for all of them: `Backend`s, their endpoints, and what leads to each.
- `render` turns that into HAProxy's configuration, purely; `runtime` speaks to a running HAProxy.
- `engine` starts, reloads and watches HAProxy; endpoints change in it without a reload.
- `places` are the addresses, ports and numbers that kernel and HAProxy agree on.

    Frontend.proxied ──▶ nftables / iptables: dnat to places.address ──▶ HAProxy ──▶ endpoint
"""
