# The commands of the project. Each makes .venv first if it is missing or out of date; PYTHON=... chooses the Python.

.DEFAULT_GOAL := help
SHELL := /bin/sh
PYTHON_IN_VENV := .venv/bin/python

.PHONY: help env run run-lm test check check-format check-lint check-project check-docs format notebooks clean

help:
	@echo "make run         train S5 and a Transformer on short ListOps and compare them (into runs/first-look)"
	@echo "make run-lm      train a byte-level hybrid on Python's standard library and generate with it (into runs/lm-stdlib)"
	@echo "make test        run the tests; pass options to pytest with ARGS=..., say ARGS='-k s5'"
	@echo "make check       formatting, lint, import direction, project files, documentation, notebooks"
	@echo "make format      rewrite the sources in the project's format, and apply safe lint fixes"
	@echo "make notebooks   run the notebooks"
	@echo "make env         make the environment .venv only; PYTHON=/path/to/python chooses the Python"
	@echo "make clean       remove .venv and caches"

env:
	@sh tools/environment.sh

run: env
	@$(PYTHON_IN_VENV) -m experiments.compare --config=configs/lra/listops_short.py --mixers=s5,attention \
		--workdir=runs/first-look $(ARGS)

run-lm: env
	@$(PYTHON_IN_VENV) -m experiments.train --config=configs/lm/stdlib.py --workdir=runs/lm-stdlib $(ARGS)
	@$(PYTHON_IN_VENV) -m experiments.generate --workdir=runs/lm-stdlib --prompt="def read_file(path):" \
		--max_new_tokens=400 --temperature=0.7 --seed=1

test: env
	@$(PYTHON_IN_VENV) -m pytest --numprocesses=logical --maxprocesses=8 --dist=worksteal $(ARGS)

check: check-format check-lint check-project check-docs notebooks

check-format: env
	@$(PYTHON_IN_VENV) -m ruff format --check .

check-lint: env
	@$(PYTHON_IN_VENV) -m ruff check .

check-project: env
	@$(PYTHON_IN_VENV) -m pytest --quiet tests/test_imports.py tests/test_project.py

# Builds the documentation into build/site; a warning fails it, which --quiet would prevent.
check-docs: env
	@NO_MKDOCS_2_WARNING=1 JAX_PLATFORMS=cpu $(PYTHON_IN_VENV) -m mkdocs build --strict

format: env
	@$(PYTHON_IN_VENV) -m ruff check --fix-only --quiet .
	@$(PYTHON_IN_VENV) -m ruff format .

notebooks: env
	@$(PYTHON_IN_VENV) tools/run_notebooks.py

clean:
	rm -rf .venv .venv-latest .pytest_cache .ruff_cache .hypothesis .jax_cache build *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
