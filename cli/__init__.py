"""The `podwire` command: `daemon`, `status`, `install` and `lab`."""
