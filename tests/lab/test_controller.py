"""The lab's share of a control plane, as far as it is pure."""

from pathlib import Path

import pytest

import lab
from lab import state
from lab.controller import balancer_addresses, cluster_addresses, service_object
from netlink.family import Family

SAMPLE = Path(lab.__file__).parent / "samples/yaobank.yaml"


@pytest.mark.parametrize("family", Family)
def test_in_a_lab_of_one_family_services_and_their_balancers_have_addresses_of_that_one(
    family: Family,
) -> None:
    found = [d for d in state.documents_of(SAMPLE) if d["kind"] == "Service"]
    for service in (service_object(document, [family]) for document in found):
        assert list(cluster_addresses(service)) == [family]
        assert set(balancer_addresses(service)) <= {family}
        assert bool(balancer_addresses(service)) == (service["spec"]["type"] == "LoadBalancer")


def test_a_balancer_known_by_a_host_name_has_no_address_and_keeps_its_name() -> None:
    ingress = [{"hostname": "front.example"}, {"ip": "192.0.2.10"}]
    document = {
        "metadata": {"name": "front"},
        "spec": {
            "ipFamilyPolicy": "PreferDualStack",
            "clusterIPs": ["10.96.0.1", "fd00::1"],
        },
        "status": {"loadBalancer": {"ingress": ingress}},
    }
    kept = service_object(document, [Family.V6])
    assert kept["status"]["loadBalancer"]["ingress"] == ingress[:1]
    assert balancer_addresses(kept) == {}
    assert service_object(document, [Family.V4, Family.V6]) == document
