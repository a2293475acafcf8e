"""`podwire l7`: the services that this node's L7 proxy serves, its configuration, and its annotation."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from api import podwire_pb2 as pb
from cli.daemon_client import TIMEOUT_SECONDS, connected, fields
from cli.host import SOCKET
from cli.output import CommandError, complain, table

DESCRIPTION = """
A Service with the annotation podwire.io/proxy is served by HAProxy on the client's node, one connection or
request at a time, instead of by the kernel. These commands show what this node's HAProxy does for such
services, and help to write the annotation. They change nothing. docs/l7.md says what the annotation can ask
for.
"""

EXAMPLES = """
examples:
  podwire l7 show
  podwire l7 show default/web --endpoints
  podwire l7 config default/web
  podwire l7 check service.yaml
  podwire l7 schema
"""

SHOW = """
Show the services that ask for this node's L7 proxy, each port and IP family in a line, and what the proxy has
done for them on this node since the daemon's start: the figures of all nodes together are in the metrics.

columns:
  STATE       served: by HAProxy. plain: balanced by the kernel, as without the annotation. closed: not at
              all, as the service asks for while HAProxy does not run. refused: the annotation is wrong. What
              is not served is followed by a line that says why
  ENDPOINTS   those that get requests, of those that there are
  REQUESTS    answered by an endpoint or by the proxy; of TCP, connections
  5XX         answers with a status from 500 on
  P50 P90 P99 half, 90 % and 99 % of requests took no longer (of TCP: connections): an estimate from a sample
              of the last minute or two
  RETRIES     connections to endpoints that were tried again
  MOVED       requests that were given to another endpoint than the one chosen first
  ERRORS      requests whose connection to an endpoint failed, and answers that broke off
  NOW         requests or connections under way, and how many wait for an endpoint

columns of endpoints:
  STATE       HAProxy's word: UP, DOWN, DRAIN (leaves when its connections have ended), MAINT, or "no check"
  CHECK       what the last health check has found, if the service asks for checks
  MOVED       requests that were taken from it and given to another

With -o json there is more: all classes of status codes, bytes, refused requests.
"""

SHOW_EXAMPLES = """
examples:
  podwire l7 show
  podwire l7 show default/web
  podwire l7 show default/web --endpoints
  podwire l7 show -o json
"""

CONFIG = """
Print the configuration that HAProxy runs with on this node, or the sections of one service. Endpoints change
in the running HAProxy: `podwire l7 show --endpoints` has those of now.
"""

CONFIG_EXAMPLES = """
examples:
  podwire l7 config
  podwire l7 config default/web
"""

SCHEMA = """
Print the JSON schema (draft 2020-12) of the annotation's value, with a description, the default and the
bounds of each key, for editors and admission checks. It needs no daemon.
"""

SCHEMA_EXAMPLES = """
examples:
  podwire l7 schema
"""

CHECK = """
Look for mistakes in an annotation: the file has its JSON, or manifests (YAML or JSON) whose Services have it.
Each mistake is a sentence on standard error. It needs no daemon and no cluster.

The exit status is 0 when nothing is wrong, 1 when something is or the file cannot be read, and 2 for wrong
usage.
"""

CHECK_EXAMPLES = """
examples:
  podwire l7 check annotation.json
  podwire l7 check service.yaml
  podwire l7 check -
      standard input, as from kubectl get services --all-namespaces -o yaml
