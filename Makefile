# Everything a newcomer types. Each target makes .venv by itself, and again only when pyproject.toml changes.
#
#   make quickstart      assemble, train, evaluate and ask a small model
#   make test            the tests
#   make lint            ruff and mypy
#   make docs            write the generated reference pages again
#
# PYTHON=python3.12 chooses the interpreter; TORCH=torch==2.13.0+cpu a build of torch, which otherwise pip chooses by
# its own settings; VENV_FLAGS=--system-site-packages keeps a torch that the machine's vendor installed.
# ARGS="..." goes to vistune quickstart or to pytest.

JOBS ?= 2
STAMP := .venv/installed

export PYTHON TORCH VENV_FLAGS

.DEFAULT_GOAL := help
.PHONY: help setup quickstart test lint docs clean

help:
	@sed -n '1,/^$$/s/^# \{0,1\}//p' Makefile

setup: $(STAMP)

$(STAMP): pyproject.toml scripts/setup
	@scripts/setup

quickstart: $(STAMP)
	@.venv/bin/vistune quickstart $(ARGS)

test: $(STAMP)
	@.venv/bin/python -m pytest -n $(JOBS) --dist loadfile $(ARGS)

lint: $(STAMP)
	@.venv/bin/ruff check .
	@.venv/bin/ruff format --check .
	@.venv/bin/mypy

docs: $(STAMP)
	@.venv/bin/python scripts/reference.py

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis
