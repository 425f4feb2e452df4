# `make demo` and `make test` do all their own set-up, in a virtual environment (.venv, made once).
#   VENV=path            use this environment instead; packages in it are kept as they are where they satisfy pyproject.toml
#   PIP_CONSTRAINT=file  versions to install; by default .ci/constraints.txt for a .venv on a machine without a GPU
#   PYTHON=python3       the Python that makes the environment; for gpu-*, the one that runs

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help demo test test-all lint format bench verify audit clean cuda

# Compiled bytecode halves the time to import torch.
unexport PYTHONDONTWRITEBYTECODE

PYTHON ?= python3
ifndef VENV
VENV := .venv
ifeq ($(wildcard /dev/nvidia0),)
export PIP_CONSTRAINT ?= $(abspath .ci/constraints.txt)
endif
endif
# Without a GPU an install has no use for CUDA C++ kernels: `make cuda` compiles them apart.
ifeq ($(wildcard /dev/nvidia0),)
export MMFAST_BUILD ?= none
endif
BIN := $(VENV)/bin
DEV := $(VENV)/.mmfast-dev
DEMO := $(VENV)/.mmfast-demo
TRITON36 := $(abspath $(VENV))/triton36
WORKERS ?= 2
# Benchmarks that hold a bound on a CPU: never slower than the module replaced, at most 10 us added to a call.
TIME_BOUNDS := benchmarks/bench_layer_norm.py benchmarks/bench_registration.py benchmarks/bench_clip_loss.py \
	benchmarks/bench_q_sample.py benchmarks/bench_ddim_step.py
# Tests of no kernel.
PLAIN := not gpu and not triton and not cuda and not bf16 and not timing
# To collect the others takes half a minute.
WITH_CUDA = $$(grep -rlE 'ALL_BACKENDS|CUDA|mark\.cuda' tests --include='test_*.py')
WITH_KERNELS = $$(grep -rlE 'triton|BACKENDS|SERVED' tests --include='test_*.py')

help:  ## list the commands
	@grep -E '^[a-z0-9-]+:.*## ' Makefile | awk -F ':.*## ' '{printf "  make %-14s %s\n", $$1, $$2}'

# Run the CUDA C++ kernels' tests on the CPU: $(call emulate,plain|address|thread,pytest's arguments). What
# csrc/build.py prints are the extension and, after it, the variables that a sanitizer needs.
define emulate
built=$$($(BIN)/python csrc/build.py emulated $(if $(filter-out plain,$(1)),--sanitize $(1))) && set -- $$built && \
env "$${@:2}" MMFAST_EXTENSION="$$1" $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(2) $(WITH_CUDA) $(PYTEST_ARGS)
endef

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(DEMO): pyproject.toml setup.py | $(BIN)/python
	@echo "installing mmfast and what the demo needs into $(VENV) ..."
	$(BIN)/python -m pip install -qq --no-compile -e '.[demo]'
	@touch $@

$(DEV): pyproject.toml setup.py | $(BIN)/python
	@echo "installing mmfast, its peers and test tools into $(VENV) ..."
	$(BIN)/python -m pip install -qq --no-compile -e '.[dev]'
	@touch $@ $(DEMO)

demo: $(DEMO)  ## train a small ViT, a small CLIP and a small diffusion model on real images, and look at what they do
	$(BIN)/python -m mmfast.cli demo vit --output demo-output
	$(BIN)/python -m mmfast.cli demo clip --output demo-output
	$(BIN)/python -m mmfast.cli demo diffusion --output demo-output

test: $(DEV) cuda  ## run the tests: PyTorch paths and parity, Triton kernels in their interpreter, CUDA C++ kernels on the CPU
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m '$(PLAIN) and not slow' $(PYTEST_ARGS)
	$(BIN)/python -m pytest -m timing $$(grep -rl mark.timing tests) $(PYTEST_ARGS)
	$(BIN)/python -m pytest $(TIME_BOUNDS) -o python_files='bench_*.py' --import-mode=importlib -k 'slower or adds'
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m 'triton and not gpu and not bf16 and not slow' \
	  $(WITH_KERNELS) $(PYTEST_ARGS)
	$(call emulate,plain,-m 'cuda and not gpu and not slow')
	$(call emulate,address,-m 'sanitized and not gpu and not slow')
	$(call emulate,thread,-m 'sanitized and not gpu and not slow')

test-all: test  ## the tests, those marked slow, and the kernels again: Triton 3.6 (the pair of torch 2.11), all sanitizers and orders
	$(BIN)/python -m pytest -n $(WORKERS) -m '$(PLAIN) and slow' $(PYTEST_ARGS)
	$(call emulate,plain,-m 'cuda and not gpu and slow')
	export MMFAST_THREAD_ORDER=1 && $(call emulate,plain,-m 'cuda and not gpu')
	export MMFAST_THREAD_ORDER=3 && $(call emulate,plain,-m 'cuda and not gpu')
	$(call emulate,address,-m 'cuda and not gpu')
	$(call emulate,thread,-m 'cuda and not gpu')
	test -d $(TRITON36) || env -u PIP_CONSTRAINT $(BIN)/python -m pip install -qq --no-compile --no-deps --target $(TRITON36) triton==3.6.0
	PYTHONPATH=$(TRITON36) $(BIN)/python -m pytest tests/test_audit.py $(PYTEST_ARGS)
	PYTHONPATH=$(TRITON36) TRITON_INTERPRET=1 $(BIN)/python -m pytest -n $(WORKERS) -m 'triton and not gpu and not bf16' $(PYTEST_ARGS)
	PYTHONPATH=$(TRITON36) $(BIN)/mmfast audit

