# `make demo` and `make test` set up everything they need from a bare clone; `make help` lists the targets.

PYTHON   ?= python3
VENV     := .venv
BIN      := $(VENV)/bin
PIP      := $(BIN)/python -m pip --disable-pip-version-check install --quiet -c constraints.txt
# Options for pip, such as another package index; TEST and BENCH take arguments for pytest.
PIPFLAGS ?=
TEST     ?=
BENCH    ?=
WORKERS  ?= 2
GPU_WORKERS ?= 6
# The interpreter of this version is what the kernels are tested with; torch for CUDA brings its own.
TRITON   ?= 3.6.0

SOURCES  := pyproject.toml constraints.txt setup.py $(wildcard csrc/*.cpp csrc/*.h csrc/*/*.cpp csrc/*/*.h)
READY    := $(VENV)/.ready
LINTERS  := $(VENV)/.linters

.DEFAULT_GOAL := help
.PHONY: help setup demo test interp sanitize check fix bench aot gpu-check gpu-test gpu-bench clean

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

demo: $(READY)  ## train, prune, prove, lower and report the Fashion-MNIST network
	$(BIN)/prunekern run fashion-mnist

test: $(READY)  ## run the tests (TEST="tests/unit -k im2col" for some of them)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) $(TEST)
	$(if $(TEST),,@$(MAKE) --no-print-directory interp)

# A process of its own: whether a kernel is interpreted is settled when it is imported. Without triton (there is none for
# macOS) nothing is collected, which pytest tells by its status 5.
interp: $(READY)  ## run the GPU kernels' tests in Triton's interpreter, on CPU tensors
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) tests/interp || [ $$? -eq 5 ]

# In a copy, so that the checkout's own binary stays as it is. Python itself has no sanitizer, so the runtime is
# preloaded; memory that Python never gives back is no leak of ours. Masked loads of AVX are not watched, those of
# `portable` are.
SANITIZED  := build/sanitized
SANITIZERS := -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -O1 -g1
ENGINE     := tests/property/test_conv_fuzz.py $(wildcard tests/unit/test_cpu_*.py tests/unit/test_planar.py \
              tests/unit/test_winograd.py tests/unit/test_kernels.py)
LIBRARY     = $$($${CXX:-g++} -print-file-name=$(1))

sanitize: export PRUNEKERN_CXXFLAGS := $(SANITIZERS)
sanitize: export PRUNEKERN_BUILD := cpp
sanitize: $(READY)  ## run the C++ engine's tests under the address and the undefined-behaviour sanitizer
	@mkdir -p $(SANITIZED)
	@rm -rf $(SANITIZED)/csrc $(SANITIZED)/tests
	@tar -c --exclude='_C*' --exclude=__pycache__ csrc prunekern tests setup.py pyproject.toml README.md LICENSE \
	    | tar -x -C $(SANITIZED)
	@cd $(SANITIZED) && $(CURDIR)/$(BIN)/python setup.py -q build_ext --inplace
	@grep -q __asan_init $(SANITIZED)/prunekern/_C*.so
	cd $(SANITIZED) && LD_PRELOAD="$(call LIBRARY,libasan.so) $(call LIBRARY,libstdc++.so)" OMP_NUM_THREADS=1 \
	    ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 UBSAN_OPTIONS=print_stacktrace=1 PRUNEKERN_FUZZ=0.1 \
	    $(CURDIR)/$(BIN)/python -m pytest -q -n $(WORKERS) $(ENGINE)

check: $(READY) $(LINTERS)  ## lint and type-check
	$(BIN)/ruff check .
	$(BIN)/mypy

fix: $(READY) $(LINTERS)  ## repair what the linter can repair
	$(BIN)/ruff check --fix .

bench: $(READY)  ## measure: the table of targets, cost against channels, then the pytest-benchmark suites
	$(BIN)/python bench/latency.py --device cpu --threads 1,2 --batches 1,8,64
	$(BIN)/python bench/smooth.py
	$(BIN)/python -m pytest bench --benchmark-only $(BENCH)

aot: $(READY)  ## compile every shipped GPU kernel for chips that need not be there, and write bench/results/aot.md
	$(BIN)/python bench/aot.py --workers $(WORKERS)

# The machine's own Python, torch and triton: nothing is installed, and pytest may be missing.
gpu-check: gpu-test gpu-bench  ## test and measure on this machine's GPU, with its own Python

gpu-test gpu-bench: export PYTHONPATH := $(CURDIR):$(CURDIR)/kernels:$(PYTHONPATH)
NO_GPU = $$($(PYTHON) -c 'import torch; print("" if torch.cuda.is_available() else "torch finds no CUDA device")' 2>&1 \
    | tail -n 1)

gpu-test:  ## the first half of gpu-check: tests (several at once where pytest-xdist is there)
	@reason=$(NO_GPU); \
	if [ -n "$$reason" ]; then echo "gpu-check: SKIPPED, nothing was checked: $$reason."; exit 0; fi; \
	if ! $(PYTHON) -c 'import pytest' 2>/dev/null; then echo "gpu-check: tests skipped: $(PYTHON) has no pytest."; exit 0; fi; \
	workers=$$($(PYTHON) -c 'import xdist' 2>/dev/null && echo "-n $(GPU_WORKERS)"); \
	$(PYTHON) -m pytest -m gpu $$workers --durations=10 $(if $(TEST),$(TEST),tests/gpu)

gpu-bench:  ## the second half: small networks, dense and pruned, against the best that runs there
	@reason=$(NO_GPU); \
	if [ -n "$$reason" ]; then echo "gpu-check: SKIPPED, nothing was measured: $$reason."; exit 0; fi; \
	$(PYTHON) bench/latency.py --device cuda $(if $(BENCH),$(BENCH),--models fashion resnet20 --batches 1 64 \
	    --precisions tf32 fp16 --seconds 0.5 --compile-limit 60)

setup: $(READY)  ## create .venv and install the package into it

$(READY): $(SOURCES)
	@$(PYTHON) -c 'import sys; v = sys.version_info; \
	    sys.exit(0 if v >= (3, 11) else "prunekern needs Python 3.11 or newer, and $(PYTHON) is %d.%d. " \
	    "Name another: make PYTHON=python3.12 ..." % v[:2])'
	@[ -x $(BIN)/python ] || $(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	    echo "No virtual environment could be made: install Python's venv module (python3-venv on Debian)."; exit 1; }
	@echo "Installing torch and the package into $(VENV) ..."
	@$(PIP) $(PIPFLAGS) torch 'setuptools>=77' wheel
	@$(PIP) $(PIPFLAGS) --no-build-isolation -e '.[test,report,zoo]'
	@$(BIN)/python -c 'import triton' 2>/dev/null || $(PIP) $(PIPFLAGS) triton==$(TRITON) \
	    || echo "triton $(TRITON) cannot be installed here: tests of the GPU kernels are left out."
	@$(BIN)/python -c 'from prunekern.kernels import unavailable as why; \
	    print("C++ extension:", why() or "built and loaded")'
	@touch $@

$(LINTERS): constraints.txt $(READY)
	@$(PIP) $(PIPFLAGS) ruff mypy
	@touch $@

clean:  ## remove what was built and cached, but not the data, reports or .venv
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks $(READY)
	rm -f prunekern/_C*.so prunekern/_C.reason
	find . -name .venv -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
