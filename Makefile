# make install   create .venv and install everything into it (again only if pyproject.toml or the samples change)
# make train     train lm_16l at this machine's scale, into a new folder below runs/: make train ARGS="--max_steps 50"
# make test      the tests, but for tests/cluster and what takes many minutes: make test ARGS="tests/unit -k router"
# make lint      ruff check, ruff format --check, mypy
# make clean     remove caches and build leftovers; keeps .venv and runs
#
# PYTHON=python3.12 chooses the interpreter that .venv is made with; VENV=folder another place for it; WORKERS=8 how many
# processes `make test` runs the tests of one process in.

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
ARGS ?=
WORKERS ?= 2
RUN ?= runs/lm_16l-$(shell date +%Y%m%d-%H%M%S)

BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help install train test lint clean
.DELETE_ON_ERROR:

help:
	@sed -e '/^$$/q' -e 's/^#\( \|$$\)//' Makefile

install: $(INSTALLED)

# torch first, at one version: a wider range can replace a CPU build by a newer one with several GB of CUDA packages.
# The samples last and without dependencies: requirements-samples.txt says why.
$(INSTALLED): pyproject.toml requirements-samples.txt | $(BIN)/pip
	"$(BIN)/python" -m pip install "pip>=23.1" # older ones do not read all of requirements-samples.txt
	"$(BIN)/python" -m pip install $(TORCH)
	"$(BIN)/python" -m pip install -e ".[dev]"
	"$(BIN)/python" -m pip install --no-deps -r requirements-samples.txt
	@touch "$@"

$(BIN)/pip:
	@command -v "$(PYTHON)" >/dev/null || { \
	  echo "error: '$(PYTHON)' was not found; choose a Python 3.11 or newer with: make PYTHON=/path/to/python3" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "error: moe_scale needs Python 3.11 or newer, and '$(PYTHON)' is $$("$(PYTHON)" -V 2>&1);" \
	    "choose another with: make PYTHON=/path/to/python3" >&2; exit 1; }
	"$(PYTHON)" -m venv "$(VENV)"

# DeepSpeed starts the ranks with the Python that runs its launcher, and compiles its own parts with the ninja that it
# finds on PATH: the venv comes first there.
train: $(INSTALLED)
	PATH="$$(cd "$(BIN)" && pwd):$$PATH" "$(BIN)/deepspeed" --log_level error recipes/lm_16l.py --output_dir "$(RUN)" $(ARGS)

# Without ARGS in two parts: what leaves a core idle, WORKERS files at a time; then runs on several ranks, one by one.
test: $(INSTALLED)
ifeq ($(strip $(ARGS)),)
	PATH="$$(cd "$(BIN)" && pwd):$$PATH"; rc=0; \
	OMP_NUM_THREADS=1 "$(BIN)/python" -m pytest -n "$(WORKERS)" --dist loadfile tests/unit tests/numerics tests/recipes || rc=$$?; \
	"$(BIN)/python" -m pytest tests/distributed || rc=$$?; \
	exit $$rc
else
	PATH="$$(cd "$(BIN)" && pwd):$$PATH" "$(BIN)/python" -m pytest $(ARGS)
endif

lint: $(INSTALLED)
	"$(BIN)/ruff" check
	"$(BIN)/ruff" format --check
	"$(BIN)/mypy"

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name .git -prune -o -name '.venv*' -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
