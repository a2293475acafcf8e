"""The contract between the CNI binary, the command line and the daemon.

- `podwire.proto` is the source: service `Cni` (raw request in, raw result out) and service
  `Inspect` (what `podwire status` shows).
- `cri.proto` is what we use of the Kubernetes CRI, to ask a container runtime which pods it has.
- `*_pb2`, `*_pb2_grpc` are generated from them by `make proto`; CI checks that they are current.

Nothing here imports another package of podwire.
"""
