"""Virtual servers of IPVS as the kernel lists them, and which of them are kube-proxy's."""

from __future__ import annotations

from node.leftover_ipvs import kube_proxys, parse_ip_vs

# As /proc/net/ip_vs of Linux prints (net/netfilter/ipvs/ip_vs_ctl.c).
LISTED = """\
IP Virtual Server version 1.2.1 (size=4096)
Prot LocalAddress:Port Scheduler Flags
  -> RemoteAddress:Port Forward Weight ActiveConn InActConn
TCP  0A600001:01BB rr 
  -> C0A8320B:192B      Masq    1      2          0         
TCP  C0A8320B:7580 rr persistent 10800 FFFFFFFF
  -> 0AF4020A:1F90      Masq    1      0          0         
  -> 0AF4020B:1F90      Masq    1      0          3         
UDP  [fd00:0096:0000:0000:0000:0000:0000:000a]:0035 rr 
  -> [fd00:0244:0000:0002:0000:0000:0000:000a]:0035      Masq    1      0          0         
TCP  0A600002:0050 rr 
  -> 0AF4020A:1F90      Masq    1      0          0         
  -> 0AF4020B:1F90      Masq    1      0          0         
FWM  00000001 wlc 
  -> 0AF40309:0050      Route   1      0          0         
TCP  C0000201:0050 wlc 
  -> 0AF4020A:1F90      Masq    1      0          0         
  -> C0000209:0050      Route   1      0          0         
SCTP C0000202:0051 wlc ops
"""  # noqa: W291


def test_the_kernels_list_is_parsed() -> None:
    servers = parse_ip_vs(LISTED)
    assert list(map(str, servers)) == [
        "TCP 10.96.0.1:443",
        "TCP 192.168.50.11:30080",
        "UDP [fd00:96::a]:53",
        "TCP 10.96.0.2:80",
        "TCP 192.0.2.1:80",
        "SCTP 192.0.2.2:81",
    ]
    assert servers[1].real == {("10.244.2.10", 8080), ("10.244.2.11", 8080)}
    assert servers[2].real == {("fd00:244:0:2::a", 53)}
    assert servers[-1].real == frozenset()


def test_an_empty_list_has_no_servers() -> None:
    assert parse_ip_vs("") == ()
    assert parse_ip_vs("".join(LISTED.splitlines(keepends=True)[:3])) == ()


def test_addresses_of_the_interface_and_node_ports_to_the_same_servers_are_kube_proxys() -> None:
    found = kube_proxys(parse_ip_vs(LISTED), frozenset({"10.96.0.1", "10.96.0.2", "fd00:96::a"}))
    assert [server.place for server in found] == [
        "10.96.0.1:443",
        "192.168.50.11:30080",
        "[fd00:96::a]:53",
        "10.96.0.2:80",
    ]


def test_without_its_interface_nothing_is_known_to_be_kube_proxys() -> None:
    assert kube_proxys(parse_ip_vs(LISTED), frozenset()) == ()
