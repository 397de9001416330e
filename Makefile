# `make compare` runs the main job; `make test` runs every check. Each makes .venv first, if need be.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: compare test lint format bench clean

compare: .venv/.installed
	$(BIN)/pvae compare --out runs/compare --overwrite

test: lint
	$(BIN)/python -m pytest -n 2 --dist worksteal

lint: .venv/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

format: .venv/.installed-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The peers come with `.venv/bin/pip install -e '.[bench]'`; those that are absent are skipped.
bench: .venv/.installed-test
	$(BIN)/python -m tests.benchmarks $(GROUPS)

clean:
	rm -rf .venv .pytest_cache .ruff_cache .mypy_cache .import_linter_cache

.venv/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "pvae needs Python 3.11 or newer: make PYTHON=/path/to/python3.11"; exit 2; }
	$(PYTHON) -m venv .venv
	@touch $@

.venv/.installed: .venv/.created pyproject.toml
	$(BIN)/python -m pip install --quiet --editable .
	@touch $@

.venv/.installed-test: .venv/.created pyproject.toml
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	@touch $@ .venv/.installed
