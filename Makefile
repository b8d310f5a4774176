# Every target installs what it needs into .venv first; `make PYTHON=python3.12 ...` picks the Python.

PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint clean
.NOTPARALLEL: # the targets share one .venv

demo: .venv/examples.installed
	$(BIN)/python examples/train_gpt.py

test: .venv/tests.installed
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile

lint: .venv/dev.installed
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright

clean:
	rm -rf .venv build dist

# The stem is the name of an extra in pyproject.toml.
.venv/%.installed: pyproject.toml
	test -x $(BIN)/pip || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --editable '.[$*]'
	touch $@
