"""Where Kubernetes objects come from.

- `objects` decodes Node, Service and EndpointSlice documents into the frozen model of `proxy.model`.
- `manifests` follows a folder of YAML and JSON files.
"""
