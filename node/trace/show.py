"""A trace as text for people, and as data for programs. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from enum import Enum
from fractions import Fraction
from typing import Any

from netlink.family import with_port
from node.trace.packet import Branch, Kind, Step, Trace

HOOK_WIDTH = 15
MOST_ROWS = 40


@dataclass(frozen=True, slots=True)
class Group:
    """Branches that differ only in which endpoint they lead to; the first one stands for all."""

    branches: tuple[Branch, ...]

    @property
    def first(self) -> Branch:
        """The one that stands for all."""
        return self.branches[0]

    @property
    def probability(self) -> Fraction:
        """How likely any of them is."""
        return sum((b.probability for b in self.branches), Fraction(0))


def groups(trace: Trace) -> tuple[Group, ...]:
    """Return the branches by what they have in common but the endpoint: places, verdict, translations."""
    found: dict[Any, list[Branch]] = {}
    for branch in trace.branches:
        places = tuple(dict.fromkeys(s.place for s in branch.steps))
        key = places, branch.end.verdict, branch.masqueraded, branch.notes
        found.setdefault(key, []).append(branch)
    return tuple(Group(tuple(some)) for some in found.values())


def text(trace: Trace, *, everything: bool = False) -> str:
    """Return a trace as text, a step a line; `everything`: also chains in which nothing matches."""
    lines = [f"{trace.source} → {trace.target}", ""]
    several = len(trace.branches) > 1
    common = trace.common if several else len(trace.branches[0].steps)
    lines += _steps(trace.branches[0].steps[:common], everything)
    if several:
        lines += ["", f"by chance, one of {len(trace.branches)} ways:", ""]
        lines += _table(trace)
        for group in groups(trace):
            one = group.first
            to = with_port(one.end.packet.destination, one.end.packet.dport)
            what = f"{to}, with probability {group.probability}"
            if len(group.branches) > 1:
                what = f"{what} for this and {len(group.branches) - 1} like it"
            lines += [
                "",
                f"on the way to {what}:",
                "",
                *_steps(one.steps[common:], everything),
                *_ending(one),
            ]
    else:
        lines += _ending(trace.branches[0])
    if trace.others:
        lines += ["", "others at the same hooks:", *(f"  {words}" for words in trace.others)]
    return "\n".join(lines)


def _ending(branch: Branch) -> Iterator[str]:
    end = branch.end
    if end.reason and end.who:
        yield f"{'':{HOOK_WIDTH + 2}}{end.reason}"
    if end.look:
        yield f"{'':{HOOK_WIDTH + 2}}look at: {end.look}"
    if branch.back:
        yield ""
        yield "the way back:"
        yield ""
        yield from _steps(branch.back, True)
    for note in branch.notes:
        yield ""
        yield f"but: {note}"


def _steps(steps: Sequence[Step], everything: bool) -> Iterator[str]:
    place = ""
    for step in steps:
        if step.place != place:
            place = step.place
            yield place
        if step.kind is Kind.CHAIN and not everything:
            continue
        yield f"  {step.hook:<{HOOK_WIDTH}}{_words(step)}"
        if step.kind in (Kind.RULE, Kind.UNDECIDED) and step.rule != step.text:
            yield f"  {'':{HOOK_WIDTH}}    {step.rule}"
        for element in step.elements:
            yield f"  {'':{HOOK_WIDTH}}    {element}"


def _words(step: Step) -> str:
    """Return a step in words: of a rule, with its chain and its counter."""
    words = f"{step.chain}: {step.text}" if step.chain else step.text
    if step.kind is Kind.RULE and step.packets is not None:
        words += f" [{step.packets} packets so far]"
    return words


def _table(trace: Trace) -> Iterator[str]:
    rows = [("PROBABILITY", "TO", "SOURCE SEEN", "END")]
    for branch in trace.branches[:MOST_ROWS]:
        end = branch.end
        to = with_port(end.packet.destination, end.packet.dport)
        seen = "-" if end.verdict.fails else end.packet.source
        rows.append((str(branch.probability), to, seen, f"{end.verdict.value}: {end.who or end.reason}"))
    widths = [max(len(row[at]) for row in rows) for at in range(3)]
    for row in rows:
        yield "  " + "  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[3]])
    if len(trace.branches) > MOST_ROWS:
        yield f"  and {len(trace.branches) - MOST_ROWS} more"


def data(trace: Trace) -> dict[str, Any]:
    """Return a trace as values of JSON."""
    found: dict[str, Any] = _plain(asdict(trace))
    for shown, branch in zip(found["branches"], trace.branches, strict=True):
        shown["likelihood"] = float(branch.probability)
        shown["masqueraded"] = branch.masqueraded
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, Fraction):
        return str(value)
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, dict):
        return {key: _plain(v) for key, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value
