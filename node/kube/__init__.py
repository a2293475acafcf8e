"""The Kubernetes API as the daemon uses it.

- `api` is a connection: configuration, credentials, TLS and transport are the kubernetes package's.
- `claims` agrees with other nodes on pod ranges, where no controller gives them: a Lease is a lock.
- `own_node` keeps up our Node object: annotations for tunnels, the condition NetworkUnavailable.
- `events` tells people of what they have to mend.
- `upkeep` is the loop of the last three; what is read comes by `node.sources`.
"""
