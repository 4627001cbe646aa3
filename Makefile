# jaxvlm: one command for each thing a person does with a clone. `make` alone lists them.
#
#   PYTHON=python3.12    which Python makes the environment (default: python3, or the newest of 3.11 to 3.13 on PATH)
#   VENV=.venv           where the environment goes
#   EXTRAS=cuda13,serve  optional parts to install as well (setup.py lists them)
#   WORKERS=2            test processes
#   KERNEL_PYTHON=...    Python 3.12 or newer for the tests of the GPU kernels (default: found on PATH or in ~/.pyenv)
#   ARGS='-k packing'    more arguments for pytest, the trainer or the benchmark; `make test` then leaves out the GPU kernels

VENV ?= .venv
WORKERS ?= 2
EXTRAS ?=
ARGS ?=
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && { echo $$p; exit; }; done; echo python3)

# The GPU kernels need jax 0.11.2, which needs Python 3.12: they are tested in an environment of their own.
KERNEL_PYTHON ?= $(shell for p in python3.12 python3.13 python3 $(HOME)/.pyenv/versions/3.1[23]*/bin/python3; do \
	$$p -c 'import sys; sys.exit(not (3, 12) <= sys.version_info < (3, 14))' >/dev/null 2>&1 && { echo $$p; exit; }; done)
KERNELS := $(VENV)-kernels
LMMS := $(VENV)-lmms
NEED_KERNELS ?=

BIN := $(VENV)/bin
# A stamp says that an installation is done. It is older than setup.py when dependencies have changed.
BASE := $(VENV)/.installed$(if $(EXTRAS),-$(EXTRAS))
TEST := $(VENV)/.installed-test
DEV := $(VENV)/.installed-dev
# Bytecode is not written while installing (half of pip's time, most of it for modules never imported) but when a module
# is first imported, so imports must be allowed to write it.
unexport PYTHONDONTWRITEBYTECODE
unexport PYTHONPATH PYTHONHOME

.DEFAULT_GOAL := help
.PHONY: help setup quickstart test test-kernels test-lmms test-slow test-faults test-plan test-gpu lint format bench models plans notebook clean
.DELETE_ON_ERROR:

help: ## this list
	@echo 'jaxvlm. Times are for 2 CPU cores and a fast connection.'
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1|\2/p' $(firstword $(MAKEFILE_LIST)) | \
		awk -F'|' '{printf "%-18s %s\n", $$1, $$2}'

setup: $(BASE) ## make .venv and install jaxvlm in it (1 minute; 1 GB of disk)
	@echo "jaxvlm is installed in $(VENV). Next: make quickstart, or $(BIN)/jaxvlm doctor"

quickstart: $(BASE) ## set up, then train a small VLM, evaluate it and write a report (about 15 minutes)
	$(BIN)/python -m jaxvlm.main --config configs/quickstart.py --workdir runs/quickstart $(ARGS)

test: $(TEST) ## set up with the test tools, then run the tests, those of the GPU kernels too (under 25 minutes)
	$(call PYTEST,-n $(WORKERS) --dist loadfile tests)
	$(if $(ARGS),,@$(MAKE) --no-print-directory test-kernels)

test-kernels: ## the GPU kernels in the interpreter and compiled for a GPU, no GPU needed (Python 3.12 and 1 GB more; 3 minutes)
	@if [ -n "$(KERNEL_PYTHON)" ]; then $(MAKE) --no-print-directory $(KERNELS)/.tested ARGS='$(ARGS)'; \
	else echo 'Not tested: the GPU kernels. That takes Python 3.12 or 3.13, of which there is none on PATH or in ~/.pyenv/versions;'; \
		echo 'KERNEL_PYTHON=/path/to/python3.12 names one.'; [ -z "$(NEED_KERNELS)" ]; fi

test-lmms: $(LMMS)/.installed ## evaluations by lmms-eval itself, offline, in an environment of its own (2 GB more; 3 minutes)
	@start=$$(date +%s); $(LMMS)/bin/python -m pytest -rs tests/test_lmms.py $(ARGS); code=$$?; \
	echo "The tests with lmms-eval took $$(($$(date +%s) - start)) s."; exit $$code

