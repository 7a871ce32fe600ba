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

export PATH := $(CURDIR)/.venv/bin:$(PATH):$(firstword $(wildcard /usr/local/cuda/bin /usr/local/cuda-*/bin))
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
COMPAT_FILES := compat/pyproject.toml $(shell find compat/dilated_attention_pytorch -name '*.py')
EXAMPLE_REQUIREMENTS := $(wildcard benchmarks/requirements.txt examples/*/requirements.txt)

.PHONY: help
help: ## This list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

.PHONY: demo
demo: $(EXAMPLES) ## Train a LongNet at 16,384 bytes of context on a real corpus; writes demo/report.html
	.venv/bin/python examples/longnet demo --out $(DEMO) $(DEMO_OPTIONS)

.PHONY: demo-recall demo-slide demo-chromosome demo-ranks
demo-recall: $(EXAMPLES) ## Recall across 16 local segments, with and without dilated branches; writes demo/recall.png
	@mkdir -p $(DEMO)
	.venv/bin/python examples/recall/recall.py --out $(DEMO)/recall.png $(DEMO_OPTIONS)

demo-slide: $(EXAMPLES) ## Classify slides of 10,000 tiles by two distant lesions; writes demo/slide.png
	@mkdir -p $(DEMO)
	.venv/bin/python examples/slide/multifocal.py --out $(DEMO)/slide.png $(DEMO_OPTIONS)

# Another one: `make demo-chromosome FASTA=genome.fa.gz`.
FASTA ?= build/chromosome/MGH78578.fna.xz
demo-chromosome: $(EXAMPLES) ## Embed 5.3 million bases in one forward pass; writes demo/chromosome
	@[[ -f $(FASTA) || $(origin FASTA) != file ]] || tools/fetch_chromosome.sh $(FASTA)
	.venv/bin/python examples/chromosome/embed.py --fasta $(FASTA) --out $(DEMO)/chromosome $(DEMO_OPTIONS)

# Two processes that hold half of every sequence each. With `DEMO_OPTIONS='--fail-at 15'` one of them is killed on the way.
RANKS ?= 2
demo-ranks: $(EXAMPLES) ## Train over RANKS processes that share every sequence; started again, it goes on
	.venv/bin/python -m torch.distributed.run --standalone --nproc-per-node $(RANKS) --max-restarts 3 \
	  examples/longnet/ranks.py --out $(DEMO)/ranks $(DEMO_OPTIONS)

# In this order: what fails quickly comes first, pytest's summary stands last.
.PHONY: test
test: ## Everything: lint, C++ tests, sanitizers, clang, Arm, example, snippets, Python tests
	@$(MAKE) setup-tests
	@$(MAKE) lint
	@$(MAKE) test-cpp
	@$(MAKE) test-mutants
	@$(MAKE) test-example
	@$(MAKE) audit
	@$(MAKE) test-snippets
	@$(MAKE) test-sanitized
	@$(MAKE) test-clang
	@$(MAKE) test-libcxx
	@$(MAKE) test-arm
	@$(MAKE) test-cuda
	@$(MAKE) test-oldest-torch
	@$(MAKE) test-python

.PHONY: bench bench-gpu
bench-gpu: $(EXAMPLES) ## The same on one NVIDIA GPU, in bfloat16: rates beside dense kernels; JSON and a picture
	.venv/bin/python benchmarks/run.py --device cuda --picture build/bench-gpu.png

bench: $(EXAMPLES) ## Time the operator against the best PyTorch compositions; JSON in benchmarks/results
	.venv/bin/python benchmarks/run.py

# --- parts of `make test` ---------------------------------------------------------------------------------------
.PHONY: soak test-cpp test-sanitized test-threads test-clang test-libcxx test-arm test-cuda test-python test-oldest-torch test-snippets test-mutants test-example lint format audit wheel
test-cpp: $(TEST_ENVIRONMENT) ## C++ tests (preset cpu)
	cmake --workflow --preset cpu

test-sanitized: $(TEST_ENVIRONMENT) ## C++ tests under address and undefined-behaviour sanitizers (preset cpu-asan)
	cmake --workflow --preset cpu-asan

test-threads: $(TEST_ENVIRONMENT) ## C++ tests under the thread sanitizer (preset cpu-tsan)
	cmake --workflow --preset cpu-tsan

# $(call with,tools,check): runs the check. Where a tool is missing, it fails in CI and is said elsewhere.
define with
@missing=; for tool in $(1); do command -v $$tool >/dev/null || missing="$$missing $$tool"; done; \
if [[ $$missing ]]; then echo "$@: not run, as these are not here:$$missing" >&2; [[ ! $$DILATED_CI ]]; \
else set -ex; $(2); fi
endef

test-arm: $(TEST_ENVIRONMENT) ## C++ tests for 64-bit Arm under qemu (preset cpu-arm); fails without tools only in CI
	$(call with,aarch64-linux-gnu-g++ qemu-aarch64-static,tools/set_up_arm.sh; cmake --workflow --preset cpu-arm)

test-cuda: $(TEST_ENVIRONMENT) ## Compile the CUDA kernels (preset cuda); fails without nvcc only in CI
	$(call with,nvcc,cmake --workflow --preset cuda)

test-clang: $(TEST_ENVIRONMENT) ## C++ tests built with clang (preset cpu-clang); fails without it only in CI
	$(call with,clang++,cmake --workflow --preset cpu-clang)

test-libcxx: $(TEST_ENVIRONMENT) ## The library and its example with clang and libc++; fails without them only in CI
	$(call with,clang++ $(LIBCXX),cmake --workflow --preset cpu-libcxx; \
	cmake --install build/cpu-libcxx --component cpp; tools/run_example.sh build/installed-libcxx \
	build/example-libcxx -DCMAKE_CXX_COMPILER=clang++ -DCMAKE_CXX_FLAGS=-stdlib=libc++)
# A command that is there if libc++ is, and one that never is if not.
LIBCXX = $(shell clang++ -stdlib=libc++ -fsyntax-only -x c++ -include vector /dev/null 2>/dev/null && echo true || echo libc++)

test-python: $(TEST_PACKAGE) ## Python tests of the installed package
	.venv/bin/python -m pytest $(PYTEST_OPTIONS)

soak: $(TEST_PACKAGE) ## Random calls over RANKS processes against one, for ten minutes; not a part of `make test`
	.venv/bin/python python/tests/soak_sequence.py $(SECONDS_OF_SOAK) $(RANKS)
SECONDS_OF_SOAK ?= 600

test-oldest-torch: $(TEST_PACKAGE) ## The operator's Python tests with the oldest PyTorch that we admit
	tools/test_oldest_torch.sh .venv/lib/python3*/site-packages/dilated/libdilated_torch.so $(PYTEST_OPTIONS)

test-snippets: $(TEST_PACKAGE) $(INSTALLED) ## Run the code in README, docs and docstrings
	.venv/bin/python tools/check_snippets.py

test-mutants: $(TEST_ENVIRONMENT) ## Change terms of the sources: tests must turn red; MUTANTS of them a day, or all
	tools/mutation_check.sh $(if $(filter-out all,$(MUTANTS)),--part $(MUTANTS))
MUTANTS ?= 2

test-example: $(INSTALLED) ## Build examples/cpp against the installed library and run it
	tools/run_example.sh build/installed build/example

lint: $(TEST_PACKAGE) ## Formats, static checks, spelling, include rule
	tools/lint.sh

format: $(TEST_PACKAGE) ## Rewrite sources in the project's format
	tools/lint.sh --fix

audit: $(PACKAGE) ## Show that the operator library fits every Python and PyTorch
	.venv/bin/python tools/audit_abi.py .venv/lib/python3*/site-packages/dilated/libdilated_torch.so

wheel: $(ENVIRONMENT) ## A wheel that travels (Highway inside), and that of compat/, in dist/
	rm -f dist/dilated*.whl && rm -rf build/wheel
	.venv/bin/python -m pip --disable-pip-version-check wheel --quiet --no-build-isolation --no-deps -w dist \
	  --config-settings=build-dir=build/wheel --config-settings=cmake.define.DILATED_STATIC_HIGHWAY=ON .
	.venv/bin/python -m pip --disable-pip-version-check wheel --quiet --no-build-isolation --no-deps -w dist ./compat
	.venv/bin/python tools/audit_abi.py --static build/wheel/bindings/torch/libdilated_torch.so
	ls -l dist/dilated*.whl

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

$(TEST_PACKAGE): $(TEST_ENVIRONMENT) $(PACKAGE_FILES) $(COMPAT_FILES) $(EXAMPLE_REQUIREMENTS)
	$(PIP_INSTALL) '.[pictures,test,lint]' $(EXAMPLE_REQUIREMENTS:%=-r %)
	$(PIP_INSTALL) --no-deps ./compat
	@touch $@ $(PACKAGE) $(EXAMPLES)

# The optimised build of `test-cpp`, installed as a C++ user would.
$(INSTALLED): $(TEST_ENVIRONMENT) $(CORE_FILES)
	cmake --preset cpu
	cmake --build --preset cpu --target dilated
	rm -rf build/installed
	cmake --install build/cpu --component cpp
	@touch $@

clean: ## Remove builds and the environment
	rm -rf build .venv .venv-oldest
