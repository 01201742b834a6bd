# make demo    a sweep of AMT against MAE on real images, then the comparison page   (about 5 minutes on 2 cores)
# make test    all tests that need no GPU and no network
PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup demo test test-fast check lock clean

setup: .venv/.ready

.venv/.ready: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if v >= (3, 11) else f"Python 3.11 or later is needed, got {v[0]}.{v[1]}; name one with: make PYTHON=python3.12 ...")'
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python -r requirements.lock
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --editable .
	@touch $@

demo: setup
	$(BIN)/amt-ray sweep experiments/quickstart.yaml
	$(BIN)/amt-ray compare --experiment quickstart --out report.html

test: setup
	$(BIN)/python -m pytest

test-fast: setup
	$(BIN)/python -m pytest -m "not ray"

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

lock:
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --no-emit-index-url --no-header --no-annotate \
		--extra dev pyproject.toml --output-file requirements.lock

clean:
	rm -rf .venv runs mlartifacts mlflow.db .mlflow.db.lock report.html
