# make demo: set up, measure the shipped models, write report.html.   make test: set up, then the tests.
SHELL := bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
AGAIN = "Python 3.11 or newer is needed, for example: make PYTHON=python3.12 $(MAKECMDGOALS)"
PIP := $(BIN)/python -m pip install --disable-pip-version-check --progress-bar off -c constraints.txt

# $(call install,WHAT): one line for each package that pip fetches; everything that it says is in setup.log.
define install
	@set -o pipefail; $(PIP) $(1) 2>&1 | tee -a $(VENV)/setup.log \
	  | { grep --line-buffered -E '^ *(Downloading|Using cached|Processing|Building|Installing|ERROR|error)' || true; }
endef

.PHONY: demo test lint clean

demo: $(VENV)/.run
	@$(BIN)/stretto bench zoo:tiny --html report.html

test: $(VENV)/.dev
	@$(BIN)/python -m pytest

lint: $(VENV)/.dev
	@$(BIN)/ruff check .
	@$(BIN)/pyright --pythonpath $(BIN)/python

$(VENV)/.run: pyproject.toml constraints.txt
	@echo "Setting up $(VENV): an environment with torch and a few small packages (minutes, once)"
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11))" || { echo $(AGAIN); exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "torch, in the version that the tests run with"
	$(call install,torch)
	@echo "stretto and what it needs"
	$(call install,-e .)
	@touch $@

$(VENV)/.dev: $(VENV)/.run
	@echo "tools of the tests"
	$(call install,-e ".[dev]")
	@touch $@

clean:
	rm -rf $(VENV) report.html
