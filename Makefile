# make lab     set up and open JupyterLab on the first notebook      (PORT=8899, LAB_ARGS="--no-browser --ip=0.0.0.0")
# make setup   .venv with everything, pinned by constraints.txt      (PYTHON=python3.12, PIP_ARGS="--extra-index-url …", EXTRAS=dev,gpu)
# make test    ruff, mypy, pytest; browser tests if there is a Chromium       (TESTS="tests/quant -k smooth")
# make demo    the notebooks executed into build/demo/
# make bench   the figures of "how fast"
# make gpu-check   with a GPU: the INT8 kernels against their definition, and their times into kernels/LOG.md
#
# Needs Python >= 3.11 and PyPI. A bare torch for Linux brings several GB of CUDA; without an NVIDIA GPU spare them with
#     make setup PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu"

PYTHON ?= $(shell for name in python3 python3.13 python3.12 python3.11; do \
	$$name -c $(RECENT) 2>/dev/null && { echo $$name; break; }; done)
PORT ?=
LAB_ARGS ?=
PIP_ARGS ?=
TESTS ?=
EXTRAS ?= dev
RECENT := "import sys; sys.exit(sys.version_info < (3, 11))"
BIN := .venv/bin
INSTALLED := .venv/.installed-$(EXTRAS)
HAVE_VENV := $(BIN)/python -m pip --version >/dev/null 2>&1

.PHONY: setup lab demo test bench gpu-check
.DEFAULT_GOAL := lab

setup: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	@$(HAVE_VENV) || $(PYTHON) -c $(RECENT) 2>/dev/null || { echo "sqviz needs Python 3.11 or newer, and \
	'$(PYTHON)' is none. Install one, or name it: make PYTHON=/path/to/python3.12" >&2; exit 1; }
	$(HAVE_VENV) || $(PYTHON) -m venv --clear .venv
	$(BIN)/python -m pip install --disable-pip-version-check $(PIP_ARGS) -c constraints.txt -e '.[$(EXTRAS)]'
	@touch $@

lab: $(INSTALLED)
	$(BIN)/sqviz fetch
	$(BIN)/sqviz lab $(if $(PORT),--port $(PORT)) $(LAB_ARGS)

demo: $(INSTALLED)
	$(BIN)/sqviz fetch
	$(BIN)/sqviz demo --output build/demo

test: $(INSTALLED)
	$(BIN)/sqviz fetch
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest $(TESTS)

bench: $(INSTALLED)
	$(BIN)/sqviz fetch
	$(BIN)/python -m benchmarks
	$(BIN)/python kernels/bench.py

gpu-check:
	$(MAKE) setup EXTRAS=dev,gpu
	$(BIN)/python kernels/gpu_check.py