"""


def add_parser(commands: Any) -> None:
    """Add the command and its verbs to the parser."""
    parser = _formatted(
        commands,
        "l7",
        "services that the node's L7 proxy serves, and their annotation",
        DESCRIPTION,
        EXAMPLES,
    )
    verbs = parser.add_subparsers(metavar="VERB", required=True)
    show = _formatted(verbs, "show", "what the proxy does for services", SHOW, SHOW_EXAMPLES)
    _asking(show)
    show.add_argument("--endpoints", action="store_true", help="endpoints, too")
    show.add_argument(
        "-o", "--output", choices=("table", "json"), default="table", help="how to print (default: table)"
    )
    show.set_defaults(run=run_show)
    config = _formatted(verbs, "config", "HAProxy's configuration in force", CONFIG, CONFIG_EXAMPLES)
    _asking(config)
    config.set_defaults(run=run_config)
    schema = _formatted(verbs, "schema", "the annotation's JSON schema", SCHEMA, SCHEMA_EXAMPLES)
    schema.set_defaults(run=run_schema)
    check = _formatted(verbs, "check", "look for mistakes in annotations", CHECK, CHECK_EXAMPLES)
    check.add_argument("file", metavar="FILE|-", help="a file, or - for standard input")
    check.set_defaults(run=run_check)


def _formatted(
    commands: Any, name: str, words: str, description: str, examples: str
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=words,
        description=description,
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    return parser


def _asking(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("service", nargs="?", default="", metavar="SERVICE",
                        help="only this one (namespace/name)")  # fmt: skip
    parser.add_argument("--socket", default=SOCKET, help="the daemon's socket (default: %(default)s)")


def _asked(args: argparse.Namespace, *, configuration: bool = False) -> pb.L7Reply:
    name = args.service if "/" in args.service or not args.service else f"default/{args.service}"
    request = pb.L7Request(service=name, configuration=configuration)
    with connected(args.socket) as stub:
        reply: pb.L7Reply = stub.L7(request, timeout=TIMEOUT_SECONDS)
    if name and not (reply.configuration if configuration else reply.services):
        what = (
            "has no section in HAProxy's configuration" if configuration else "does not ask for the L7 proxy"
        )
        raise CommandError(f"service {name} {what} on this node (or there is no such service)")
    return reply


def run_show(args: argparse.Namespace) -> int:
    """Print the services, and their endpoints if wanted."""
    reply = _asked(args)
    if args.output == "json":
        shown = fields(reply)
        del shown["configuration"]
        print(json.dumps(shown, indent=2))
        return 0
    parts = [_services(reply.services) if reply.services else "no service asks for the L7 proxy"]
    if args.endpoints and any(s.endpoints for s in reply.services):
        parts.append(_endpoints(reply.services))
    why = [f"{s.service} ({s.family or 'annotation'}) is {s.state}: {s.why}" for s in reply.services if s.why]
    told = {s.why for s in reply.services}
    why += [problem for problem in reply.problems if problem not in told]
    if why:
        parts.append("\n".join(why))
    print("\n\n".join(parts))
    return 0


COLUMNS = (
    *("service", "family", "protocol", "balance", "state", "endpoints", "requests", "5xx"),
    *("p50", "p90", "p99", "retries", "moved", "errors", "now"),
)
ENDPOINT_COLUMNS = (
    *("service", "endpoint", "state", "check", "requests", "5xx", "retries", "moved", "errors", "now"),
)
GETTING = ("UP", "no check")
"""How HAProxy's words for endpoints that get requests begin."""


def _services(services: Iterable[pb.L7Service]) -> str:
    return table(COLUMNS, [_row(s) for s in services])


def _row(service: pb.L7Service) -> list[str]:
    words = [service.service, service.family or "-", service.protocol or "-", service.balance or "-"]
    if service.state == "refused":
        return [*words, service.state, *["-"] * (len(COLUMNS) - len(words) - 1)]
    figures = service.figures
    getting = sum(e.state.startswith(GETTING) for e in service.endpoints)
    return [
        *words,
        service.state,
        f"{getting} of {len(service.endpoints)}",
        str(figures.requests),
        "-" if service.protocol == "tcp" else str(figures.code_5xx),
        *(_duration(p) for p in (service.p50, service.p90, service.p99)),
        *_failures(figures),
    ]


def _failures(figures: pb.L7Figures) -> Iterator[str]:
    yield str(figures.retries)
    yield str(figures.redispatches)
    yield str(figures.connect_errors + figures.response_errors)
    yield f"{figures.connections_now}{f' ({figures.queued_now} wait)' if figures.queued_now else ''}"


