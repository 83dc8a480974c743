# What one types. It all happens in .venv, which scripts/setup.sh makes and keeps up to date.
.DEFAULT_GOAL := help
.PHONY: help run test check faults bench docs wheel clean
NANOGPT ?= nanoGPT
MAKEFLAGS += --no-print-directory

help:  ## this page
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-7s %s\n", $$1, $$2}' Makefile

run:  ## train a small model on real text for about two minutes, then let it write
	@bash scripts/setup.sh viz
	.venv/bin/octavo train configs/quickstart.yaml --out runs/quickstart --resume
	.venv/bin/octavo generate runs/quickstart --prompt "The " --preset nucleus --max-new-tokens 300

test:  ## the tests, a few minutes on two cores
	@bash scripts/setup.sh dev
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n 2 -m "not long"

check:  ## what a change must pass: format, lint, types, packaging, the page in a browser, all tests
	@bash scripts/setup.sh dev
	@bash scripts/system.sh
	.venv/bin/ruff format --check
	.venv/bin/ruff check
	.venv/bin/pyrefly check
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n 2 -m long
	@$(MAKE) test

faults:  ## only the tests that kill runs, fill disks and flip bits, with many more trials: an hour
	@bash scripts/setup.sh dev
	OCTAVO_FAULTS=10 OMP_NUM_THREADS=1 .venv/bin/python -m pytest --timeout 7200 tests/faults \
		tests/distributed
	OCTAVO_FAULTS=100 OMP_NUM_THREADS=1 .venv/bin/python -m pytest --timeout 7200 -k any_ \
		tests/test_config.py tests/text/test_tokenizer.py

bench:  ## octavo beside its peers, recorded: make bench NANOGPT=path/to/nanoGPT
	@bash scripts/setup.sh dev
	.venv/bin/python benchmarks/train.py char --nanogpt "$(NANOGPT)" --record
	.venv/bin/python benchmarks/decode.py --nanogpt "$(NANOGPT)" --record
	.venv/bin/python benchmarks/tables.py

docs:  ## the guide and all pages as a site, in site/: runs every chapter, links checked, ten minutes
	@bash scripts/setup.sh docs
	NO_MKDOCS_2_WARNING=1 .venv/bin/python -m mkdocs build --strict
	@echo "open site/index.html"

wheel:  ## the wheel and the source archive, in dist/
	@bash scripts/setup.sh dev
	.venv/bin/python -m build --no-isolation

clean:  ## remove all that can be made again: everything but runs/
	rm -rf .venv dist build site .pytest_cache .ruff_cache .hypothesis
