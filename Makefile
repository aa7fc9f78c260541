# Everything runs in .venv, which is made on first use from Python 3.11 or newer and the package index.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/ready
# Most tests run on one core; a worker takes 2 GB.
PARALLEL := --numprocesses 2 --dist loadfile

.PHONY: demo test test-lowest test-newest coverage soak lint bench docs clean

demo: $(READY)
	$(BIN)/hashret demo

test: lint
	$(BIN)/pytest $(PARALLEL)

# The oldest versions that pyproject.toml allows, and the newest that exist, each in an environment of its own.
test-lowest: INSTALL := --resolution lowest-direct
test-lowest test-newest: test-%:
	$(PYTHON) -m venv --clear .venv-$*
	.venv-$*/bin/pip install -q --disable-pip-version-check uv
	.venv-$*/bin/uv pip install -q --python .venv-$*/bin/python $(INSTALL) -e '.[dev]'
	.venv-$*/bin/pytest $(PARALLEL)

coverage: $(READY)
	$(BIN)/pip install -q -c constraints.txt -e '.[dev,coverage]'
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest $(PARALLEL)
	$(BIN)/coverage combine -q
	$(BIN)/coverage report

soak: $(READY)
	HASHRET_SOAK=1 $(BIN)/pytest

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/check-jsonschema -q --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(BIN)/check-jsonschema -q --builtin-schema vendor.citation-file-format CITATION.cff

bench: $(READY)
	$(BIN)/pip install -q -c constraints.txt -e '.[dev,bench]'
	$(BIN)/python benchmarks/search.py --peers scan,reading,multihash,hash,ivf,pynear
	$(BIN)/python benchmarks/dupes.py
	$(BIN)/python benchmarks/quality.py --rows 'digits/*' --file build/quality.json
	$(BIN)/python benchmarks/encode.py --arrays digits

docs: $(READY)
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev,docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "hashret needs Python 3.11 or newer: make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $(READY)

clean:
	rm -rf .venv .venv-lowest .venv-newest build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis hashret-demo