def _endpoints(services: Iterable[pb.L7Service]) -> str:
    rows = [
        [
            service.service,
            endpoint.address,
            endpoint.state or "-",
            endpoint.check or "-",
            str(endpoint.figures.requests),
            "-" if service.protocol == "tcp" else str(endpoint.figures.code_5xx),
            *_failures(endpoint.figures),
        ]
        for service in services
        for endpoint in service.endpoints
    ]
    return table(ENDPOINT_COLUMNS, rows)


def _duration(seconds: float) -> str:
    """Write a time with two or three digits that mean something."""
    if not seconds:
        return "-"
    if seconds < 0.01:
        return f"{seconds * 1e3:.2f} ms"
    return f"{seconds * 1e3:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"


def run_config(args: argparse.Namespace) -> int:
    """Print HAProxy's configuration."""
    text = _asked(args, configuration=True).configuration
    if not text:
        raise CommandError("HAProxy has no configuration on this node: no service asks for the L7 proxy")
    print(text, end="" if text.endswith("\n") else "\n")
    return 0


def run_schema(args: argparse.Namespace) -> int:
    """Print the annotation's schema."""
    from proxy.l7.annotation import schema

    print(json.dumps(schema(), indent=2))
    return 0


def run_check(args: argparse.Namespace) -> int:
    """Say what is wrong in a file; exit status 1 if anything is."""
    name = "standard input" if args.file == "-" else args.file
    data = sys.stdin.buffer.read() if args.file == "-" else Path(args.file).read_bytes()
    count, problems = checked(data)
    for problem in problems:
        complain(f"{name}: {problem}")
    if problems:
        return 1
    print(f"{name}: {count} annotation{'s' if count != 1 else ''}, no mistakes found")
    return 0


def checked(data: bytes) -> tuple[int, list[str]]:
    """Return how many annotations a file has, and what is wrong with them, in sentences."""
    import yaml

    from node.sources.manifests import Loader

    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        return 0, [f"not UTF-8 at byte {error.start}"]
    try:
        documents = [d for d in yaml.load_all(text, Loader) if d is not None]
    except Exception as error:  # PyYAML's constructors raise what they please for what people write
        if text.lstrip().startswith("{"):
            return 1, _mistakes(text)
        return 0, [f"neither an annotation nor manifests: {' '.join(str(error).split())}"]
    if text.lstrip().startswith("{") and not any(isinstance(d, dict) and "kind" in d for d in documents):
        return 1, _mistakes(text)
    count, problems = 0, list[str]()
    for service in _services_of(documents):
        found = _annotation(service)
        if found is not None:
            count += 1
            problems += _of_service(service, *found)
    if not count:
        problems.append("it has no Service with the annotation podwire.io/proxy")
    return count, problems


def _mistakes(text: str) -> list[str]:
    from proxy.l7.annotation import AnnotationError, parse

    try:
        parse(text)
    except AnnotationError as error:
        return [str(error)]
    return []


def _services_of(documents: Iterable[Any]) -> Iterator[dict[str, Any]]:
    for document in documents:
        if not isinstance(document, dict):
            continue
        if str(document.get("kind", "")).endswith("List"):
            yield from _services_of(_list(document.get("items")))
        elif document.get("kind") == "Service":
            yield document


def _annotation(service: dict[str, Any]) -> tuple[str, Any] | None:
    """Return the annotation that counts: its key and its value."""
    from proxy.l7.policy import ANNOTATIONS

    annotations = _object(_object(service.get("metadata")).get("annotations"))
    return next(((key, annotations[key]) for key in ANNOTATIONS if key in annotations), None)


def _of_service(service: dict[str, Any], key: str, value: Any) -> Iterator[str]:
    """Yield what is wrong with a Service's annotation."""
    from node.sources.objects import identity

    where = f"{' '.join(identity(service))}: metadata.annotations['{key}']"
    if not isinstance(value, str):
        yield f"{where}: it is a {type(value).__name__}, not a string with JSON in it"
        return
    yield from (f"{where}: {mistake}" for mistake in _mistakes(value))
    ports = _object(service.get("spec")).get("ports")
    if not any((_object(p).get("protocol") or "TCP") == "TCP" for p in _list(ports)):
        yield f"{where}: spec.ports has none with TCP, and the proxy serves no other"


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
