"""JSON Schema, as far as ours goes."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from typing import Any

from proxy.l7.annotation import schema


class Validator:
    """JSON Schema, draft 2020-12, of the keywords that our schema uses; another is an error."""

    TYPES: Mapping[str, tuple[type, ...]] = {
        "object": (dict,),
        "array": (list,),
        "string": (str,),
        "boolean": (bool,),
        "integer": (int, float),
    }
    TALK = frozenset({"$schema", "$id", "title", "description", "default", "then", "else"})

    def __init__(self, root: Any = None) -> None:
        self.root = schema() if root is None else root

    def problem(self, value: Any) -> str:
        """Return what is wrong; "" if nothing is."""
        return self._check(self.root, value)

    def _check(self, rule: Any, value: Any) -> str:
        if isinstance(rule, bool):
            return "" if rule else f"{value!r} must not be here"
        for keyword, wanted in rule.items():
            if keyword in self.TALK:
                continue
            if told := getattr(self, f"_{keyword}")(wanted, value, rule):
                return str(told)
        return ""

    def _type(self, wanted: str, value: Any, rule: Any) -> str:
        fits = isinstance(value, self.TYPES[wanted]) and (isinstance(value, bool) == (wanted == "boolean"))
        if isinstance(value, float):
            fits = fits and value.is_integer()
        return "" if fits else f"{value!r} is no {wanted}"

    def _enum(self, wanted: list[Any], value: Any, rule: Any) -> str:
        fits = any(value == known and isinstance(value, bool) == isinstance(known, bool) for known in wanted)
        return "" if fits else f"{value!r} is none of {wanted}"

    def _const(self, wanted: Any, value: Any, rule: Any) -> str:
        return self._enum([wanted], value, rule)

    def _minimum(self, wanted: int, value: Any, rule: Any) -> str:
        return f"{value!r} < {wanted}" if isinstance(value, int | float) and value < wanted else ""

    def _maximum(self, wanted: int, value: Any, rule: Any) -> str:
        return f"{value!r} > {wanted}" if isinstance(value, int | float) and value > wanted else ""

    def _pattern(self, wanted: str, value: Any, rule: Any) -> str:
        fits = not isinstance(value, str) or re.search(re.sub(r"\$$", r"\\Z", wanted), value)
        return "" if fits else f"{value!r} does not match {wanted}"

    def _maxLength(self, wanted: int, value: Any, rule: Any) -> str:
        return "too long" if isinstance(value, str) and len(value) > wanted else ""

    def _minItems(self, wanted: int, value: Any, rule: Any) -> str:
        return "too few" if isinstance(value, list) and len(value) < wanted else ""

    def _maxItems(self, wanted: int, value: Any, rule: Any) -> str:
        return "too many" if isinstance(value, list) and len(value) > wanted else ""

    def _maxProperties(self, wanted: int, value: Any, rule: Any) -> str:
        return "too many" if isinstance(value, dict) and len(value) > wanted else ""

    def _uniqueItems(self, wanted: bool, value: Any, rule: Any) -> str:
        pairs = itertools.combinations(value, 2) if isinstance(value, list) else ()
        return "the same twice" if any(a == b and type(a) is type(b) for a, b in pairs) else ""

    def _items(self, wanted: Any, value: Any, rule: Any) -> str:
        return self._first((wanted, item) for item in value) if isinstance(value, list) else ""

    def _properties(self, wanted: Any, value: Any, rule: Any) -> str:
        given = value if isinstance(value, dict) else {}
        return self._first((wanted[key], inner) for key, inner in given.items() if key in wanted)

    def _additionalProperties(self, wanted: Any, value: Any, rule: Any) -> str:
        given = value if isinstance(value, dict) else {}
        known = rule.get("properties", {})
        return self._first((wanted, inner) for key, inner in given.items() if key not in known)

    def _propertyNames(self, wanted: Any, value: Any, rule: Any) -> str:
        return self._first((wanted, key) for key in value) if isinstance(value, dict) else ""

    def _required(self, wanted: list[str], value: Any, rule: Any) -> str:
        missing = [key for key in wanted if isinstance(value, dict) and key not in value]
        return f"{missing} missing" if missing else ""

    def _dependentRequired(self, wanted: Any, value: Any, rule: Any) -> str:
        given = value if isinstance(value, dict) else {}
        missing = [key for had, keys in wanted.items() if had in given for key in keys if key not in given]
        return f"{missing} missing" if missing else ""

    def _allOf(self, wanted: Any, value: Any, rule: Any) -> str:
        return self._first((inner, value) for inner in wanted)

    def _anyOf(self, wanted: Any, value: Any, rule: Any) -> str:
        found = [self._check(inner, value) for inner in wanted]
        return "" if "" in found else found[0]

    def _oneOf(self, wanted: Any, value: Any, rule: Any) -> str:
        return "" if [self._check(inner, value) for inner in wanted].count("") == 1 else "not exactly one"

    def _not(self, wanted: Any, value: Any, rule: Any) -> str:
        return "" if self._check(wanted, value) else "must not be"

    def _if(self, wanted: Any, value: Any, rule: Any) -> str:
        chosen = "else" if self._check(wanted, value) else "then"
        return self._check(rule.get(chosen, True), value)

    def _first(self, pairs: Any) -> str:
        return next((told for inner, value in pairs if (told := self._check(inner, value))), "")
