# Everything here needs Python 3.11 or newer, make, and a Python package index; the rest is built into .venv.
SHELL := /bin/bash
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= $(firstword $(foreach name,python3 python3.13 python3.12 python3.11 python,\
	$(shell $(name) -c 'import sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $(name))))
MODEL ?= tiny-llama-m
# Not results/, which holds the committed reference: what is found there would not be measured again.
RESULTS ?= runs
RUN := .venv/bin/python

AGAINST ?= gptq,cka-hybrid
# What is given on the command line is handed on; what is not keeps the default of `ptq reproduce`.
OPTIONS := $(if $(METHODS),--methods $(METHODS)) $(if $(TASKS),--tasks $(TASKS)) $(if $(filter-out 0,$(FAST)),--fast) \
	$(if $(WBITS),--wbits $(WBITS)) $(if $(ABITS),--abits $(ABITS)) $(if $(MODE),--mode $(MODE)) \
	$(if $(CALIB),--calib $(CALIB)) $(if $(SEED),--seed $(SEED)) --results $(RESULTS) $(ARGS)

# Against other methods on one model, or against a reference: of its models all, unless one is given.
JUDGED = $(if $(BASELINE),--against-baseline $(BASELINE) $(if $(filter-out file,$(origin MODEL)),--model $(MODEL)), \
	--against $(AGAINST) --model $(MODEL) $(if $(WBITS),--wbits $(WBITS)) $(if $(ABITS),--abits $(ABITS)) \
	$(if $(filter-out 0,$(FAST)),--fast) $(if $(SEED),--seed $(SEED))) \
	$(if $(PLUGIN),--plugin $(PLUGIN)) $(if $(TASKS),--tasks $(TASKS)) --results $(RESULTS) $(ARGS)

.PHONY: help setup reproduce ablate regress test bench peers lint clean

help:
	@echo "make setup       builds the environment in .venv (the other commands do so by themselves)"
	@echo "make reproduce   compares the methods on a model: tables and plots in $(RESULTS)/"
	@echo "                   MODEL=$(MODEL) METHODS=gptq,cka-hybrid TASKS=world_math WBITS=3 ABITS=8 MODE=native"
	@echo "                   FAST=1 CALIB=text.txt SEED=1 RESULTS=folder ARGS='any option of ptq reproduce'"
	@echo "make regress     judges a method: METHOD=my_method PLUGIN=my_method.py AGAINST=$(AGAINST) MODEL=$(MODEL)"
	@echo "                   or today's code: BASELINE=results/baselines/embedded.json MODEL=tiny-llama-s"
	@echo "make ablate      all ablations: MODELS=\"tiny-llama-s tiny-qwen-s\" FAST=1 EXPERIMENTS=pool,metric"
	@echo "make test        runs all tests; make test ARGS='-m \"not slow\"' only the fast ones"
	@echo "make bench       measures the speed of the methods, the hybrid and the evaluation"
	@echo "make peers       builds an environment with llm-compressor in .venv-peers, for comparisons with it"
	@echo "make lint        checks the style"
	@echo "make clean       removes .venv, .venv-peers and caches; results/ stays"
	@echo "PYTHON=...       the interpreter to build with, now: $(or $(PYTHON),none found)"

# The stamp holds the folder it was made in: the editable installation does not survive being moved.
ifneq ($(shell cat .venv/stamp 2>/dev/null),$(CURDIR))
.PHONY: .venv/stamp
endif
.venv/stamp: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "make: no Python 3.11 or newer was found: give one with PYTHON=/path/to/python" >&2; exit 2; }
	@$(PYTHON) -c 'import sys, venv; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "make: $(PYTHON) is not Python 3.11 or newer with its venv module: give another with PYTHON=..." >&2; exit 2; }
	@echo "Building the environment in .venv with $$($(PYTHON) --version); this takes a few minutes."
	@rm -f $@; $(RUN) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv
	@$(RUN) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@echo "$(CURDIR)" > $@

setup: .venv/stamp

reproduce: .venv/stamp
	@$(RUN) -m suite.cli reproduce $(MODEL) $(OPTIONS)

regress: .venv/stamp
	@$(RUN) -m suite.cli compare $(METHOD) $(JUDGED)

ablate: .venv/stamp
	@$(RUN) -m suite.cli ablate $(or $(MODELS),$(MODEL)) $(if $(filter-out 0,$(FAST)),--fast) \
		$(if $(EXPERIMENTS),--experiments $(EXPERIMENTS)) --results $(RESULTS) $(ARGS)

test: .venv/stamp
	@$(RUN) -m pytest $(ARGS)

bench: .venv/stamp
	@$(RUN) -m suite.bench $(ARGS)

# llm-compressor pins versions that the suite does not bend to: an environment of its own.
.venv-peers/stamp: peers/requirements.txt
	@test -n "$(PYTHON)" || { echo "make: no Python 3.11 or newer was found: give one with PYTHON=/path/to/python" >&2; exit 2; }
	@rm -f $@; $(PYTHON) -m venv .venv-peers
	@.venv-peers/bin/python -m pip install --quiet --disable-pip-version-check -r peers/requirements.txt
	@touch $@

peers: .venv-peers/stamp

lint: .venv/stamp
	@$(RUN) -m ruff check .

clean:
	rm -rf .venv .venv-peers .pytest_cache .ruff_cache build dist
	find suite baselines tests -name __pycache__ -type d -prune -exec rm -rf {} +
