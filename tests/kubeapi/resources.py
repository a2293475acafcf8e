"""The kinds that the server has, as the API's discovery describes them."""

from __future__ import annotations

from dataclasses import dataclass

NAMES = ("metadata.name", "metadata.namespace")


@dataclass(frozen=True, slots=True)
class Resource:
    """One resource.

    `fields` are what field selectors may name. `creates` says whether PUT creates what is not there, and
    `unconditional` whether it may leave out metadata.resourceVersion (each as kube-apiserver's strategy for
    the kind has it). `empty` is what the Go type encodes besides metadata when nothing is set (bookmarks).
    """

    group: str
    plural: str
    kind: str
    short: tuple[str, ...] = ()
    namespaced: bool = True
    status: bool = False
    creates: bool = False
    unconditional: bool = True
    generation: bool = False
    fields: tuple[str, ...] = ()
    empty: str = ""

    @property
    def api_version(self) -> str:
        """The group and version as objects name it."""
        return f"{self.group}/v1" if self.group else "v1"

    @property
    def prefix(self) -> bytes:
        """How an encoded object of the kind begins; stored bodies and list items leave it out."""
        return f'{{"kind":"{self.kind}","apiVersion":"{self.api_version}",'.encode()

    @property
    def selectable(self) -> tuple[str, ...]:
        """The fields that a field selector may name."""
        return (*NAMES, *self.fields)


EMPTY_NODE = (
    ',"spec":{},"status":{"daemonEndpoints":{"kubeletEndpoint":{"Port":0}},"nodeInfo":{"machineID":"",'
    '"systemUUID":"","bootID":"","kernelVersion":"","osImage":"","containerRuntimeVersion":"","kubeletVersion":"",'
    '"kubeProxyVersion":"","operatingSystem":"","architecture":""}}'
)
EMPTY_EVENT = (
    ',"involvedObject":{},"source":{},"firstTimestamp":null,"lastTimestamp":null,"eventTime":null,'
    '"reportingComponent":"","reportingInstance":""'
)
EVENT_FIELDS = (
    *(f"involvedObject.{name}" for name in ("kind", "namespace", "name", "uid", "apiVersion", "fieldPath")),
    "reason",
    "type",
)

SERVICES = Resource(
    "",
    "services",
    "Service",
    ("svc",),
    status=True,
    creates=True,
    fields=("spec.clusterIP", "spec.type"),
    empty=',"spec":{},"status":{"loadBalancer":{}}',
)
NODES = Resource(
    "",
    "nodes",
    "Node",
    ("no",),
    namespaced=False,
    status=True,
    fields=("spec.unschedulable",),
    empty=EMPTY_NODE,
)
NAMESPACES = Resource(
    "",
    "namespaces",
    "Namespace",
    ("ns",),
    namespaced=False,
    status=True,
    fields=("status.phase",),
    empty=',"spec":{},"status":{}',
)
EVENTS = Resource("", "events", "Event", ("ev",), creates=True, fields=EVENT_FIELDS, empty=EMPTY_EVENT)
CONFIGMAPS = Resource("", "configmaps", "ConfigMap", ("cm",))
PODS = Resource(
    "",
    "pods",
    "Pod",
    ("po",),
    status=True,
    fields=("spec.nodeName", "status.phase"),
    empty=',"spec":{"containers":null},"status":{}',
)
SLICES = Resource(
    "discovery.k8s.io",
    "endpointslices",
    "EndpointSlice",
    generation=True,
    empty=',"addressType":"","endpoints":null,"ports":null',
)
LEASES = Resource(
    "coordination.k8s.io", "leases", "Lease", creates=True, unconditional=False, empty=',"spec":{}'
)

RESOURCES = (SERVICES, NODES, NAMESPACES, EVENTS, CONFIGMAPS, PODS, SLICES, LEASES)
BY_PATH = {(r.group, r.plural): r for r in RESOURCES}
BY_KIND = {(r.api_version, r.kind): r for r in RESOURCES}
GROUPS = tuple(sorted({r.group for r in RESOURCES if r.group}))
