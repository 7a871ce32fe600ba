# Two commands: `make demo` and `make test`. Everything they need is found, installed or built by the way
# (tools/set_up.sh); what is done is not done again. `make help` lists the rest.
SHELL := /bin/bash
.DELETE_ON_ERROR:
.SUFFIXES:
MAKEFLAGS += --no-print-directory

# Settings, for example `make demo PYTHON=python3.12 DEMO=/tmp/demo`.
export PYTHON ?= python3
# Where PyTorch's CPU build is looked for after the configured package indexes.
export TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
# `no`: never call the system's package manager.
export SYSTEM_PACKAGES ?= yes
export CMAKE_BUILD_PARALLEL_LEVEL ?= $(shell nproc 2>/dev/null || echo 2)
DEMO ?= demo
DEMO_OPTIONS ?=
PYTEST_OPTIONS ?=

export PATH := $(CURDIR)/.venv/bin:$(PATH)
export PYTHONDONTWRITEBYTECODE := 1
# The CMake runs of make must see our environment's torch, whatever is active outside.
export VIRTUAL_ENV := $(CURDIR)/.venv
unexport DILATED_BACKEND DILATED_LIBRARY PYTHONPATH

ENVIRONMENT := .venv/.environment
TEST_ENVIRONMENT := .venv/.test-environment
PACKAGE := .venv/.package
EXAMPLES := .venv/.examples
TEST_PACKAGE := .venv/.test-package
INSTALLED := build/installed/.installed

CORE_FILES := $(shell find include src cmake -type f) CMakeLists.txt
PACKAGE_FILES := $(CORE_FILES) $(shell find bindings python/dilated -type f -not -path '*/__pycache__/*') \
  pyproject.toml
PIP_INSTALL := .venv/bin/python -m pip --disable-pip-version-check install --quiet --no-build-isolation
EXAMPLE_REQUIREMENTS := $(wildcard benchmarks/requirements.txt examples/*/requirements.txt)

.PHONY: help
help: ## This list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

.PHONY: demo
demo: $(EXAMPLES) ## Train a LongNet at 16,384 bytes of context on a real corpus; writes demo/report.html
	.venv/bin/python examples/longnet demo --out $(DEMO) $(DEMO_OPTIONS)

# In this order: what fails quickly comes first, pytest's summary stands last.
.PHONY: test
test: ## Everything: lint, C++ tests, sanitizers, Arm, example, snippets, Python tests
	@$(MAKE) setup-tests
	@$(MAKE) lint
	@$(MAKE) test-cpp
	@$(MAKE) test-example
	@$(MAKE) audit
	@$(MAKE) test-snippets
	@$(MAKE) test-sanitized
	@$(MAKE) test-arm
	@$(MAKE) test-cuda
	@$(MAKE) test-python

.PHONY: bench
bench: $(EXAMPLES) ## Time the operator against the best PyTorch compositions; JSON in benchmarks/results
	.venv/bin/python benchmarks/run.py

# --- parts of `make test` ---------------------------------------------------------------------------------------
.PHONY: test-cpp test-sanitized test-threads test-arm test-cuda test-python test-snippets test-example lint format audit wheel
test-cpp: $(TEST_ENVIRONMENT) ## C++ tests (preset cpu)
	cmake --workflow --preset cpu

test-sanitized: $(TEST_ENVIRONMENT) ## C++ tests under address and undefined-behaviour sanitizers (preset cpu-asan)
	cmake --workflow --preset cpu-asan

test-threads: $(TEST_ENVIRONMENT) ## C++ tests under the thread sanitizer (preset cpu-tsan)
	cmake --workflow --preset cpu-tsan

test-arm: $(TEST_ENVIRONMENT) ## C++ tests for 64-bit Arm under qemu, where a cross compiler is (preset cpu-arm)
	@if command -v aarch64-linux-gnu-g++ >/dev/null && command -v qemu-aarch64-static >/dev/null; then \
	set -ex; tools/set_up_arm.sh; cmake --workflow --preset cpu-arm; \
	else echo "no aarch64-linux-gnu-g++ or qemu-aarch64-static here: Arm is not tested"; fi

test-cuda: $(TEST_ENVIRONMENT) ## Compile the CUDA probe, where there is nvcc (preset cuda)
	@if command -v nvcc >/dev/null; then set -x; cmake --workflow --preset cuda; \
	else echo "no nvcc here: the CUDA probe is not compiled"; fi

test-python: $(TEST_PACKAGE) ## Python tests of the installed package
	.venv/bin/python -m pytest $(PYTEST_OPTIONS)

test-snippets: $(TEST_PACKAGE) $(INSTALLED) ## Run the code in README, docs and docstrings
	.venv/bin/python tools/check_snippets.py

test-example: $(INSTALLED) ## Build examples/cpp against the installed library and run it
	tools/run_example.sh build/installed build/example

lint: $(TEST_PACKAGE) ## Formats, static checks, spelling, include rule
	tools/lint.sh

format: $(TEST_PACKAGE) ## Rewrite sources in the project's format
	tools/lint.sh --fix

audit: $(PACKAGE) ## Show that the operator library fits every Python and PyTorch
	.venv/bin/python tools/audit_abi.py .venv/lib/python3*/site-packages/dilated/libdilated_torch.so

wheel: $(ENVIRONMENT) ## A wheel that travels (Highway inside), in dist/
	rm -f dist/dilated-*.whl && rm -rf build/wheel
	.venv/bin/python -m pip --disable-pip-version-check wheel --quiet --no-build-isolation --no-deps -w dist \
	  --config-settings=build-dir=build/wheel --config-settings=cmake.define.DILATED_STATIC_HIGHWAY=ON .
	.venv/bin/python tools/audit_abi.py --static build/wheel/bindings/torch/libdilated_torch.so
	ls -l dist/dilated-*.whl

# --- environment ------------------------------------------------------------------------------------------------
.PHONY: setup setup-tests clean
setup: $(PACKAGE) ## Only set up: environment and package
setup-tests: $(TEST_PACKAGE)

$(ENVIRONMENT): tools/set_up.sh
	tools/set_up.sh
	@touch $@

$(TEST_ENVIRONMENT): tools/set_up.sh
	tools/set_up.sh tests
	@touch $@ $(ENVIRONMENT)

$(PACKAGE): $(ENVIRONMENT) $(PACKAGE_FILES)
	$(PIP_INSTALL) .
	@touch $@

# What examples/ and benchmarks/ need beside the package.
$(EXAMPLES): $(PACKAGE) $(EXAMPLE_REQUIREMENTS)
	$(PIP_INSTALL) $(EXAMPLE_REQUIREMENTS:%=-r %)
	@touch $@

$(TEST_PACKAGE): $(TEST_ENVIRONMENT) $(PACKAGE_FILES) $(EXAMPLE_REQUIREMENTS)
	$(PIP_INSTALL) '.[pictures,test,lint]' $(EXAMPLE_REQUIREMENTS:%=-r %)
	@touch $@ $(PACKAGE) $(EXAMPLES)

# The optimised build of `test-cpp`, installed as a C++ user would.
$(INSTALLED): $(TEST_ENVIRONMENT) $(CORE_FILES)
	cmake --preset cpu
	cmake --build --preset cpu --target dilated
	rm -rf build/installed
	cmake --install build/cpu --component cpp
	@touch $@

clean: ## Remove builds and the environment
	rm -rf build .venv
