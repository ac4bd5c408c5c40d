# The README's two commands are `make demo` and `make test`; each makes its own environment in a fresh clone.
PYTHON ?= python3
export HF_HUB_OFFLINE ?= 1
export DO_NOT_TRACK = 1
export PREFECT_SERVER_ANALYTICS_ENABLED = false
# PyPI's torch for Linux brings gigabytes of CUDA. pip takes a CPU build instead, if it is given an index or a folder
# that has one, but only while PyPI has no newer version within this bound. Set TORCH=torch to get the newest.
TORCH ?= 'torch<2.14'
BIN = .venv/bin
SHELL = /bin/bash
.SHELLFLAGS = -o pipefail -c
# about three minutes on two cores: MiniLM's first layers in both stages, 24 context documents
DEMO_TRAINING = --num-layers 3 --dropout 0 --context-size 24 --max-length 48 --max-steps 120 --warmup-steps 15 \
	--learning-rate 1e-4 --eval holdout

.PHONY: demo test soak lint check up down clean

demo: .venv/.installed-demo
	@shards=$$($(BIN)/hardbatch demo | tee /dev/stderr | tail -n 1) && \
		$(BIN)/python trainer/main.py --shards "$$shards" --output "workspace/demo-training/$$(basename "$$shards")" \
		--resume auto $(DEMO_TRAINING)

test: .venv/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto tests

# the whole reliability matrix, long half included, and the table of its figures; wants HARDBATCH_DATA
soak: .venv/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto -m 'soak or not soak' tests/reliability

lint: .venv/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

check: lint test

up: .venv/.installed-demo
	@$(BIN)/python -m hardbatch.flows.service up

down: .venv/.installed-demo
	@$(BIN)/python -m hardbatch.flows.service down

clean:
	rm -rf build *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "hardbatch needs Python 3.11 or newer; name one: make PYTHON=/path/to/python3 ..."; exit 2; }
	$(PYTHON) -m venv .venv

.venv/.installed-%: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[cpu,$*]' $(TORCH)
	@touch $@
