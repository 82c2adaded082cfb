# `make demo` and `make test` need python3 (3.11 or newer) and a package registry, nothing else: both set up .venv first.

# The first interpreter on PATH that is new enough. `make PYTHON=/path/to/python demo` chooses another one.
PYTHON ?= $(shell for p in python3 python python3.14 python3.13 python3.12 python3.11; do \
	"$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo "$$p" && break; done)
VENV := .venv
PY := $(VENV)/bin/python
# Most of what is installed is never imported: Python compiles what is, once, also where the environment forbids it to.
unexport PYTHONDONTWRITEBYTECODE
PIP := $(PY) -m pip install --disable-pip-version-check --no-compile -q
READY := $(VENV)/.ready

# The oldest peft that pyproject.toml allows; `make test-min-peft` runs the tuner against it, but for encoder-decoder
# models, whose class in that peft does not generate with the Transformers of constraints.txt, and for several
# processes and calibrated models, which take minutes.
MIN_PEFT := 0.21.0
MIN_PEFT_DIR := build/peft-$(MIN_PEFT)

# The oldest torch and Transformers that pyproject.toml allows, each in a folder of its own; `make test-ranges` runs there
# what depends on them: compiled code on torch, adapters of Transformers' own and saved files on Transformers. That torch
# comes with CUDA's libraries: gigabytes, on a machine without a GPU too. docs/where_it_runs.md says what has passed.
MIN_TORCH := 2.11.0
MIN_TRANSFORMERS := 5.0.0
RANGES := build/ranges

# What `make test-aside` needs and cannot have in $(VENV): timm's torchvision comes for CUDA builds of torch only, and what
# finds it beside another fails on import; DeepSpeed is built from source, against the torch that is there; gptqmodel
# asks for a newer torch than it needs. Both are built for minutes, so that `make test` does without them.
ASIDE := build/.ready

# Two processes with one thread each: torch's own threads would fight over the cores. In the order of their names, since
# files with few tests, which xdist puts last, are the longest.
PYTEST := OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist loadfile --no-loadscope-reorder
TEST := $(PYTEST) -m "not demo and not browser and not slow and not aside"

# Chromium is a package of the system, so this asks for the rights to install one; other tests need no browser.
SUDO := $(shell test "$$(id -u)" = 0 || echo sudo)
BROWSER := chromium chromium-driver

.PHONY: help setup aside demo test browser test-browser test-aside test-min-peft test-ranges test-slow docs lint bench clean
.DEFAULT_GOAL := help

help:
	@echo "make demo           fine-tune a real model in five ways and compare them (under ten minutes)"
	@echo "make test           the tests, but for those of the targets below"
	@echo "make browser        install Chromium (Debian and its kin: apt-get, with sudo where needed)"
	@echo "make test-browser   the tests of the report in Chromium"
	@echo "make test-aside     the tests with timm, DeepSpeed and gptqmodel, which it builds for minutes"
	@echo "make test-min-peft  the tuner's tests against peft $(MIN_PEFT), the oldest supported"
	@echo "make test-ranges    compiled code and Transformers' flows with the oldest versions allowed (gigabytes)"
	@echo "make test-slow      what an adapter is promised to survive, tried for hours"
	@echo "make docs           the documentation as a site, build/site/index.html"
	@echo "make lint           ruff and mypy"
	@echo "make bench          the benchmarks (about 40 minutes); 'python -m benchmarks --quick' for a fast look"
	@echo "make setup          only set up $(VENV)"
	@echo "make clean          remove $(VENV) and everything built"

setup: $(READY)

# The stamp is written last, so an interrupted set-up goes on at the next call.
# A virtual environment whose pip does not run is beyond repair and is made anew.
$(READY): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "No Python 3.11 or newer on PATH: install one, or name it: make PYTHON=/path/to/python"; exit 1; }
	@$(PY) -m pip --version >/dev/null 2>&1 || { echo "Making $(VENV) with $(PYTHON)"; rm -rf $(VENV); $(PYTHON) -m venv $(VENV); }
	@echo "Installing into $(VENV): a minute or a few, torch is large"
	$(PIP) -c constraints.txt -e '.[dev]'
	@touch $@

aside: $(ASIDE)

demo: $(READY)
	$(VENV)/bin/randlora demo

