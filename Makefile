# make quickstart: the whole path on two CPU cores. make smollm2: a real model, from the Hub. make test: what CI runs.
# All set up .venv themselves.

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip install --quiet --disable-pip-version-check

.PHONY: quickstart smollm2 test lint clean

quickstart: $(VENV)/installed
	PYTHON=$(PY) sh recipes/quickstart.sh

smollm2: $(VENV)/installed
	PYTHON=$(PY) sh recipes/smollm2.sh

test: $(VENV)/installed-test lint
	OMP_NUM_THREADS=1 $(PY) -m pytest -n auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder

lint: $(VENV)/installed-test
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

$(VENV)/installed: requirements.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "nanoA2D needs Python 3.11 or newer; pass PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) -r requirements.txt
	touch $@

$(VENV)/installed-test: requirements-test.txt $(VENV)/installed
	$(PIP) -r requirements-test.txt
	touch $@

clean:
	rm -rf $(VENV) runs/quickstart