test-slow: $(TEST) ## tests that take minutes each or need the downloaded assets (up to an hour)
	$(call PYTEST,-m slow tests)

test-plan: $(VENV)/.installed-test,plan-tpu,plan-gpu ## compile for TPU and GPU topologies, no accelerator needed (1.5 GB more; up to an hour)
	$(call PYTEST,-m plan tests)

test-faults: $(TEST) ## 50 kills and every other fault, on jobs of 2 and 4 processes; writes docs/reliability.md (half an hour)
	$(BIN)/python tests/fault_runs.py $(ARGS)

test-gpu: $(TEST) ## kernels and train step on an NVIDIA GPU; says so and stops where there is none
	@if [ -e /dev/nvidiactl ] || [ -e /dev/dxg ] || nvidia-smi -L >/dev/null 2>&1; then \
		if $(BIN)/python -c 'import jax, sys; sys.exit(jax.default_backend() != "gpu")' 2>/dev/null; then \
			JAXVLM_TEST_PLATFORM=cuda,cpu $(BIN)/python -m pytest -m gpu tests $(ARGS); \
		else echo "A GPU is here but jax does not see it. '$(BIN)/jaxvlm doctor' says what to install."; exit 1; fi; \
	else echo 'Skipped: this machine has no NVIDIA GPU.'; fi

lint: $(DEV) ## ruff and the notebook's sync, without changing anything (seconds)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest -q tests/test_notebook.py -k source

format: $(DEV) ## let ruff rewrite what it can, notebooks in step (seconds)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/jupytext --quiet --update --to ipynb colab/quickstart.py

bench: $(TEST) ## this machine's speed beside torch's (about 5 minutes on an idle machine)
	$(BIN)/python benchmarks/cpu_step.py $(ARGS)

models: $(TEST) ## docs/models.md anew: every family, and the error that its tests measure (minutes)
	rm -f docs/parity.jsonl
	JAXVLM_PARITY_LOG=$(CURDIR)/docs/parity.jsonl $(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile \
		$$(grep -l record_parity tests/test_*.py)
	sort -o docs/parity.jsonl docs/parity.jsonl
	$(BIN)/python docs/make_models.py

plans: $(VENV)/.installed-test,plan-tpu,plan-gpu ## what docs/plans.json lacks, and the tables of docs/plans.md and docs/scaling.md (an hour from nothing)
	$(BIN)/python docs/make_plans.py $(ARGS)

notebook: $(TEST) ## make colab/*.ipynb from the .py beside it (seconds)
	$(BIN)/jupytext --update --to ipynb colab/quickstart.py

clean: ## remove the environment and what tools left behind; runs/ and downloads stay
	rm -rf $(VENV) $(KERNELS) $(LMMS) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# ------------------------------------------------------------------------------------------------------- environments

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo "jaxvlm needs Python 3.11 or newer; '$(PYTHON)' is $$($(PYTHON) --version 2>&1 || true)."; \
		echo 'Install one (apt install python3 python3-venv, brew install python@3.12, uv python install 3.12),'; \
		echo 'or name it: make PYTHON=/path/to/python3.12 ...'; exit 1; }
	@echo "Making an environment in $(VENV) with $$($(PYTHON) --version)."
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
		echo "That Python cannot make environments. On Debian and Ubuntu: apt install python3-venv"; exit 1; }

$(BASE): setup.py pyproject.toml | $(BIN)/python
	$(call INSTALL,.$(if $(EXTRAS),[$(EXTRAS)]),about 40 seconds and 0.9 GB of disk)

$(TEST): setup.py pyproject.toml | $(BIN)/python
	$(call INSTALL,.[test],torch for comparison included: 1.5 minutes and 2 GB of disk)
	@touch $(VENV)/.installed

$(DEV): setup.py pyproject.toml | $(BIN)/python
	$(call INSTALL,.[dev],1.5 minutes and 2 GB of disk)
	@touch $(VENV)/.installed $(TEST)