test: $(READY)
	@echo "The tests in two processes. Not among them: make test-aside, test-min-peft, test-ranges, test-browser, test-slow"
	$(TEST)

test-aside: $(READY) $(ASIDE)
	$(PYTEST) -m aside

browser:
	@{ command -v chromium && command -v chromedriver; } >/dev/null || { $(SUDO) apt-get update -q && $(SUDO) env DEBIAN_FRONTEND=noninteractive apt-get install -qy --no-install-recommends $(BROWSER) fonts-dejavu-core; }

# Thousands of cases for each property, 50 kills, an hour of soaking: docs/reliability.md has the figures of the last run.
test-slow: $(READY)
	HYPOTHESIS_PROFILE=slow OMP_NUM_THREADS=1 $(PY) -m pytest tests/reliability

test-browser: $(READY)
	OMP_NUM_THREADS=1 $(PY) -m pytest -m browser

# Every warning is an error: a link that leads nowhere, a docstring that cannot be read.
docs: $(READY)
	$(PY) -m sphinx -W --keep-going -q -b html docs build/site
	@echo "build/site/index.html"

lint: $(READY)
	$(PY) -m ruff check
	$(PY) -m ruff format --check
	$(PY) -m mypy src benchmarks

bench: $(READY)
	$(PY) -m benchmarks

$(MIN_PEFT_DIR)/.ready: $(READY)
	rm -rf $(MIN_PEFT_DIR)
	$(PIP) --no-deps --target $(MIN_PEFT_DIR) peft==$(MIN_PEFT)
	@touch $@

$(ASIDE): $(READY) constraints-aside.txt
	rm -rf build/timm build/deepspeed build/gptqmodel
	$(PIP) --no-deps -c constraints-aside.txt --target build/timm timm torchvision
	$(PIP) --no-deps --no-build-isolation -c constraints-aside.txt \
		--target build/deepspeed deepspeed hjson msgpack ninja nvidia-ml-py py-cpuinfo
	$(PIP) --no-deps -c constraints-aside.txt \
		--target build/gptqmodel gptqmodel defuser device-smi logbar optimum pypcre tokenicer
	@touch $@

test-min-peft: $(MIN_PEFT_DIR)/.ready
	PYTHONPATH="$(CURDIR)/$(MIN_PEFT_DIR)" $(PY) -c 'import peft; assert peft.__version__ == "$(MIN_PEFT)", peft.__version__'
	PYTHONPATH="$(CURDIR)/$(MIN_PEFT_DIR)" $(TEST) tests/tuner \
		--ignore tests/tuner/test_distributed.py --ignore tests/tuner/test_calibrated.py \
		--deselect tests/tuner/adapters/test_mixed_batch.py::TestGenerate::test_an_encoder_and_a_decoder

$(RANGES)/torch-%/.ready: $(READY)
	rm -rf $(@D)
	$(PIP) --target $(@D) torch==$*
	@touch $@

$(RANGES)/transformers-%/.ready: $(READY)
	rm -rf $(@D)
	$(PIP) --no-deps --target $(@D) transformers==$* 'huggingface_hub<2' 'tokenizers<0.23' httpx httpcore \
		accelerate==1.3.0 safetensors==0.4.5 packaging==23.0 peft==$(MIN_PEFT)
	@touch $@

.PRECIOUS: $(RANGES)/torch-%/.ready $(RANGES)/transformers-%/.ready

test-torch-%: $(RANGES)/torch-%/.ready
	PYTHONPATH="$(CURDIR)/$(<D)" OMP_NUM_THREADS=1 $(PY) -m pytest -k compiled tests/tuner/layers/test_linear.py tests/tuner/layers/test_conv.py \
		tests/tuner/layers/test_embedding.py tests/tuner/layers/test_parameter.py tests/tuner/test_training.py \
		tests/ops/gpu/test_availability.py

test-transformers-%: $(RANGES)/transformers-%/.ready
	PYTHONPATH="$(CURDIR)/$(<D)" OMP_NUM_THREADS=1 $(PY) -m pytest tests/tuner/test_register.py tests/tuner/test_trainers.py -k "not Sft"

test-ranges: test-torch-$(MIN_TORCH) test-transformers-$(MIN_TRANSFORMERS)

clean:
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
