# The commands of this repository. A machine needs Python >= 3.11 with venv, a C++20 compiler and make; everything else
# comes from the package index that pip is configured for. `make help` lists the targets.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-builtin-rules

VENV ?= .venv
VENV_LOCK ?= .venv-lock
VENV_FUZZ ?= .venv-fuzz
VLLM_PYTHON ?= .venv-vllm/bin/python
CXX := $(if $(filter default undefined,$(origin CXX)),g++,$(CXX))
JOBS ?= $(shell nproc)
UNIT_JOBS ?= $(shell expr $(JOBS) + 1)  # some of them wait
PYTEST_ARGS ?=
DEMO_ARGS ?=
SIM_SEEDS ?= 1000
SIM_ARGS ?=
LOCK_ARGS ?= --upgrade
BENCHES ?= fetch failover stress idle index gossip faults ttft
BENCH_ARGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet --no-input
PYTEST := $(BIN)/python -m pytest $(PYTEST_ARGS)

# What is neither engine, nor cluster, nor needs a right or a wheel that a machine may lack.
UNIT := not e2e and not cluster and not nixl and not root and not deep

# The directories too: a file that is added or removed changes them.
NATIVE_SOURCES := CMakeLists.txt p2pkv/native p2pkv/index/core p2pkv/gossip/core p2pkv/gossip/simulator \
  $(wildcard p2pkv/native/* p2pkv/index/core/* p2pkv/gossip/core/* p2pkv/gossip/simulator/* third_party/xxhash/*)

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export NO_MKDOCS_2_WARNING := 1
# Compiled once, and not again at every start of an agent or a test's worker, whatever the caller's shell says.
export PYTHONDONTWRITEBYTECODE :=

# ---------------------------------------------------------------------------------------------------------- environment

.PHONY: setup
setup: $(VENV)/.stamp-package $(VENV)/.stamp-native ## build .venv: the package (editable), its C++ extensions, every tool

$(VENV)/.stamp-venv:
	@PYTHON="$(PYTHON)" scripts/make_venv.sh "$(VENV)"
	@touch $@

$(VENV)/.stamp-tools: requirements/lock.txt $(VENV)/.stamp-venv
	@echo "setup: installing the pinned tools (requirements/lock.txt)"
	@$(PIP) install --no-deps --require-hashes --only-binary :all: -r requirements/lock.txt  # complete: nothing to resolve
	@touch $@

# Editable, without CMake: the backend writes metadata, the p2pkv command and a path to this checkout, and nothing that
# slows imports down. The extensions are built beside it, straight into the tree, because the backend's own editable
# mode would either build inside the source directory or put an import hook before every start of the interpreter.
$(VENV)/.stamp-package: pyproject.toml $(VENV)/.stamp-tools
	@echo "setup: installing p2pkv (editable)"
	@$(PIP) install --no-build-isolation --no-deps --editable . -C wheel.cmake=false -C editable.mode=inplace
	@touch $@

# The build tree lies inside the venv: it belongs to that interpreter and goes away with it.
$(VENV)/.stamp-native: $(NATIVE_SOURCES) $(VENV)/.stamp-tools
	@command -v "$(firstword $(CXX))" >/dev/null || { echo "error: no C++ compiler ($(CXX))"; \
	  echo "hint: install g++ >= 12 or clang++ >= 15, or set CXX."; exit 2; } >&2
	@echo "setup: building the C++ extensions"
	@$(BIN)/cmake -S . -B $(VENV)/native -G Ninja --log-level=WARNING -DCMAKE_BUILD_TYPE=Release \
	  -DCMAKE_CXX_COMPILER="$(CXX)" -DCMAKE_MAKE_PROGRAM="$(abspath $(BIN))/ninja" \
	  -DPython_EXECUTABLE="$(abspath $(BIN))/python" >/dev/null
	@$(BIN)/cmake --build $(VENV)/native | grep -v -E '^\[[0-9]+/[0-9]+\] |^ninja: ' || [ $${PIPESTATUS[0]} -eq 0 ]
	@$(BIN)/cmake --install $(VENV)/native --prefix . >/dev/null
	@touch $@

.PHONY: nixl
nixl: $(VENV)/.stamp-nixl ## add NIXL to .venv (without the CUDA libraries that its wheels ask for)

$(VENV)/.stamp-nixl: requirements/nixl.txt $(VENV)/.stamp-tools
	@echo "setup: installing NIXL (requirements/nixl.txt)"
	@$(PIP) install --no-deps --only-binary :all: -r requirements/nixl.txt
	@touch $@

.PHONY: rivals
rivals: $(VENV)/.stamp-rivals ## add what `p2pkv bench fetch --rival` measures beside p2pkv to .venv

# Not what they declare: that is CUDA's torch once more, and servers that are not run.
$(VENV)/.stamp-rivals: requirements/rivals.txt $(VENV)/.stamp-nixl
	@echo "setup: installing rivals to measure (requirements/rivals.txt)"
	@$(PIP) install --no-deps --only-binary :all: -r requirements/rivals.txt
	@$(BIN)/python -c "import mooncake.store" 2>/dev/null || \
	  echo "warning: Mooncake does not load here: it needs libibverbs.so.1 (apt-get install libibverbs1)" >&2
	@touch $@

# Where no wheel of NIXL exists (another CPU, another libc), its tests are skipped, loudly.
.PHONY: nixl-if-there
nixl-if-there: setup
	@$(MAKE) --no-print-directory nixl || \
	  echo "warning: NIXL cannot be installed here: whatever needs it is left out" >&2

.PHONY: vllm
vllm: ## build the environment of the engine that the demo and the end-to-end tests run
	@scripts/setup-vllm.sh

.PHONY: hooks
hooks: setup ## install the pre-commit hooks
	@$(BIN)/pre-commit install

# ---------------------------------------------------------------------------------------------------------------- tests

# pytest exits 5 when a selection holds no test: that is not a failure of the others.
define run_pytest
	@$(PYTEST) $(1) || { code=$$?; [ $$code -eq 5 ]; }
endef

.PHONY: test
test: setup nixl-if-there test-unit test-deep test-integration ## set up everything and run all tests but the real engines

.PHONY: test-unit
test-unit: setup ## unit tests, in parallel
	$(call run_pytest,tests/unit -n $(UNIT_JOBS) --dist worksteal -m "$(UNIT)")

.PHONY: test-deep
test-deep: setup ## models and fuzzed decoders: searches that take seconds each, in parallel
	$(call run_pytest,tests/unit -n $(UNIT_JOBS) --dist worksteal -m deep)

.PHONY: test-integration
test-integration: setup ## contract suites and real agents on this host
	$(call run_pytest,tests/unit -m "not e2e and not deep and not ($(UNIT))")
	$(call run_pytest,tests --ignore=tests/unit --ignore=tests/e2e --ignore=tests/netns --ignore=tests/sim -m "not e2e" \
	  --durations=10)

.PHONY: sim
sim: setup ## the gossip under virtual time: chaos with and without its guards, and a small cell's promises
	@$(PYTEST) tests/sim -n $(JOBS)
	@$(BIN)/p2pkv sim --chaos $(SIM_SEEDS) --check
	@$(BIN)/p2pkv sim --nodes 100 --pair-seconds 1e6 --stall 5:16 --partition 300 --restart 20 --check $(SIM_ARGS)

.PHONY: test-netns
test-netns: setup ## eight real agents on hosts of their own, with loss and partitions (needs root, iproute2, nftables)
	@$(PYTEST) tests/netns -s

# The two environments do not depend on each other: built side by side, a first run is shorter by a minute.
.PHONY: environments
environments:
	@$(MAKE) --no-print-directory -j2 nixl-if-there vllm

.PHONY: test-e2e
test-e2e: environments test-connectors ## two real vLLM replicas
	@$(PYTEST) tests/e2e -m e2e --durations=0

.PHONY: test-connectors
test-connectors: environments ## the connectors' unit tests against the engine's own types, in its environment
	@$(VLLM_PYTHON) -m pytest $(PYTEST_ARGS) tests/unit/connectors

# --------------------------------------------------------------------------------------------------------------- checks

.PHONY: lint
lint: setup ## style, formatting, import contracts, and what must not be in files
	@code=0; \
	$(BIN)/ruff check . || code=1; \
	$(BIN)/ruff format --check --quiet . || { echo "not formatted (make format):"; code=1; \
	  $(BIN)/ruff format --check --output-format concise . || true; }; \
	$(BIN)/lint-imports --no-logo || code=1; \
	$(BIN)/python scripts/check_tree.py || code=1; \
	exit $$code

.PHONY: format
format: setup ## rewrite files in the one style
	@$(BIN)/ruff check --fix --exit-zero --quiet .
	@$(BIN)/ruff format .

.PHONY: types
types: setup ## mypy --strict
	@$(BIN)/mypy

.PHONY: import-cost
import-cost: setup ## importing p2pkv.client stays light; shows what it costs
	@$(BIN)/python scripts/check_client_import.py

.PHONY: docs
docs: setup ## build the documentation into site/
	@$(BIN)/mkdocs build --strict

.PHONY: check
check: lint types import-cost docs ## every check that runs no test

# ----------------------------------------------------------------------------------------------------------------- runs

.PHONY: demo
demo: environments ## one prefix, two vLLM replicas; DEMO_ARGS="--transport tcp ..."
	@$(BIN)/p2pkv demo $(DEMO_ARGS)

# What a machine lacks a right or an environment for is left out, loudly. Quick runs are kept apart: what is published is
# not overwritten by them, and neither by a run that broke off.
.PHONY: bench
bench: setup nixl-if-there ## measure everything that can run here; BENCHES="fetch" BENCH_ARGS="--quick"
	@into=results; case " $(BENCH_ARGS) " in *" --quick "*) into=results/quick;; esac; mkdir -p $$into; left=""; \
	for name in $(BENCHES); do \
	  why=""; \
	  case $$name in faults|ttft) \
	    why=$$($(BIN)/python -c "from p2pkv import netns; print(netns.missing(rates=True))");; esac; \
	  case $$name in ttft|busy) \
	    [ -x "$${P2PKV_VLLM_PYTHON:-$(VLLM_PYTHON)}" ] || why="$${why:+$$why, }no vLLM here (make vllm)";; esac; \
	  if [ -n "$$why" ]; then \
	    left="$${left}warning: LEFT OUT: $$name: $$why\n"; printf '%b' "$$left" >&2; continue; \
	  fi; \
	  $(BIN)/p2pkv bench $$name --json $(BENCH_ARGS) | tee $$into/$$name.json.part; \
	  mv $$into/$$name.json.part $$into/$$name.json; \
	done; \
	[ $$into != results ] || $(BIN)/python scripts/write_benchmarks.py; \
	printf '%b' "$$left" >&2

.PHONY: fuzz-http
fuzz-http: setup $(VENV_FUZZ)/.stamp ## schemathesis against an agent's HTTP endpoint, in an environment of its own
	@$(BIN)/python scripts/fuzz_http.py $(VENV_FUZZ)/bin/schemathesis

.PHONY: fuzz-index
fuzz-index: ## a minute of libFuzzer on the index's core (needs clang++)
	@scripts/fuzz.sh index

.PHONY: fuzz-gossip
fuzz-gossip: ## a minute of libFuzzer on the gossip's core (needs clang++)
	@scripts/fuzz.sh gossip

$(VENV_FUZZ)/.stamp: requirements/schemathesis.txt
	@PYTHON="$(PYTHON)" scripts/make_venv.sh $(VENV_FUZZ)
	@$(VENV_FUZZ)/bin/python -m pip install --quiet --no-deps --only-binary :all: -r requirements/schemathesis.txt
	@touch $@

# ---------------------------------------------------------------------------------------------------------- maintenance

.PHONY: lock
lock: ## resolve requirements/lock.txt anew from pyproject.toml and requirements/build.in (LOCK_ARGS=: only what is new)
	@[ -x $(VENV_LOCK)/bin/uv ] || { PYTHON="$(PYTHON)" scripts/make_venv.sh $(VENV_LOCK); \
	  $(VENV_LOCK)/bin/python -m pip install --quiet uv; }
	@$(VENV_LOCK)/bin/uv pip compile --quiet --universal --python-version 3.11 $(LOCK_ARGS) --generate-hashes \
	  --no-annotate --no-header --extra test --extra dev --extra docs --extra bench --extra tokenizers \
	  pyproject.toml requirements/build.in -o requirements/lock.txt

.PHONY: clean
clean: ## remove what was built, and the environments
	@rm -rf build dist site results $(VENV) $(VENV_LOCK) $(VENV_FUZZ) .venv-vllm* .mypy_cache .ruff_cache .pytest_cache \
	  .hypothesis .import_linter_cache p2pkv/*.so p2pkv/index/*.so p2pkv/gossip/*.so
	@find p2pkv tests scripts -name __pycache__ -type d -prune -exec rm -rf {} +

.PHONY: help
help: ## this list
	@awk -F ':.*## ' '/^[a-z][a-z0-9-]*:.*## / { printf "  %-18s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
