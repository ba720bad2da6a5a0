PYTHON ?= python3
VENV   := .venv
RUN    := $(VENV)/bin/python

.PHONY: setup train test test-all test-long lint soak bench-overhead bench-startup bench-checkpoint bench-tracking bench-tune bench-emotion bench-tables

train: $(VENV)/.base            ## train the default: handwritten digits, a minute on two cores
	$(RUN) train.py --config conf/digits.toml

setup: $(VENV)/.extra           ## everything, without running anything

test: $(VENV)/.extra            ## within 10 minutes on two cores
	$(RUN) -m pytest -n 2 --dist loadscope -m "not slow and not long"

test-all: $(VENV)/.extra        ## the slow ones
	$(RUN) -m pytest -n 2 --dist loadscope -m slow

test-long: $(VENV)/.extra       ## what needs an idle machine, or minutes of training
	$(RUN) -m pytest -m long

lint: $(VENV)/.extra
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

soak: $(VENV)/.extra            ## 200 kills
	$(RUN) tests/soak.py --kills 200

bench-overhead: $(VENV)/.bench
	$(RUN) benchmarks/overhead.py
	$(RUN) benchmarks/overhead.py --workload text

bench-startup: $(VENV)/.bench
	$(RUN) benchmarks/startup.py

bench-checkpoint: $(VENV)/.extra
	$(RUN) benchmarks/checkpoint.py

bench-tracking: $(VENV)/.bench
	$(RUN) benchmarks/tracking.py

bench-tune: $(VENV)/.extra
	$(RUN) benchmarks/tune.py

bench-emotion: $(VENV)/.extra
	$(RUN) benchmarks/emotion.py

bench-tables: $(VENV)/.extra    ## about two hours: three seeds of all recipes
	$(RUN) benchmarks/tables.py

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed: make PYTHON=python3.11 …")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.base: requirements.txt | $(VENV)/bin/python
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

$(VENV)/.extra: requirements-extra.txt $(VENV)/.base
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements-extra.txt
	touch $@

$(VENV)/.bench: benchmarks/requirements.txt $(VENV)/.extra
	$(RUN) -m pip install --quiet --disable-pip-version-check -r benchmarks/requirements.txt
	touch $@