$(VENV)/.installed-test,plan-tpu,plan-gpu: setup.py pyproject.toml | $(BIN)/python
	$(call INSTALL,.[test$(COMMA)plan-tpu$(COMMA)plan-gpu],compilers for TPU and GPU included: 3 minutes and 3.5 GB of disk)

COMMA := ,

$(KERNELS)/.installed: setup.py
	@echo "Making an environment for the GPU kernels in $(KERNELS) with $$($(KERNEL_PYTHON) --version): half a minute and 1 GB."
	@$(KERNEL_PYTHON) -m venv --clear $(KERNELS)
	@$(KERNELS)/bin/python -m pip install --disable-pip-version-check --no-input -q \
		'jax>=0.11.2,<0.13' 'jax-cuda13-plugin>=0.11.2,<0.13' absl-py flax optax 'pytest>=8.3' 'pytest-xdist>=3.6' 'hypothesis>=6.100'
	@touch $@

.PHONY: $(KERNELS)/.tested
$(KERNELS)/.tested: $(KERNELS)/.installed
	@echo "Running the tests of the GPU kernels with $$($(KERNELS)/bin/python --version)"
	@$(KERNELS)/bin/python -m pytest -m mosaic_gpu -n $(WORKERS) tests/test_gpu_attention.py tests/test_gpu_programs.py $(ARGS)

# lmms-eval without most of what it depends on (150 packages, for its own models and some metrics): these its command line imports.
LMMS_NEEDS := torch==2.13.0 accelerate datasets evaluate httpx jsonlines openpyxl loguru peft pytablewriter python-dotenv \
	pydantic sacrebleu scikit-learn tenacity pytest hypothesis

$(LMMS)/.installed: setup.py | $(BIN)/python
	@echo "Making an environment for lmms-eval in $(LMMS): 2 minutes and 2 GB."
	@$(BIN)/python -m venv --clear $(LMMS)
	@$(LMMS)/bin/python -m pip install --disable-pip-version-check --no-input -q -e . $(LMMS_NEEDS) \
		"$$(sed -n 's/.*"\(filelock[^"]*\)".*/\1/p' setup.py)"
	@$(LMMS)/bin/python -m pip install --disable-pip-version-check --no-input -q --no-deps \
		"$$(sed -n 's/.*"\(lmms-eval[^"]*\)".*/\1/p' setup.py)"
	@touch $@

# Installs $(1) with pip, whose output goes to a log; every ten seconds the log's last line shows where it stands.
# Ends by importing everything once, which shows that the installation works and writes the bytecode.
define INSTALL
	@start=$$(date +%s); log=$(VENV)/pip.log; rm -f $$log.status; \
	echo "Installing $(1) with its dependencies: $(2)."; \
	( $(BIN)/python -m pip install --disable-pip-version-check --no-input --no-compile --progress-bar off \
		-e "$(1)" >$$log 2>&1; echo $$? >$$log.status ) & \
	ticks=0; while [ ! -s $$log.status ]; do \
		sleep 1; ticks=$$((ticks + 1)); \
		[ $$((ticks % 10)) -ne 0 ] || echo "  $$ticks s: $$(grep -v '^WARNING' $$log | tail -n 1 | sed 's/^ *//; s/ (from .*//' | cut -c 1-72)"; \
	done; \
	if [ "$$(cat $$log.status)" != 0 ]; then grep -v '^WARNING' $$log | tail -n 15; \
		echo "The installation failed; all of pip's output is in $$log. Run the same command again to retry."; exit 1; fi; \
	$(BIN)/python -c 'import jax, flax.linen, optax, grain, gguf, tokenizers, ml_collections, PIL.Image, safetensors; \
		from orbax.checkpoint import v1' || { echo "The installation does not import. 'make clean' and try again."; exit 1; }; \
	echo "Installed in $$(($$(date +%s) - start)) s."
	@touch $@
endef

# Runs pytest with $(1). Exit code 5, no test collected, is a failure too.
define PYTEST
	@start=$$(date +%s); echo "Running the tests: pytest $(1) $(ARGS)"; \
	$(BIN)/python -m pytest $(1) $(ARGS); code=$$?; \
	echo "Tests took $$(($$(date +%s) - start)) s."; exit $$code
endef
