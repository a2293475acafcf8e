"""The annotation of a Service: JSON text → Policy, or one sentence that says what is wrong with it.

    keys        every key, with its kind of value, default and meaning: the only table of them
    fields      the kinds of values: how each is read, and said in JSON Schema
    patterns    regular expressions that can be handed on to HAProxy

docs/l7.md is the reference for users, docs/l7.schema.json the schema.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from proxy.l7.fields import (
    AnnotationError,
    UnknownKey,
    misspelt,
    nearest,
    not_for_tcp,
    places,
    section,
    shown,
    tcp_schema,
    under,
)
from proxy.l7.keys import FIELDS, HASHED
from proxy.l7.policy import ANNOTATIONS, Policy, Protocol, ProxyProtocol

__all__ = ["AnnotationError", "asked_for", "parse", "schema"]

LARGEST = 64 * 1024
"""Bytes of an annotation; Kubernetes allows 256 KiB for all of an object's together."""


def _make_policy(place: str, given: dict[str, Any]) -> Policy:
    found = Policy(**given)
    if found.balance in HASHED and not found.hash_on:
        raise AnnotationError(f"load-balancing-mode: {shown(found.balance.value)} needs hash-on")
    if found.hash_on and found.balance not in HASHED:
        mode = shown(found.balance.value)
        raise AnnotationError(
            f"hash-on: {shown(found.hash_on)} needs load-balancing-mode header or cookie; it is {mode}"
        )
    if found.transparent and found.proxy_protocol is not ProxyProtocol.NONE:
        told = f"does not go with proxy-protocol {shown(found.proxy_protocol.value)}: one of them is enough"
        raise AnnotationError(f"flags.transparent: true {told}")
    if found.transparent and found.external:
        told = "true does not go with flags.external true: answers to the outside would not pass here"
        raise AnnotationError(f"flags.transparent: {told}")
    return found


def _flags(*names: str) -> dict[str, Any]:
    """Return the schema of annotations with all of these flags on."""
    on = {"required": [*names], "properties": {name: {"const": True} for name in names}}
    return {"required": ["flags"], "properties": {"flags": on}}


def _if(key: str, values: Sequence[str], then: dict[str, Any], otherwise: dict[str, Any]) -> dict[str, Any]:
    condition = {"required": [key], "properties": {key: {"enum": [*values]}}}
    return {"if": condition, "then": then, "else": otherwise}


_PROXY_PROTOCOL = {"required": ["proxy-protocol"], "properties": {"proxy-protocol": {"enum": ["v1", "v2"]}}}
RULES = {
    "allOf": [
        _if("ip-protocol", ["tcp"], tcp_schema(FIELDS), {}),
        _if(
            "load-balancing-mode",
            [mode.value for mode in HASHED],
            {"required": ["hash-on"]},
            {"properties": {"hash-on": False}},
        ),
        {"not": {"allOf": [_flags("transparent"), _PROXY_PROTOCOL]}},
        {"not": _flags("transparent", "external")},
    ]
}

ANNOTATION = section(_make_policy, FIELDS, RULES)
"""The whole of it."""


def parse(text: str) -> Policy:
    """Return what an annotation asks for. Raises AnnotationError."""
    size = len(text.encode(errors="surrogatepass"))
    if size > LARGEST:
        raise AnnotationError(f"the annotation: {size} bytes are more than {LARGEST}")
    document = _document(text)
    try:
        policy: Policy = ANNOTATION.read("", document)
    except UnknownKey as error:
        near = nearest(error.key, _elsewhere())
        raise misspelt(error.place, near) if near else error from None
    if policy.protocol is Protocol.TCP:
        not_for_tcp(FIELDS, document)
    return policy


def asked_for(texts: Sequence[str | None], tcp: bool, problems: list[str]) -> Policy | None:
    """Return what a service asks for; None for nothing, and when it asks wrongly, which is a sentence then.

    `texts` are its annotations, in the order of `policy.ANNOTATIONS`; `tcp` is whether it has a TCP port.
    """
    found = next(
        ((name, text) for name, text in zip(ANNOTATIONS, texts, strict=True) if text is not None), None
    )
    if found is None:
        return None
    name, text = found
    try:
        policy = parse(text)
        if tcp:
            return policy
        told = "spec.ports has none with TCP, and the proxy serves no other"
    except AnnotationError as error:
        told = str(error)
    problems.append(f"metadata.annotations[{name!r}]: {told}: plain balancing")
    return None


def schema() -> dict[str, Any]:
    """Return the JSON Schema (draft 2020-12). Sums and comparisons of fields are not in it."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": "https://podwire.io/v1alpha1/l7.json",
        "title": f"The annotation {ANNOTATIONS[0]} of a Service",
        **ANNOTATION.schema,
    }


def _document(text: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_object, parse_constant=_constant)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise AnnotationError(f"the annotation is no JSON: {error.msg} in {where}") from None
    except AnnotationError:
        raise
    except RecursionError:
        raise AnnotationError("the annotation: its lists and objects go too deep") from None
    except ValueError:  # Python reads no number of more than 4,300 digits
        raise AnnotationError("the annotation: it has a number with too many digits") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise AnnotationError(f"{under('', key)}: an object has this key twice")
        found[key] = value
    return found


def _constant(name: str) -> None:
    raise AnnotationError(f"the annotation is no JSON: {name} is no number in JSON")


def _elsewhere() -> dict[str, str]:
    """Return the place of every key, by its own name; of those with the same, the first."""
    found: dict[str, str] = {}
    for place, field in places(FIELDS):
        found.setdefault(field.key, place)
    return found
