# The verbs of podwire. Each does its own set-up; none needs another first.
PY := .venv/bin/python
export PYTHONDONTWRITEBYTECODE ?=

.PHONY: setup setup-tests demo vm-lab vm-scenarios test check bench lab image docs walks proto lock clean

setup:            ## Debian packages, virtual environment, pinned dependencies
	@scripts/setup

setup-tests:      ## and what tests and benchmarks run: containerd, podman, iperf3, the Go plugins
	@scripts/setup tests

demo: setup       ## three nodes, the sample application, scenarios A to F on real traffic
	@.venv/bin/podwire lab demo $(if $(KEEP),--keep) $(DEMO_ARGS)

vm-lab: setup     ## the same scenarios on virtual machines: image, boot, table; KEEP=1 leaves them running
	@scripts/setup vm
	@.venv/bin/podwire lab demo --driver qemu --name vm $(if $(KEEP),--keep) $(DEMO_ARGS)

vm-scenarios: setup ## what only machines can show: reboot, watchdog, WireGuard, other kernels; SCENARIOS chooses
	@scripts/setup vm
	@.venv/bin/podwire lab scenarios $(SCENARIOS)

test: setup-tests ## every test; ARGS: what pytest is to run (needs root: network namespaces)
	@scripts/test $(ARGS)

check: setup      ## ruff, mypy --strict, layering, size budgets, generated code is current
	@scripts/check

bench: setup-tests ## figures side by side: service programming, pod attachment
	@$(PY) -m bench $(ARGS)

lab: setup        ## a lab of three nodes that stays up
	@.venv/bin/podwire lab up

image:            ## the container image; IMAGE_ARGS go to podman build
	podman build --tag localhost/podwire:0.1.0 $(IMAGE_ARGS) --file deploy/image/Containerfile .

docs: setup       ## regenerate the generated pages of docs/
	@$(PY) scripts/docs

walks: setup-tests ## run the walks of docs/ in labs and write what they print
	@$(PY) scripts/walks

proto: setup      ## regenerate api/ from podwire.proto
	@scripts/proto api

lock: setup       ## pin the whole dependency closure with hashes
	@scripts/lock

clean:            ## what make itself made
	rm -rf .venv build dist *.egg-info
