# `make` alone lists what there is. Every target sets up what it needs.

SHELL := /bin/bash
VENV := .venv
ROOT := runs
# The interpreter that an active virtual environment was made with: .venv cannot be made anew with its own.
PYTHON ?= $(shell for python in python3 python3.12 python3.11; do \
	$$python -c 'import sys; (3, 11) <= sys.version_info[:2] < (3, 13) or sys.exit(1); print(sys._base_executable)' 2>/dev/null \
	&& break; done)
BUILDS := cpu gpu tpu
BUILDER := $(firstword $(notdir $(shell command -v docker; command -v buildah)))
COMMIT = $(shell git rev-parse --short=12 HEAD)
IN := . $(VENV)/bin/activate &&
PYTEST := pytest -n 2 --dist loadfile --no-loadscope-reorder

.DEFAULT_GOAL := help
.PHONY: help setup tpu-check demo test check test-images images format lock clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(VENV)/.ready ## virtual environment in .venv, exactly as locked

$(VENV)/.ready: requirements.lock pyproject.toml
	@test -n "$(PYTHON)" || { echo "error: no Python 3.11 or 3.12 found; name one with make PYTHON=/path/to/python3.12"; exit 2; }
	@$(PYTHON) -c 'import ensurepip, venv' || { echo "error: $(PYTHON) cannot make virtual environments; on Debian: apt-get install python3-venv"; exit 2; }
	$(PYTHON) -m venv --clear $(VENV)
	@# pip fetches uv alone, as locked, and uv the rest: in a fraction of pip's time.
	$(IN) pip install --quiet --disable-pip-version-check --no-deps --require-hashes \
		--requirement <(sed -n '/^uv==/,/[^\\]$$/p' requirements.lock)
	$(IN) uv pip install --quiet --no-deps --require-hashes --requirement requirements.lock
	$(IN) uv pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

tpu-check: .venv-tpu/.ready ## the TPU's compiler, for sogclr plan, in an environment of its own

.venv-tpu/.ready: requirements-tpu-check.lock | setup
	$(PYTHON) -m venv --clear --without-pip .venv-tpu
	$(IN) uv pip install --quiet --python .venv-tpu/bin/python --no-deps --require-hashes --requirement requirements-tpu-check.lock
	@touch $@

demo: setup ## the whole pipeline on photographs, about five minutes on two cores
	$(IN) sogclr run --preset demo --root $(ROOT)

test: setup ## the tests
	$(IN) $(PYTEST)

check: setup ## format, lint, types, import rules, tests: what a commit must pass
	$(IN) ruff format --check .
	$(IN) ruff check .
	$(IN) mypy trainer eval beam_jobs components pipelines
	$(IN) lint-imports
	$(IN) $(PYTEST)

test-images: setup ## what the images are made of, slow: TensorFlow for TPUs in an environment of its own, a build
	$(IN) pytest -n 0 -m slow tests/test_images.py

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

lock: setup ## resolve the dependencies anew into requirements.lock and those of the images
	$(IN) uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-annotate \
		--extra cpu --extra dev --custom-compile-command "make lock" --output-file requirements.lock pyproject.toml
	set -e; $(IN) for build in $(BUILDS); do \
		uv pip compile --quiet --python-platform x86_64-manylinux_2_31 --python-version 3.11 --generate-hashes --no-emit-index-url \
			--no-annotate --extra $$build --extra image --constraint requirements.lock --custom-compile-command "make lock" \
			--output-file requirements-$$build.lock pyproject.toml; \
	done
	$(IN) uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-annotate \
		--group tpu-check --custom-compile-command "make lock" --output-file requirements-tpu-check.lock

clean: ## remove the virtual environment and caches, never runs
	rm -rf $(VENV) .venv-tpu build *.egg-info .mypy_cache .pytest_cache .ruff_cache .import_linter_cache
