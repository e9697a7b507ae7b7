# `make quickstart` and `make test` set up all they need on a fresh machine.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
LAUNCH := $(BIN)/accelerate launch --quiet --config_file accelerate_config.yaml

.PHONY: setup quickstart test test-gpu lint format docs audit clean

setup: $(VENV)/.installed

$(VENV)/.installed: constraints.txt pyproject.toml
	@echo "Installing the pinned packages into $(VENV) (some minutes the first time) ..."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev,docs]"
	@touch $@

quickstart: setup
	$(LAUNCH) -m finetune.train recipes/quickstart.yaml
	$(BIN)/python -m finetune.compare recipes/quickstart.yaml

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	CUDA_VISIBLE_DEVICES= $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-gpu: setup
	$(BIN)/python -m pytest -m gpu
	$(BIN)/python -m pytest tests/unets/test_triton_kernels.py tests/adapters/cascade/test_offload.py

# a warning, such as a link that leads nowhere, is an error
docs: setup
	$(BIN)/python -m sphinx --fail-on-warning --quiet -b html docs docs/_build
	@echo "Written to docs/_build/index.html."

# in an environment of its own, because what it needs is not pinned here
audit: $(VENV)/audit/.installed
	@$(VENV)/audit/bin/pip-audit --strict --no-deps --disable-pip --progress-spinner off \
	    --requirement constraints.txt 2> $(VENV)/audit/errors; status=$$?; \
	if grep -q "onnect\|ServiceError\|could not be audited" $(VENV)/audit/errors; then \
	    echo "Not audited: PyPI's advisories (https://pypi.org) cannot be reached from here."; \
	else cat $(VENV)/audit/errors >&2; exit $$status; fi

$(VENV)/audit/.installed:
	@$(PYTHON) -m venv $(VENV)/audit
	@$(VENV)/audit/bin/python -m pip install --quiet pip-audit==2.10.1
	@touch $@

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf runs .cache docs/_build
