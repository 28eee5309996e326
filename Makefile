# Every target starts from a fresh clone with only Python 3.11 or 3.12 there.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
QUICKSTART := runs/quickstart

.PHONY: quickstart test test-lowest lint docs clean

quickstart: $(VENV)/.installed
	$(BIN)/branchtree train quickstart --output $(QUICKSTART) $(if $(wildcard $(QUICKSTART)/recipe.yaml),--resume)

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

# The lowest versions of the model libraries that pyproject.toml allows, with this environment's other libraries.
test-lowest: $(VENV)/.installed-dev
	$(BIN)/python scripts/test_lowest.py

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(VENV)/.installed-docs
	$(BIN)/python scripts/build_reference.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) runs

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12) and "branchtree needs Python 3.11 or 3.12: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable .
	touch $@

# The second reader of `ocr` requires opencv-python, which needs libGL and would replace opencv-python-headless.
$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/pip install --quiet --editable '.[dev]'
	$(BIN)/pip install --quiet --no-deps 'rapidocr-onnxruntime>=1.4.4'
	touch $@

$(VENV)/.installed-%: $(VENV)/.installed
	$(BIN)/pip install --quiet --editable '.[$*]'
	touch $@
