# Every target does its own set-up in $(VENV); a second call skips what is done. Read README.md first.

PYTHON ?= python3
VENV ?= .venv
GPU_VENV ?= .venv-gpu
CXX ?= g++
JOBS ?= 2
ARGS ?=
METHOD ?=

export CXX
export MAX_JOBS ?= $(JOBS)
export PIP_DISABLE_PIP_VERSION_CHECK := 1

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --constraint constraints.txt
DONE := $(VENV)/.peftk
GPU_DONE := $(GPU_VENV)/.peftk
TYPES := build/types
GPU_PIP := $(GPU_VENV)/bin/python -m pip install --no-index --no-build-isolation --no-deps --editable .
SOURCES := setup.py pyproject.toml peftk/_version.py $(wildcard csrc/*.h csrc/*.cpp csrc/cpu/* csrc/cuda/*)

.DEFAULT_GOAL := help
.PHONY: help demo types test test-long test-peft test-matrix bench test-gpu bench-gpu lint format doctor setup clean

help:  ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-9s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(DONE)-demo  ## Train, merge and save an adapter on a real model; METHOD=oft, ARGS=--all, ARGS=--images
	$(BIN)/python -m peftk demo $(if $(METHOD),--method $(METHOD)) $(ARGS)

# One thread for each of the workers, or they would take the cores from each other.
test: $(DONE)-test types  ## Check style and types and run every test; ARGS="-k cayley" and the like
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadgroup -q $(ARGS)

test-long: $(DONE)-test  ## Run the tests that take minutes: thousands of damaged files, of interruptions
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m long -n $(JOBS) --dist loadgroup -q $(ARGS)

# What PEFT's own tests import beyond what ours do.
test-peft: $(DONE)-test  ## Run PEFT's own tests without and with peftk.accelerate; ARGS=--in-place: with peftk in PEFT's place
	$(PIP) parameterized attrs scipy datasets
	$(BIN)/python -m tools.peft_tests $(ARGS)

test-matrix: $(DONE)-test  ## Run the tests of peftk.accelerate with every supported version of PEFT
	$(BIN)/python -m tools.matrix $(ARGS)

bench: $(DONE)-bench  ## Time operators and layers beside their peers, and write the report; ARGS=--quick to try it
	$(BIN)/python -m benchmarks.run $(ARGS)

test-gpu: $(GPU_DONE)-native  ## Test everything on an NVIDIA GPU, within 10 minutes; ARGS=--list says what that is
	$(GPU_VENV)/bin/python -m benchmarks.gpu_tests $(ARGS)

bench-gpu: $(GPU_DONE)-native  ## Measure on an NVIDIA GPU, within 10 minutes; ARGS=--list says what
	$(GPU_VENV)/bin/python -m benchmarks.gpu $(ARGS)

doctor: $(DONE)-native  ## Say what runs on this machine, and test it
	$(BIN)/python -m peftk doctor $(ARGS)

# On the package as it is installed, where the folder triton_kernels is peftk.triton_kernels.
types: $(DONE)-lint
	@rm -rf $(TYPES)
	@mkdir -p $(TYPES)/peftk
	@ln -s $(CURDIR)/peftk/* $(CURDIR)/triton_kernels $(TYPES)/peftk
	cd $(TYPES) && $(abspath $(BIN))/mypy --config-file $(CURDIR)/pyproject.toml --cache-dir $(CURDIR)/.mypy_cache -p peftk

lint: $(DONE)-lint types  ## Check the style and types of Python, and the style of C++
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files '*.h' '*.cpp' '*.cu')

format: $(DONE)-lint  ## Rewrite Python and C++ in that style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(git ls-files '*.h' '*.cpp' '*.cu')

setup: $(DONE)-native  ## Only build and install, into $(VENV)

clean:  ## Remove the environment and everything that was built
	rm -rf $(VENV) $(GPU_VENV) build dist *.egg-info peftk/*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(DONE)-venv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
		|| { echo 'make: expected Python 3.10 or newer as $(PYTHON); set PYTHON=...'; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null \
		|| { echo 'make: $(PYTHON) cannot make virtual environments; install the system package python3-venv'; exit 1; }
	@$(PYTHON) -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' \
		|| { echo 'make: the headers of $(PYTHON) are missing; install the system package python3-dev'; exit 1; }
	@echo 'int main() { return [](auto x) requires true { return x; }(0); }' \
		| $(CXX) -std=c++20 -x c++ -fsyntax-only - 2>/dev/null \
		|| { echo 'make: $(CXX) does not compile C++20; install the system package g++ (10 or newer), or set CXX=...'; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

# torch first and pinned, so that nothing installed later can move it; not quiet, because it may be a long download.
$(DONE)-torch: constraints.txt | $(DONE)-venv
	$(BIN)/python -m pip install --constraint constraints.txt torch
	$(PIP) setuptools ninja pybind11 packaging
	@touch $@

$(DONE)-native: $(SOURCES) $(DONE)-torch
	$(PIP) --no-build-isolation --no-deps --editable .
	$(PIP) peftk
	@rm -f $(GPU_DONE)-native
	@touch $@

$(DONE)-demo: $(DONE)-native
	$(PIP) 'peftk[demo]'
	@touch $@

$(DONE)-test: $(DONE)-native
	$(PIP) 'peftk[test,demo,lint]'
	@touch $@

$(DONE)-bench: $(DONE)-native
	$(PIP) 'peftk[bench,demo]'
	@touch $@

$(DONE)-lint: $(DONE)-native
	$(PIP) 'peftk[lint]'
	@touch $@

# An environment that sees the packages of $(PYTHON) through a .pth file and installs nothing but peftk: a PyTorch for the
# GPU that is there stays as it is, and nothing is downloaded. (--system-site-packages would not see the packages of
# $(PYTHON) where that is a virtual environment itself.) Both environments build the same file below peftk/, so each
# build makes the other one stale.
$(GPU_DONE)-venv:
	@$(PYTHON) -c 'import torch, sys; sys.exit(torch.version.cuda is None)' \
		|| { echo 'make: expected a Python with a CUDA build of PyTorch as $(PYTHON); set PYTHON=...'; exit 1; }
	@$(PYTHON) -c 'import setuptools, ninja, pybind11, packaging, pip, pytest, safetensors, typer, rich, tqdm, matplotlib' \
		|| { echo 'make: install that package into the environment of $(PYTHON)'; exit 1; }
	$(PYTHON) -m venv --without-pip $(GPU_VENV)
	@$(PYTHON) -c 'import sys; print(*dict.fromkeys(p for p in sys.path if p.endswith("-packages")), sep="\n")' \
		> "$$($(GPU_VENV)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/packages-of-parent.pth"
	@touch $@

$(GPU_DONE)-native: $(SOURCES) $(GPU_DONE)-venv
	@echo 'Building peftk with its CUDA C++ kernels for $(PYTHON), without the network (a minute or so the first time).'
	@mkdir -p build
	@rm -f $(DONE)-native
	@if MAX_JOBS=$$(nproc) PEFTK_BUILD=cuda $(GPU_PIP) --verbose > build/gpu-build.log 2>&1; then touch $@; else \
		tail -n 25 build/gpu-build.log; \
		echo 'The C++ kernels do not build (build/gpu-build.log): going on without them, and part "build" will fail.'; \
		rm -f peftk/_C.*.so; PEFTK_BUILD=none $(GPU_PIP) --quiet; fi
