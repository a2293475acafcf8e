"""A trace as a picture: boxes for nodes, arrows with addresses between them, translations inside. Pure.

One row for each kind of way (`show.groups`); at the end of a row, who receives it and how likely that is.
"""

from __future__ import annotations

from dataclasses import dataclass
from xml.sax.saxutils import escape, quoteattr

from node.trace.packet import Branch, Kind, Trace
from node.trace.show import Group, groups

BOX, GAP, LINE, PAD, TOP = 400, 190, 16, 10, 44
CHARACTER = 6.8
"""How wide one is, in pixels."""
INK, BORDER, FILL, GOOD, BAD, NAT = "#222222", "#667788", "#f4f7fa", "#2a7a3a", "#b03030", "#1f5fa8"
STYLE = "font-family:monospace;font-size:11px"


@dataclass(frozen=True, slots=True)
class Box:
    """A place on a way: its lines, each with a colour, and the packet as it arrives there."""

    title: str
    lines: tuple[tuple[str, str], ...]
    arrives: str
    colour: str = BORDER

    @property
    def height(self) -> int:
        """How high it is drawn."""
        return TOP // 2 + LINE * (len(self.lines) + 1)


def picture(trace: Trace) -> str:
    """Return a trace as an SVG document."""
    rows = [(group, _boxes(trace, group)) for group in groups(trace)]
    width = max(len(boxes) for _, boxes in rows) * (BOX + GAP) - GAP + 2 * PAD
    parts: list[str] = [_text(PAD, 20, f"{trace.source} → {trace.target}", INK, bold=True)]
    top = TOP
    for _, boxes in rows:
        height = max(box.height for box in boxes)
        for at, box in enumerate(boxes):
            left = PAD + at * (BOX + GAP)
            parts += _box(left, top, box)
            if at:
                parts += _arrow(left - GAP, left, top + height // 2 if height < 60 else top + 30, box.arrives)
        top += height + 30
    size = f'width="{width}" height="{top}" viewBox="0 0 {width} {top}"'
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} style={quoteattr(STYLE)}>'
        '<defs><marker id="head" markerWidth="9" markerHeight="7" refX="8" refY="3.5" orient="auto">'
        f'<path d="M0,0 L9,3.5 L0,7 z" fill="{BORDER}"/></marker></defs>'
        f'<rect width="{width}" height="{top}" fill="white"/>'
    )
    return "\n".join([head, *parts, "</svg>\n"])


def _boxes(trace: Trace, group: Group) -> list[Box]:
    branch = group.first
    place, lines, packet = "", list[tuple[str, str]](), trace.packet.addresses
    arrives = outer = packet
    boxes = []
    if branch.steps[0].kind is Kind.START:
        arrives = ""  # the first place is the source itself
    else:
        boxes.append(Box(trace.source, ((packet, INK),), ""))
    for step in branch.steps:
        if step.place != place and step.kind is not Kind.END:
            if lines:
                boxes.append(Box(place, tuple(lines), arrives))
                arrives = outer if step.hook.startswith("(") else packet
            place, lines = step.place, []
        if step.kind is Kind.NAT:
            packet = step.after
            lines.append((step.text, NAT))
        elif step.kind is Kind.TUNNEL:
            outer = f"{'WireGuard' if ': WireGuard' in step.text else 'VXLAN'} {step.after}"
            lines.append((step.text, INK))
        elif step.kind is Kind.ROUTE:
            lines.append((step.text, INK))
        elif step.kind is Kind.RULE:
            lines.append((f"{step.chain}: {step.text}", BORDER))
    if lines:
        boxes.append(Box(place, tuple(lines), arrives))
    boxes.append(_last(group, branch, packet))
    return boxes


def _last(group: Group, branch: Branch, packet: str) -> Box:
    end = branch.end
    colour = BAD if end.verdict.fails else GOOD
    lines = [(end.who, INK)] if end.who else []
    lines += [(end.reason, INK)] if end.reason else []
    others = len(group.branches) - 1
    lines += [(f"probability {group.probability}" + (f", with {others} like it" if others else ""), INK)]
    return Box(end.verdict.value, tuple(lines), packet, colour)


def _box(left: int, top: int, box: Box) -> list[str]:
    shape = (
        f'<rect x="{left}" y="{top}" width="{BOX}" height="{box.height}" rx="5" fill="{FILL}" '
        f'stroke="{box.colour}"/>'
    )
    parts = [
        shape,
        _text(left + PAD, top + LINE, box.title, box.colour if box.colour != BORDER else INK, bold=True),
    ]
    for at, (words, colour) in enumerate(box.lines, 2):
        parts.append(_text(left + PAD, top + 2 + LINE * at, words, colour))
    return parts


def _arrow(start: int, end: int, height: int, words: str) -> list[str]:
    line = (
        f'<line x1="{start + 4}" y1="{height}" x2="{end - 2}" y2="{height}" stroke="{BORDER}" '
        'marker-end="url(#head)"/>'
    )
    source, _, target = words.partition(" → ")
    labels = [
        _text(start + 8, height - 6, source, INK, GAP),
        _text(start + 8, height + 14, f"→ {target}", INK, GAP),
    ]
    return [line, *(labels if words else [])]


def _text(left: int, top: int, words: str, colour: str, width: int = 0, *, bold: bool = False) -> str:
    """Return a line of text; one that is too long for its box is cut off, and whole as its title."""
    room = int((width or (BOX if not bold or top > TOP else 10_000)) / CHARACTER) - 3
    shown = words if len(words) <= room else words[: room - 1] + "…"
    weight = ' font-weight="bold"' if bold else ""
    title = f"<title>{escape(words)}</title>" if shown != words else ""
    return f'<text x="{left}" y="{top}" fill="{colour}"{weight}>{title}{escape(shown)}</text>'
