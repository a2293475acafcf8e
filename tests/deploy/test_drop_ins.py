"""Files for systemd-networkd, NetworkManager and firewalld: they name every interface of podwire's."""

from __future__ import annotations

import fnmatch
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from cni.wiring import BRIDGE, host_ifname
from node.backends import DEVICES
from node.backends.hops import TunnelConfig
from node.uninstall import DROP_INS

DEPLOY = Path(__file__).parents[2] / "deploy"
FIREWALLD = DEPLOY / "firewalld"
INTERFACES = (host_ifname("c1", "eth0"), BRIDGE, *DEVICES)


def line(file: str, key: str) -> str:
    found = [x.removeprefix(key) for x in (DEPLOY / "systemd" / file).read_text().splitlines() if key in x]
    assert len(found) == 1
    return found[0]


def interfaces() -> dict[str, list[str]]:
    zone = ET.parse(FIREWALLD / "zones/podwire.xml").getroot()
    managed = line("networkmanager.conf", "unmanaged-devices=").split(";")
    return {
        "networkd": line("10-podwire.network", "Name=").split(),
        "NetworkManager": [entry.removeprefix("interface-name:") for entry in managed],
        # A name that ends with + stands for all that begin so.
        "firewalld": [i.attrib["name"].replace("+", "*") for i in zone.findall("interface")],
    }


@pytest.mark.parametrize("program", ["networkd", "NetworkManager", "firewalld"])
@pytest.mark.parametrize("name", INTERFACES)
def test_interfaces_of_podwire_are_named_and_no_others(program: str, name: str) -> None:
    patterns = interfaces()[program]
    assert any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
    for other in ("eth0", "podwire00", "flannel.1", "cni0"):
        assert not any(fnmatch.fnmatchcase(other, pattern) for pattern in patterns)


def test_firewalld_lets_the_tunnels_ports_in() -> None:
    ports = ET.parse(FIREWALLD / "services/podwire-vxlan.xml").getroot().findall("port")
    config = TunnelConfig()
    wireguard = f"{config.wireguard_port}-{config.wireguard_port + 1}"
    assert [port.attrib for port in ports] == [
        {"protocol": "udp", "port": text} for text in (str(config.port), wireguard)
    ]


def test_firewalld_files_refer_to_each_other_only() -> None:
    """What is taken away as a whole leaves nothing that names what is gone; firewalld wants names once."""
    files = {path.stem: path for path in FIREWALLD.glob("*/*.xml")}
    policies = [ET.parse(path).getroot() for path in FIREWALLD.glob("policies/*.xml")]
    named = {e.attrib["name"] for p in policies for e in p if "name" in e.attrib} - {"ANY", "HOST"}
    assert named <= files.keys()
    zones, policy_names = (
        {p.stem for p in FIREWALLD.glob(f"{kind}/*.xml")} for kind in ("zones", "policies")
    )
    assert not zones & policy_names
    assert all(len(name) <= 17 for name in (*zones, *policy_names))


def test_cleanup_knows_where_each_file_goes() -> None:
    there = {f"{path.parent.name}/{path.name}" for path in FIREWALLD.glob("*/*.xml")}
    known = {f"{p.parent.name}/{p.name}" for p in DROP_INS if "firewalld" in p.parts and p.suffix == ".xml"}
    assert there == known
