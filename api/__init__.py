"""The contract between the CNI binary, the command line and the daemon.

- `podwire.proto` is the source: service `Cni` (raw request in, raw result out) and service
  `Inspect` (what `podwire status` shows).
- `podwire_pb2`, `podwire_pb2_grpc` are generated from it by `make proto`; CI checks that they are current.

Nothing here imports another package of podwire.
"""
