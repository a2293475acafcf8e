"""`python -m tests.kubeapi`: serve until SIGTERM, SIGINT or the end of standard input's other side."""

from __future__ import annotations

import argparse
import gc
import os
import signal
import sys
import threading
from pathlib import Path

import msgspec

from tests.kubeapi import control, generate
from tests.kubeapi.faults import Settings
from tests.kubeapi.server import Address, Server
from tests.kubeapi.store import Store


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    made = argparse.ArgumentParser(prog="python -m tests.kubeapi", description=__doc__)
    made.add_argument("--listen", default="127.0.0.1:0", metavar="HOST:PORT", help="(default: %(default)s)")
    made.add_argument("--control", type=Path, metavar="SOCKET", help="unix socket for commands (JSON lines)")
    made.add_argument("--tls", nargs=2, type=Path, metavar=("CERT", "KEY"), help="serve HTTPS (PEM files)")
    made.add_argument(
        "--token", action="append", default=[], help="a bearer token that counts; can be repeated"
    )
    made.add_argument("--set", type=msgspec.json.decode, default={}, metavar="JSON", help="settings")
    made.add_argument("--load", type=Path, metavar="FILE", help="a JSON List of objects to begin with")
    made.add_argument(
        "--generate",
        default="",
        metavar="services=N,endpoints=N,nodes=N,node_bytes=N",
        help="begin with a cluster",
    )
    made.add_argument("--until-closed", action="store_true", help="also end when standard input does")
    return made


def main() -> int:
    """Serve; print `ready PORT` once requests are answered."""
    args = parser().parse_args()
    gc.disable()  # what is loaded stays
    settings = msgspec.convert(args.set, Settings)
    store = Store(settings.history)
    if args.load:
        store.load(generate.listed(msgspec.json.decode(args.load.read_bytes()), store.version))
    if args.generate:
        store.load(generate.cluster(generate.parse(args.generate), store.version))
    gc.freeze()
    gc.enable()
    host, _, port = args.listen.rpartition(":")
    server = Server(store, settings, Address(host.strip("[]"), int(port)))
    server.tokens = frozenset(args.token)
    if args.tls:
        server.certificate(*args.tls)
    stopped = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopped.set())
    if args.control:
        control.serve(args.control, control.Control(server, stopped.set))
    server.up()
    print("ready", server.address.port, flush=True)
    if args.until_closed:
        threading.Thread(target=_until_closed, args=(stopped,), daemon=True).start()
    stopped.wait()
    server.down()
    return 0


def _until_closed(stopped: threading.Event) -> None:
    """End with the test: also when that was killed and could not stop its server."""
    while os.read(0, 4096):  # no buffer: its lock would be in the way at exit
        pass
    stopped.set()


if __name__ == "__main__":
    sys.exit(main())
