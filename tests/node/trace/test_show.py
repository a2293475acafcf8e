"""How a trace is printed and drawn."""

from __future__ import annotations

import json
from dataclasses import replace
from xml.etree import ElementTree

from netlink.conntrack import Flow, Tuple
from node.trace import show, svg
from node.trace.packet import Choice, Packet, Trace
from node.trace.path import Tracer
from tests.node.trace.states import NODE1, V4, packet, world

SVG = "{http://www.w3.org/2000/svg}"


def _trace(sent: Packet, branches: int = 1) -> Trace:
    found = Tracer(world()).received("node1", sent)
    if branches > 1:
        (one,) = found
        found = tuple(
            replace(
                one,
                probability=one.probability / branches,
                choices=(Choice("node1", "c", n, branches, one.probability / branches),),
                end=replace(one.end, packet=replace(one.end.packet, destination=f"10.244.1.{n}")),
            )
            for n in range(branches)
        )
    return Trace(sent, "pod shop/a", "pod <shop/b> & others", found, ("node1: ip fw c: filter",))


def test_each_step_is_a_line_with_its_hook_under_its_place() -> None:
    lines = show.text(_trace(packet())).splitlines()
    assert lines[:4] == [
        "pod shop/a → pod <shop/b> & others",
        "",
        "node1",
        "  in             pwpoda (of pod shop/a): 10.244.1.2 → 10.244.1.3:80",
    ]
    assert "  end            delivered: pod shop/b on node1, 10.244.1.3:80" in lines
    assert lines[-2:] == ["others at the same hooks:", "  node1: ip fw c: filter"]


def test_ways_by_chance_are_a_table_and_alike_ones_are_shown_once() -> None:
    text = show.text(_trace(packet(), branches=3))
    assert text.count("1/3  ") == 3
    assert "with probability 1 for this and 2 like it" in text


def test_what_stands_in_the_way_is_said_with_what_to_look_at() -> None:
    text = show.text(_trace(packet(destination="127.0.0.1")))
    assert "dropped: a loopback address cannot come by pwpoda (a martian)" in text
    assert "look at: net.ipv4.conf.*.route_localnet" in text
    assert "the way back" not in text


def test_json_has_all_steps_as_data() -> None:
    data = json.loads(json.dumps(show.data(_trace(packet(), branches=4))))
    one = data["branches"][0]
    assert (one["probability"], one["likelihood"], one["masqueraded"]) == ("1/4", 0.25, False)
    assert one["end"]["verdict"] == "delivered"
    assert one["steps"][0]["kind"] == "interface"
    assert data["packet"]["family"] == V4.value


def test_the_picture_is_well_formed_and_has_a_box_for_each_place() -> None:
    document = ElementTree.fromstring(svg.picture(_trace(packet(destination="10.244.2.2"))))
    assert document.tag == f"{SVG}svg"
    texts = ["".join(t.itertext()) for t in document.iter(f"{SVG}text")]
    for title in ("node1", "router", "node2", "delivered"):
        assert title in texts
    assert texts[0] == "pod shop/a → pod <shop/b> & others"
    assert len(list(document.iter(f"{SVG}line"))) == len(list(document.iter(f"{SVG}rect"))) - 2


def test_the_picture_shows_translations_and_refusals() -> None:
    flow = Flow(V4, 6, Tuple("10.244.1.2", "10.96.0.1", 40, 80), Tuple("10.244.1.3", "10.244.1.2", 8080, 40))
    sent = packet(destination="10.96.0.1", sport=40)
    found = Tracer(world(replace(NODE1, flows=(flow,)))).received("node1", sent)
    drawn = svg.picture(Trace(sent, "a", "b", found))
    assert "destination 10.96.0.1:80 → 10.244.1.3:8080" in drawn
    refused = svg.picture(_trace(packet(destination="127.0.0.1")))
    assert svg.BAD in refused
    ElementTree.fromstring(refused)
