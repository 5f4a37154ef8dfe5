# make demo: set up, then measure the shipped models and write report.html.   make test: set up, then the tests.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := PIP_DISABLE_PIP_VERSION_CHECK=1 $(BIN)/python -m pip install --quiet -c constraints.txt

.PHONY: demo test lint clean

demo: $(VENV)/.run
	@$(BIN)/stretto bench zoo:tiny --html report.html

test: $(VENV)/.dev
	@$(BIN)/python -m pytest

lint: $(VENV)/.dev
	@$(BIN)/ruff check . && $(BIN)/pyright

$(VENV)/.run: pyproject.toml constraints.txt
	@echo "Setting up $(VENV): a virtual environment with torch and a few small packages (minutes, once)"
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11))" || { echo "Python 3.11 or newer is needed: make PYTHON=python3.12 demo"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "  torch ..." && $(PIP) torch
	@echo "  stretto ..." && $(PIP) -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.run
	@echo "  test tools ..." && $(PIP) -e ".[dev]"
	@touch $@

clean:
	rm -rf $(VENV) report.html
