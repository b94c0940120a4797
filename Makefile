# Two commands: `make quickstart` runs the whole path (6 minutes on 2 cores), `make test` the suite (7).
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.PHONY: quickstart test lint clean

quickstart: $(STAMP)
	@echo "== quickstart: SFT, GRPO on mutual welfare, evaluation, report, HF export"
	$(BIN)/python -m experiments.train --config=configs/quickstart.py --workdir=runs/quickstart

test: $(STAMP)
	@echo "== test: the whole suite on eight fake CPU devices, two modules at a time"
	$(BIN)/python -m pytest -q -n 2 --dist=loadfile

lint: $(STAMP)
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

$(STAMP): requirements.txt setup.py
	@echo "== install: $(VENV) with the pinned requirements (a few minutes the first time)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	@touch $(STAMP)

clean:
	rm -rf $(VENV) runs build dist *.egg-info
