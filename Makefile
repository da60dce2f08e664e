# Everything is installed into .venv once; see README.md.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
STAMP := .venv/installed
export DO_NOT_TRACK := true
export PREFECT_SERVER_ANALYTICS_ENABLED := false
export MLFLOW_DISABLE_TELEMETRY := true
export GX_ANALYTICS_ENABLED := false
export HF_HUB_DISABLE_TELEMETRY := 1

PORT ?= 4200

.PHONY: install demo test test-slow lint format ui serve lock

install: $(STAMP)

$(STAMP): requirements.lock pyproject.toml
	@command -v git >/dev/null || { echo "git is not installed: install it and run make again." >&2; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed: name it as make PYTHON=/path/to/python3.11." >&2; exit 2; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	@touch $(STAMP)

demo: install
	$(BIN)/python -m flows.pipeline
	$(BIN)/djepa summary

test: install
	$(BIN)/python -m pytest -m "not slow"

test-slow: install
	$(BIN)/python -m pytest -m slow

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

ui: install
	$(BIN)/djepa ui

# Prefect's server, the deployments of prefect.yaml and workers, until Ctrl-C; see docs/operating.md.
serve: install
	@$(BIN)/python -m flows.serve --port $(PORT)

# Pin what is installed now: names and versions only.
lock:
	$(BIN)/python -m pip freeze --exclude-editable > requirements.lock
