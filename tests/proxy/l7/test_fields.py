"""Whatever an annotation says: parsing and the schema agree, and nobody gets a traceback."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from proxy.l7.annotation import AnnotationError, parse, schema
from proxy.l7.fields import Field, places
from proxy.l7.keys import FIELDS
from proxy.l7.policy import Policy, Retry
from tests.proxy.l7.json_schema import Validator
from tests.proxy.l7.test_annotation import FULL, REFUSED, leaves, said, wrong

DOCS = Path(__file__).parents[3] / "docs"

# What follows makes documents: each part is right by itself, most are right together.
words = st.text(st.characters(min_codepoint=0, max_codepoint=300), max_size=8)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | words,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3),
    max_leaves=5,
)
times = st.integers(1, 3600).map(lambda n: f"{n}s") | st.sampled_from(["150ms", "1m", "1h"])
short_times = st.integers(100, 60_000).map(lambda n: f"{n}ms")
paths = st.from_regex(r"\A/[a-z0-9/%._~!$&'()*+,;=:@-]{0,20}\Z")
tokens = st.from_regex(r"\AX-[!#$%&'*+.^_`|~0-9A-Za-z-]{1,10}\Z")
header_values = st.from_regex(r"\A[!-~]([ -~]{0,20}[!-~])?\Z")
changes = st.fixed_dictionaries(
    {},
    optional={
        "remove": st.lists(tokens, max_size=3, unique=True),
        "set": st.dictionaries(tokens, header_values, max_size=1),
        "add": st.dictionaries(tokens, header_values, max_size=1),
    },
)


def rules() -> st.SearchStrategy[dict[str, Any]]:
    matches = st.fixed_dictionaries({"prefix": paths}) | st.fixed_dictionaries({"exact": paths})
    actions = st.sampled_from(
        [{}, {"deny": 404}, {"redirect": "/a"}, {"redirect": "/a", "code": 301}, {"rewrite": "/b"}]
    )
    return st.builds(lambda match, action: match | action, matches, actions)


SECTIONS: dict[str, st.SearchStrategy[Any]] = {
    "load-balancing-mode": st.sampled_from(["round-robin", "least-connections", "random", "source"]),
    "proxy-protocol": st.sampled_from(["none", "v1", "v2"]),
    "fail": st.sampled_from(["open", "closed"]),
    "flags": st.fixed_dictionaries(
        {}, optional={k: st.booleans() for k in ("external", "access-log", "x-forwarded-for", "x-served-by")}
    ),
    "timeouts": st.fixed_dictionaries(
        {}, optional=dict.fromkeys(("client", "server", "request", "keep-alive", "queue", "tunnel"), times)
    ),
    "retries": st.fixed_dictionaries(
        {},
        optional={
            "attempts": st.integers(0, 10),
            "on": st.lists(st.sampled_from([r.value for r in Retry]), min_size=1, unique=True),
            "unsafe": st.booleans(),
        },
    ),
    "health-check": st.fixed_dictionaries(
        {"path": paths},
        optional={
            "status": st.sampled_from(["200", "200-299,404"]),
            "interval": short_times,
            "host": st.just("a"),
        },
    ),
    "circuit-breaker": st.fixed_dictionaries(
        {"errors": st.integers(1, 1000)}, optional={"open-for": short_times, "answers": st.booleans()}
    ),
    "limits": st.fixed_dictionaries(
        {"endpoint-requests": st.integers(1, 1000)}, optional={"endpoint-queue": st.integers(0, 10)}
    ),
    "tls": st.booleans() | st.fixed_dictionaries({}, optional={"ca": st.just("a.pem")}),
    "headers": st.fixed_dictionaries({}, optional={"request": changes, "response": changes}),
    "paths": st.lists(rules(), max_size=3, unique_by=json.dumps),
}
documents = st.fixed_dictionaries({}, optional=SECTIONS)


@given(documents)
def test_what_is_right_is_a_policy_which_can_be_hashed_and_compared(document: dict[str, Any]) -> None:
    policy, again = said(document), parse(json.dumps(document, indent=1))
    assert policy == again
    assert hash(policy) == hash(again)
    assert Validator().problem(document) == ""


@given(st.text() | json_values.map(json.dumps) | documents.map(json.dumps).map(lambda text: text[:-1]))
@example("[" * 5000)
def test_any_text_is_a_policy_or_one_sentence(text: str) -> None:
    policy_or_sentence(text)


def policy_or_sentence(text: str) -> Policy | None:
    try:
        policy = parse(text)
    except AnnotationError as error:
        assert str(error).isprintable(), str(error)
        assert len(str(error)) < 1000
        return None
    for value in texts(msgspec.to_builtins(policy)):
        assert re.fullmatch(r"[ -~]*", value), value
    hash(policy)
    return policy


def texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list | tuple):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from texts(inner)


def containers(value: Any) -> Iterator[tuple[Any, Any]]:
    pairs = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in list(pairs):
        yield value, key
        if isinstance(inner, dict | list):
            yield from containers(inner)


@given(st.data())
def test_what_is_right_with_one_place_changed_is_refused_by_parsing_wherever_the_schema_refuses_it(
    data: st.DataObject,
) -> None:
    document = json.loads(json.dumps(FULL))
    container, key = data.draw(st.sampled_from([*containers(document)]))
    if data.draw(st.booleans()):
        container[key] = data.draw(json_values | st.sampled_from([v for _, v in leaves(FULL)]))
    elif isinstance(container, dict):
        container[data.draw(words)] = container.pop(key)
    else:
        container.append(container[key])
    policy = policy_or_sentence(json.dumps(document))
    told = Validator().problem(document)
    assert policy is None or told == "", told


# Of what parsing refuses, a schema cannot say these.
BEYOND = (
    "a regular expression",
    "soon decided",
    "bytes together",
    "is not without spaces",
    "status codes: a range",
    "is not a time from",
    "there already",
    "is not a header that can",
    "].rewrite: ",
    "endpoint-queue",
)


@pytest.mark.parametrize(("document", "sentence"), REFUSED, ids=[s[:40] for _, s in REFUSED])
def test_the_schema_refuses_what_parsing_refuses(document: Any, sentence: str) -> None:
    document = json.loads(json.dumps(document))
    beyond = any(words in wrong(json.dumps(document)) for words in BEYOND)
    assert (Validator().problem(document) == "") == beyond


def test_the_schema_that_is_published_is_ours_and_the_examples_of_the_reference_are_right() -> None:
    published = json.loads((DOCS / "l7.schema.json").read_text())
    assert published == schema()
    text = (DOCS / "l7.md").read_text()
    found = re.findall(r"```json\n(.*?)```", text, re.DOTALL)
    found += re.findall(r"podwire\.io/proxy: \|\n(.*?)\nspec:", text, re.DOTALL)
    found += re.findall(r"\| `(\{.*?\})`", text)
    assert len(found) > 10
    for example_text in found:
        parse(example_text)
        assert Validator(published).problem(json.loads(example_text)) == ""


def test_every_field_is_in_the_reference_with_words() -> None:
    text = (DOCS / "l7.md").read_text()
    for place, field in places(FIELDS):
        assert field.meaning
        assert (f"`{field.key}`" in text or f"### {field.key}" in text) or field.key in place, place
    assert all(isinstance(field, Field) for field in FIELDS)
