# make demo    build, and run the main job on whatever this machine has
# make test    build, lint, and run all tests that this machine can run
# Both make their own virtual environment first. Settings: PYTHON (python3), GAN_CUDA_ARCHS (all; 90, say, builds faster),
# PYTEST_ARGS.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMPS := $(VENV)/.stamps

PACKAGE_SOURCES := $(shell find csrc buildtools -type f -not -name '*.pyc') CMakeLists.txt setup.py pyproject.toml
# Directories too: they change when a file is removed.
PACKAGE_SOURCES += $(shell find csrc -type d)
CPP_SOURCES = $(shell find csrc bench tests -type f \( -name '*.cu' -o -name '*.cuh' -o -name '*.h' -o -name '*.cpp' \) 2>/dev/null)

.DEFAULT_GOAL := help
.PHONY: help demo test pytest build lint format emulate sanitize bench wheel check-cuda12 clean FORCE
MAKEFLAGS += --no-print-directory

help:
	@sed -n '/^# make/,/^$$/s/^# //p' Makefile
	@echo "others:      build, pytest (no lint), lint, format, emulate, sanitize, bench, wheel, check-cuda12, clean"

demo: $(STAMPS)/package
	$(BIN)/python -m gemma_ar_norm

# One after the other, also under make -j: both set up the virtual environment.
test: lint
	@$(MAKE) pytest

pytest: $(STAMPS)/test-tools $(STAMPS)/package
	$(BIN)/python -m pytest $(PYTEST_ARGS)

build: $(STAMPS)/package

# ---- virtual environment and build: each stamp is touched when its step is done ----
$(STAMPS)/build-tools: tools/setup_venv.py requirements-build.txt
	@$(PYTHON) tools/setup_venv.py $(VENV) build
	@mkdir -p $(STAMPS) && touch $@

# For machines without a network (GPU machines, often): needs no exact versions, installs nothing that is there.
$(STAMPS)/test-tools: tools/setup_venv.py requirements-build.txt requirements-dev.txt
	@$(PYTHON) tools/setup_venv.py $(VENV) test
	@mkdir -p $(STAMPS) && touch $(STAMPS)/build-tools $@

$(STAMPS)/dev-tools: tools/setup_venv.py requirements-build.txt requirements-dev.txt
	@$(PYTHON) tools/setup_venv.py $(VENV) dev
	@mkdir -p $(STAMPS) && touch $(STAMPS)/build-tools $(STAMPS)/test-tools $@

# Changes when one of them does.
BUILD_OPTIONS = $(GAN_CUDA_ARCHS) $(GAN_STRICT_ORDER)
$(STAMPS)/options: FORCE | $(STAMPS)/build-tools
	@echo '$(BUILD_OPTIONS)' | cmp -s - $@ || echo '$(BUILD_OPTIONS)' > $@

$(STAMPS)/package: $(PACKAGE_SOURCES) $(STAMPS)/options | $(STAMPS)/build-tools
	@echo "--- building gemma_ar_norm"
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --no-build-isolation --no-deps --editable .
	@touch $@

# ---- checks ----
lint: $(STAMPS)/dev-tools
	@echo "--- ruff, mypy, clang-format"
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --check --quiet . || { echo "ruff: not formatted; 'make format' does it"; exit 1; }
	@$(BIN)/mypy --no-error-summary
	@$(BIN)/clang-format --dry-run -Werror $(CPP_SOURCES)

format: $(STAMPS)/dev-tools
	$(BIN)/ruff check --fix --quiet .
	$(BIN)/ruff format --quiet .
	$(BIN)/clang-format -i $(CPP_SOURCES)

# The sources must compile with a CUDA 12 compiler too.
check-cuda12:
	@tools/check_cuda12.sh build/cuda12

# One case of the kernels' run on the CPU, as a failure prints it (docs/testing.md). Needs g++ alone.
emulate:
	@$(MAKE) -C tests/emulator emulate CASE=$(CASE) SEED=$(SEED)

# Every kernel under compute-sanitizer (docs/testing.md). Needs a GPU, nvcc, g++ and compute-sanitizer alone.
sanitize:
	@$(PYTHON) tests/sanitizer/run.py $(SANITIZE_ARGS)

# ---- products ----
# No torch, no Python: needs nvcc, and CMake and Ninja from PATH or from the virtual environment.
bench: export PATH := $(abspath $(BIN)):$(PATH)
bench:
	@cmake -G Ninja -S . -B build/bench -DGAN_BUILD_PYTHON=OFF -DGAN_BUILD_BENCH=ON
	@cmake --build build/bench
	@echo "--- built build/bench/streams, build/bench/links"

wheel: $(STAMPS)/dev-tools
	@echo "--- building the sdist, and the wheel from it, in dist/"
	@GAN_TORCH_DIR="$$($(BIN)/python -c 'import sys; sys.path.insert(0, "buildtools"); import gan_toolchain; print(gan_toolchain.find_torch().directory)')" \
	  $(BIN)/python -m build --no-isolation --outdir dist .

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis $(VENV)
	find gemma_ar_norm tests buildtools tools -name __pycache__ -prune -exec rm -rf {} +
	rm -f gemma_ar_norm/*.so
