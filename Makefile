# Assumes Linux or macOS with Python 3.11 or later and pip. Everything is installed into $(VENV).
PYTHON ?= python3
VENV   ?= .venv
# What pip is asked for as PyTorch. From PyPI, on Linux, that is a CUDA build of several GB. For the
# CPU build: make test TORCH="torch --index-url https://download.pytorch.org/whl/cpu"
TORCH  ?= torch==2.13.0

BIN := $(VENV)/bin

.PHONY: help demo test check format docs clean

help:
	@echo "make demo [SLIDE=path [MPP=0.5]]  extract features of a small slide it makes, or of yours"
	@echo "make test                         run the tests"
	@echo "make check                        lint, types, import layers, docs"
	@echo "make format                       format the code"
	@echo "make docs                         build the docs into site/"
	@echo "make clean                        remove what the other targets made"

$(VENV)/.torch:
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or later is needed, this is " + sys.version.split()[0] + "; name another one: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade "pip>=25.1"  # the first that knows --group
	$(BIN)/pip install --quiet $(TORCH)
	touch $@

$(VENV)/.package: $(VENV)/.torch pyproject.toml
	$(BIN)/pip install --quiet --editable .
	touch $@

$(VENV)/.test: $(VENV)/.package
	$(BIN)/pip install --quiet --group test
	touch $@

$(VENV)/.check: $(VENV)/.package
	$(BIN)/pip install --quiet --group lint --group docs
	touch $@

demo: $(VENV)/.package
	$(BIN)/xmag demo $${SLIDE:+"$$SLIDE"} $${MPP:+--mpp "$$MPP"} --out demo

test: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --maxprocesses 8 --dist worksteal $(PYTEST_ARGS)

check: $(VENV)/.check
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

format: $(VENV)/.check
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(VENV)/.check
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) build dist site demo
