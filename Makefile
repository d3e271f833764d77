# `make demo` and `make test` set up all that they need, in .venv, from the hash-checked lists in requirements/.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
TEST_FLAGS ?=
TEST_WORKERS ?= 3
IMAGE ?= clipjob:latest
BUILD_FLAGS ?=

.PHONY: help demo test test-cluster storm lint format image push bench docs lock clean

help:  ## Show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14

demo: $(VENV)/run  ## Train a small model on 2465 real images, in about two minutes
	$(BIN)/clipjob demo

test: $(VENV)/dev  ## Run all tests, but for those that need a cluster
	$(BIN)/python -m pytest -n $(TEST_WORKERS) --dist loadfile --no-loadscope-reorder -m "not cluster" $(TEST_FLAGS)

test-cluster: $(VENV)/dev  ## The cases of the emulated Job on your cluster, KUBECONFIG=… CLIPJOB_TEST_IMAGE=registry/clipjob:tag
	$(BIN)/python -m pytest -m cluster $(TEST_FLAGS) tests/test_real_cluster.py

storm: $(VENV)/dev  ## The kill storm with 200 SIGKILLs
	$(BIN)/python -m pytest tests/test_kill_storm.py --kills 200 --timeout 7200

lint: $(VENV)/dev  ## Style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/dev  ## Bring the code into the project's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

image:  ## Build the container image, IMAGE=registry/clipjob:tag, BUILD_FLAGS="--build-arg LOCK=run-cu126.txt"
	docker build --build-arg VERSION=$$(sed -n 's/__version__ = "\(.*\)"/\1/p' job/__init__.py) \
		--build-arg REVISION=$$(git rev-parse HEAD) $(BUILD_FLAGS) --tag $(IMAGE) .

push:  ## Push it to the registry that IMAGE names
	docker push $(IMAGE)

bench: $(VENV)/dev  ## All benchmarks, tables to benchmarks/results
	$(BIN)/python -m benchmarks.pipeline --out benchmarks/results/pipeline.md
	$(BIN)/python -m benchmarks.scale --out benchmarks/results/scale.md
	$(BIN)/python -m benchmarks.storage --out benchmarks/results/storage.md
	$(BIN)/python -m benchmarks.checkpoint --out benchmarks/results/checkpoint.md
	$(BIN)/python -m benchmarks.ranks --out benchmarks/results/ranks.md
	$(BIN)/python -m benchmarks.startup --out benchmarks/results/startup.md
	$(BIN)/python -m benchmarks.overhead --out benchmarks/results/overhead.md
	$(BIN)/python -m benchmarks.train --out benchmarks/results/train.md
	$(BIN)/python -m benchmarks.step --out benchmarks/results/step.md
	$(BIN)/python -m benchmarks.memory --out benchmarks/results/memory.md
	$(BIN)/python -m benchmarks.demo --out benchmarks/results/demo.md
	$(BIN)/python -m benchmarks.quality --out benchmarks/results/quality.md
	$(BIN)/python -m benchmarks.methods --out benchmarks/results/methods.md

docs: $(VENV)/run  ## Write what is computed: configuration, scaling, dashboard, the operator's alerts, k8s/job.yaml
	$(BIN)/python docs/configuration.py > docs/configuration.md
	$(BIN)/python docs/scaling.py > docs/scaling.md
	$(BIN)/python monitoring/dashboard.py > monitoring/dashboard.json
	(cat k8s/components/podmonitor/header.txt; sed -n '/^groups:/,$$s/^/  /p' monitoring/alerts.yaml) \
		> k8s/components/podmonitor/prometheusrule.yaml
	cd k8s/base && (cat header.txt; for part in serviceaccount configmap job; do echo ---; cat $$part.yaml; done) > ../job.yaml

RESOLVE := uv pip compile --python-version 3.11 --generate-hashes --no-header --no-annotate --no-emit-index-url --no-emit-find-links -q
IN_IMAGE := --python-platform x86_64-manylinux_2_28 -c build/pins.txt

lock:  ## Resolve all dependencies anew (needs uv)
	$(RESOLVE) pyproject.toml --extra dev --universal --upgrade -o requirements/dev.txt
	echo clip-benchmark | $(RESOLVE) - --universal --no-deps --upgrade -o requirements/dev-alone.txt
	$(RESOLVE) pyproject.toml --extra hf --universal --upgrade -c requirements/dev.txt -o requirements/run.txt
	mkdir -p build
	sed -nE 's/^([a-z].*==[^\]*).*/\1/p' requirements/run.txt | grep -vE '^(torch|triton|nvidia|cuda)' > build/pins.txt
	$(RESOLVE) pyproject.toml --extra hf --upgrade $(IN_IMAGE) requirements/run-cu126.in -o requirements/run-cu126.txt
	for extra in gcsfs adlfs tensorboard; do echo $$extra | $(RESOLVE) - --upgrade $(IN_IMAGE) -o requirements/extra-$$extra.txt; done

clean:  ## Remove the environment and all caches
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache build *.egg-info

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "clipjob needs Python 3.11 or newer; name one with make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/run: requirements/run.txt pyproject.toml | $(VENV)/bin/python
	@echo "Installing torch, open_clip and their kin (about 3 GB to fetch, once) …"
	$(PIP) install --progress-bar on --require-hashes -r requirements/run.txt
	$(PIP) install --no-deps -e .
	touch $@

# What only its own scores are wanted of comes without its dependencies, among them downloaders of data sets.
$(VENV)/dev: requirements/dev.txt requirements/dev-alone.txt $(VENV)/run
	$(PIP) install --progress-bar on --require-hashes -r requirements/dev.txt
	$(PIP) install --progress-bar on --require-hashes --no-deps -r requirements/dev-alone.txt
	touch $@
