"""A small but honest Kubernetes API server for tests: lists, watches, and faults on request.

    resources ── what kinds there are           store ── objects, versions, history
    rules ────── defaults and validation        server ─ HTTP: routing, lists, writes
    patches, selectors ── as the API has them   watching  one watch's stream
    generate ─── a large cluster, and changes   faults, control ── what goes wrong, and when

It runs as a process of its own (`python -m tests.kubeapi --help`), so that it costs the test no time. Its
semantics are those of https://kubernetes.io/docs/reference/using-api/api-concepts/. test_contract.py and
test_lists.py hold it to them, and run on a real kube-apiserver too where KUBEBUILDER_ASSETS names a folder
with one (and with etcd, or that is on PATH). Intended use:

    from tests.kubeapi import running

    with running.start(namespace="pwtest-1", bookmark_seconds=1) as api:     # None: this namespace
        api.kubeconfig(tmp_path / "kubeconfig")                              # api.url, api.token, api.ca_file
        api.create({"apiVersion": "v1", "kind": "Service", "metadata": {...}, "spec": {...}})
        api.patch("services", "web", {"metadata": {"labels": {"a": "b"}}}, namespace="default")
        api.delete("services", "web", namespace="default")
        api.fail(429, times=3, verb="list", path="/api/v1/services", retry_after=1)
        api.cut_watches(); api.stall_watches(); api.watch_life(1.0); api.half(verb="watch"); api.hang()
        api.down(); api.up(); api.restart(forget=True); api.compact(); api.clear()
        api.new_certificate(); api.set_tokens("one", "two")
        api.counters().verbs["list"]; api.counters().open_watches; api.requests()

    with running.start(generate={"services": 10_000, "endpoints": 10, "nodes": 5_000}) as api:
        api.churn(rate=1_000, seconds=60)                                    # in the server, not in the test

Faults work while the server is down: they go through a unix socket of their own. What it does not have:
controllers, admission, authorization, server-side apply, the schema (unknown fields stay), and kinds that
podwire does not ask for.
"""
