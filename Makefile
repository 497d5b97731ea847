# make demo   the tool at work on two small trained checkpoints (makes .venv with what it needs)
# make test   every check: lint, format, types, import walls, tests
# make docs   build the documentation into build/docs, every warning an error
# make fmt    format and fix in place
# make bench  ratios against peers and against the floor; BENCH_ARGS="--sizes 512,1024 --no-peers"
# make clean  remove what was made, .venv too

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
PYTEST_ARGS ?= -n 2
BENCH_ARGS ?=

# Two workers with one thread each are faster than one worker with two, and give the same bits everywhere.
test: export OMP_NUM_THREADS ?= 1

.PHONY: demo test docs fmt bench venv clean

demo: .venv/runtime
	$(BIN)/lrmerge extract examples/demo/base examples/demo/finetuned -o build/demo/rank-16 --rank 16 --overwrite
	$(BIN)/python examples/demo.py build/demo

test: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports
	$(BIN)/python -m pytest $(PYTEST_ARGS)

docs: .venv/dev
	$(BIN)/sphinx-build --fail-on-warning --keep-going --quiet --fresh-env --write-all docs build/docs

fmt: .venv/dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: .venv/dev
	$(BIN)/python benchmarks/extract.py $(BENCH_ARGS)

venv: .venv/dev

# Stamps: pip runs again only when a requirement changed. The source itself is installed editable.
.venv/runtime: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) install --quiet --constraint constraints.txt --editable .
	touch $@

.venv/dev: .venv/runtime
	$(PIP) install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf .venv build dist .pytest_cache .ruff_cache .hypothesis .import_linter_cache
