# `make` alone lists what there is. Every target sets up what it needs.

SHELL := /bin/bash
VENV := .venv
ROOT := runs
# The interpreter of the environment that is there, else the first on PATH that will do. The base interpreter in either case:
# an environment cannot be made anew with its own.
PYTHON ?= $(shell for python in $(VENV)/bin/python python3 python3.13 python3.12 python3.11; do \
	$$python -c 'import sys; (3, 11) <= sys.version_info[:2] <= (3, 13) or sys.exit(1); print(sys._base_executable)' 2>/dev/null \
	&& break; done)
BUILDS := cpu gpu tpu
BUILDER := $(firstword $(notdir $(shell command -v docker; command -v buildah)))
COMMIT = $(shell git rev-parse --short=12 HEAD)
IN := . $(VENV)/bin/activate &&

.DEFAULT_GOAL := help
.PHONY: help setup tpu-check torch demo test test-pythons test-slow check rehearse images format lock clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# TENSORFLOW=cpu, gpu or tpu says which build of TensorFlow to have; otherwise what the machine can use, see trainer/hardware.py.
setup: ## virtual environment in .venv, exactly as locked, with TensorFlow for this machine
	@test -n "$(PYTHON)" || { echo "error: no Python 3.11, 3.12 or 3.13 found; name one with make PYTHON=/path/to/python3.13"; exit 2; }
	@$(PYTHON) requirements/install.py $(VENV) $(TENSORFLOW)

tpu-check: .venv-tpu/.ready ## the TPU's compiler, for sogclr plan, in an environment of its own

.venv-tpu/.ready: requirements/tpu-check.lock | setup
	$(PYTHON) -m venv --clear --without-pip .venv-tpu
	$(IN) uv pip install --quiet --python .venv-tpu/bin/python --no-deps --compile-bytecode --require-hashes --requirement $<
	@touch $@

# Without it, tests of what PyTorch computes skip, and imports and exports are compared by TensorFlow.
torch: setup ## PyTorch, for the tests and for sogclr import; a build for CPUs is enough
	$(IN) python -m pip install --quiet --disable-pip-version-check torch==2.13.0

demo: setup ## the whole pipeline on photographs, about five minutes on two cores
	$(IN) sogclr run --preset demo --root $(ROOT)

test: setup ## the tests to run all day
	$(IN) pytest

check: setup ## format, lint, types, import rules, all tests but those of rehearse and the slow: what a commit must pass
	$(IN) ruff format --check .
	$(IN) ruff check .
	$(IN) mypy trainer eval beam_jobs components pipelines
	$(IN) lint-imports
	$(IN) pytest -m 'not cloud and not slow'

test-pythons: ## make test with each Python from 3.11 to 3.13 that is found, each in an environment of its own
	@.ci/pythons

test-slow: setup ## minutes and gigabytes: the locks of GPU and TPU installed, an image built
	$(IN) pytest -n 0 -m slow

# TROUBLE='NAME ...' has things go wrong on the way, TROUBLE=all everything; MORE are further options of tests/vertex/rehearse.py.
rehearse: setup ## a whole job on Vertex AI, on loopback servers: docs/vertex.md's first run, about five minutes; needs root
	$(IN) pytest -m cloud
	$(IN) PYTHONPATH=tests python -m vertex.rehearse $(if $(TROUBLE),--trouble $(TROUBLE)) $(MORE)

# IMAGES names the repository, as in REGION-docker.pkg.dev/PROJECT/sogclr; push=yes sends them there.
images: ## container images of this commit, sogclr-cpu, sogclr-gpu and sogclr-tpu
	@test -n "$(BUILDER)" || { echo "error: neither docker nor buildah is here"; exit 2; }
	@test -z "$$(git status --porcelain)" || { echo "error: the sources differ from the commit: commit them first"; exit 2; }
	@test -z "$(push)" || test -n "$(IMAGES)" || { echo "error: push=yes needs IMAGES=REPOSITORY"; exit 2; }
	set -e; for build in $(BUILDS); do \
		name=$(if $(IMAGES),$(IMAGES)/)sogclr-$$build:$(COMMIT); \
		$(BUILDER) build --build-arg BUILD=$$build --build-arg COMMIT=$$(git rev-parse HEAD) $(BUILD_OPTIONS) --tag $$name .; \
		$(if $(push),$(BUILDER) push $$name;) echo $$name; \
	done

format: setup ## format the code and mend what the linter can
	$(IN) ruff format . && ruff check --fix .

COMPILE = uv pip compile $(UPGRADE) --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-annotate \
	--custom-compile-command "make lock"

# All is resolved together first, so that the locks agree. What is locked stays where it can; UPGRADE=--upgrade renews all.
lock: setup ## resolve the dependencies anew into requirements/
	@set -e; $(IN) all=$$(mktemp) && trap "rm $$all" EXIT && cat requirements/cpu.lock requirements/dev.lock > $$all; \
	$(COMPILE) --extra cpu --extra build --group dev --output-file $$all pyproject.toml; \
	for build in $(BUILDS); do \
		$(COMPILE) --extra $$build --extra build --constraint $$all --output-file requirements/$$build.lock pyproject.toml; \
	done; \
	$(COMPILE) --group dev --constraint $$all --output-file requirements/dev.lock; \
	$(COMPILE) --group tpu-check --output-file requirements/tpu-check.lock

clean: ## remove the virtual environment and caches, never runs
	rm -rf $(VENV) .venv-tpu .venv-3.* build *.egg-info .mypy_cache .pytest_cache .ruff_cache .import_linter_cache
