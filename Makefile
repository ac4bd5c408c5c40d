# The README's two commands are `make demo` and `make test`; each makes its own environment in a fresh clone.
PYTHON ?= python3
export HF_HUB_OFFLINE ?= 1
export DO_NOT_TRACK = 1
export PREFECT_SERVER_ANALYTICS_ENABLED = false
# Threads of OpenMP sleep while they wait. Spinning, they take the cores from each other on a busy machine.
export OMP_WAIT_POLICY ?= PASSIVE
# PyPI's torch for Linux brings gigabytes of CUDA. pip takes a CPU build instead, if it is given an index or a folder
# that has one, but only while PyPI has no newer version within this bound. Set TORCH=torch to get the newest.
TORCH ?= 'torch<2.14'
BIN = .venv/bin
SHELL = /bin/bash
.SHELLFLAGS = -o pipefail -c
# MiniLM whole, one pass over 76 batches of 32 short texts: two minutes on two cores without AVX-512 or bf16
DEMO_TRAINING = --architecture biencoder --dropout 0 --max-length 48 --max-steps 76 --warmup-steps 8 \
	--learning-rate 5e-5 --chunk-tokens 4096 --log-every 5
# The two-stage model with 24 context documents, made of MiniLM's first layers, on the same batches. It has to learn how
# to read its context from nothing, so on data this small it shows the method and not its quality.
DEMO_CONTEXTUAL = --num-layers 3 --dropout 0 --context-size 24 --max-length 48 --max-steps 152 --warmup-steps 15 \
	--learning-rate 1e-4 --log-every 5
DEMO = workspace/demo-training

.PHONY: demo demo-contextual docs examples speedrun test soak lint check up down clean

demo: .venv/.installed-demo
	$(call train-and-search,trained,$(DEMO_TRAINING))

demo-contextual: .venv/.installed-demo
	$(call train-and-search,contextual,$(DEMO_CONTEXTUAL))

# $(1) is the folder of the training, $(2) its flags. A killed demo continues where it was.
define train-and-search
	@set -e; \
	echo "1 of 3: pairs from docstrings of installed packages, embedded and packed into batches"; \
	shards=$$($(BIN)/hardbatch demo | tee -a /dev/stderr | tail -n 1); \
	output="$(DEMO)/$$(basename "$$shards")"; \
	echo "2 of 3: training on these batches"; \
	$(BIN)/python trainer/main.py --shards "$$shards" --output "$$output/$(1)" --resume auto $(2); \
	echo "3 of 3: held-out questions, searched over all documents of the corpus; 'stock' is MiniLM as published,"; \
	echo "'export' the model just trained; both read the first 48 tokens of a text, and BM25 all words"; \
	$(BIN)/python benchmarks/demo.py "$$shards" "$$output"; \
	TQDM_DISABLE=1 $(BIN)/python -m hardbatch.trainer.evaluate --collection "$$output/held-out-questions" \
		--model "$$output/stock" --model "$$output/$(1)/export"
endef

# the entries of benchmarks/quality/speedrun.toml; see docs/speedrun.md
speedrun: .venv/.installed-demo
	$(BIN)/python benchmarks/quality/speedrun.py --workspace workspace/speedrun

# each under two minutes on two cores
examples: .venv/.installed-dev
	@set -e; for example in batches_for_sentence_transformers your_own_loop second_round; do \
		echo "examples/$$example.py"; $(BIN)/python examples/$$example.py; \
	done
	$(BIN)/python examples/run_notebook.py examples/notebook.ipynb

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

# the site of docs/, into workspace/site
docs: .venv/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "workspace/site/index.html"

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