cuda: $(DEV)  ## compile the CUDA C++ kernels with nvcc, where there is one, and look at what it made of them
	@if $(BIN)/python -c 'import runpy, sys; sys.exit(runpy.run_path("csrc/build.py")["find_nvcc"]() is None)'; then \
	  built=$$($(BIN)/python csrc/build.py cuda) && $(BIN)/mmfast audit --cuda --extension "$$built"; \
	else echo "cuda: there is no nvcc, so the CUDA C++ kernels were not compiled for GPUs (they run on the CPU below)"; fi

lint: $(DEV)  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@# A type checker cannot see that kernels/ is mmfast.kernels: it checks an installed copy.
	rm -rf build/lib build/bdist* $(VENV)/typecheck
	MMFAST_BUILD=none $(BIN)/python -m pip install -qq --no-compile --no-deps --target $(VENV)/typecheck .
	rm -rf build/lib build/bdist*
	$(BIN)/mypy --config-file pyproject.toml $(VENV)/typecheck/mmfast

format: $(DEV)  ## rewrite the sources in the house format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(DEV)  ## run the benchmarks on this machine, small shapes on a CPU
	$(BIN)/mmfast bench

verify: $(DEV)  ## grade every kernel against its float64 reference
	$(BIN)/mmfast verify

audit: $(DEV)  ## compile every kernel for sm_80, sm_90 and sm_100: registers, spills, vector loads
	$(BIN)/mmfast audit

# GPU commands. They use the Python that is there, with its torch and Triton, and no network: each under 10 minutes.
# PYTHON=python3          the Python that has torch for the GPU
# RESULTS=folder          where gpu-bench puts its CSV, besides OUT if that variable is set
# GPU_WORKERS=4           processes that share the GPU in gpu-check (with pytest-xdist)
# SANITIZE=memcheck       gpu-check begins with the CUDA C++ kernels under compute-sanitizer; racecheck, synccheck, initcheck
GPU_WORKERS ?= 4
RESULTS ?= benchmarks/results

.PHONY: gpu-check gpu-bench gpu-ready

gpu-ready:
	@$(PYTHON) -c 'import sys; sys.exit(None if __import__("importlib.util").util.find_spec("torch") else \
	  "gpu: $(PYTHON) has no torch; name one that has: make PYTHON=... (nothing was run)")'
	@$(PYTHON) -c 'import sys, torch; sys.exit(None if torch.cuda.is_available() else \
	  f"gpu: torch {torch.__version__} finds no GPU (nothing was run)")'
	@$(PYTHON) -c 'import mmfast, mmfast.benchmarks, os, sys; \
	  sys.exit(os.path.realpath(os.path.dirname(mmfast.__file__)) != os.path.realpath("mmfast"))' 2>/dev/null || { \
	  echo "gpu: installing mmfast from this folder, without network"; \
	  MMFAST_BUILD=none $(PYTHON) -m pip install --no-index --no-deps --no-build-isolation -q -e .; }
	@$(PYTHON) csrc/build.py cuda --output mmfast || echo "gpu: going on without CUDA C++ kernels"
	@$(PYTHON) -c 'import torch; print("gpu:", torch.cuda.get_device_name(), "torch", torch.__version__)'

gpu-check: gpu-ready  ## on a GPU: every test of a kernel, then every op of every backend against float64
	$(if $(SANITIZE),compute-sanitizer --tool $(SANITIZE) --error-exitcode 1 $(PYTHON) -m pytest --device cuda -m sanitized)
	$(PYTHON) -m pytest --device cuda -m 'gpu or triton or cuda or bf16' \
	  $$($(PYTHON) -c 'import importlib.util as u; print("-n $(GPU_WORKERS)" if u.find_spec("xdist") else "")') $(PYTEST_ARGS)
	$(PYTHON) -m mmfast.cli verify --device cuda
	@echo "gpu-check: tests and verify passed"

gpu-bench: gpu-ready  ## on a GPU: time every op and model beside its peers, append to $(RESULTS)
	$(PYTHON) -m mmfast.cli bench --device cuda --results $(RESULTS) --budget 480 \
	  $(if $(OUT),--csv $(OUT)/gpu-bench.csv) $(BENCH_ARGS)
	@if [ -n "$${OUT:-}" ]; then cp $(RESULTS)/*.csv "$$OUT"/; echo "gpu-bench: copied $(RESULTS)/*.csv to $$OUT"; fi
	@echo "gpu-bench: results are in $(RESULTS)"

clean:  ## remove what the commands above made
	rm -rf .venv build dist mmfast/_cuda*.so *.egg-info demo-output .benchmarks .pytest_cache .mypy_cache .ruff_cache
