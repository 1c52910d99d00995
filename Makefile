PYTHON ?= python3
BIN := $(CURDIR)/.venv/bin
STAMP := .venv/installed
SHIP := build/ship

# One thread a process: the tests run two processes, and networks this small lose time to more threads.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile

.PHONY: install demo test test-slow check lint ship-check

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --constraint constraints.txt --editable '.[all,dev]'
	touch $@

demo: install
	$(BIN)/rinr demo

test: install
	$(PYTEST) -m 'not slow'

test-slow: install
	$(PYTEST) -m slow

check: lint ship-check

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# What a user gets: the wheel, built from the source archive, holds every module, and its types hold where it is installed.
ship-check: install
	rm -rf $(SHIP)
	$(BIN)/python -m build --no-isolation --outdir $(SHIP)/dist . > /dev/null
	$(BIN)/python -m pip install --quiet --no-deps --target $(SHIP)/site $(SHIP)/dist/*.whl
	{ find rinr_loader -name '*.py' -o -name py.typed -o -path '*/dictionaries/*'; find converters integrations -name '*.py' | sed 's|^|rinr_loader/|'; } | sort > $(SHIP)/source.txt
	(cd $(SHIP)/site && find rinr_loader -name '*.py' -o -name py.typed -o -path '*/dictionaries/*') | sort > $(SHIP)/shipped.txt
	diff $(SHIP)/source.txt $(SHIP)/shipped.txt || { echo 'The wheel lacks a module (or has one too many): see packages in pyproject.toml.'; exit 1; }
	cd $(SHIP)/site && $(BIN)/mypy --config-file $(CURDIR)/pyproject.toml -p rinr_loader
