# make quickstart: the whole path on two CPU cores. make test: what CI runs. Both set up .venv themselves.

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
export OMP_NUM_THREADS ?= $(shell nproc 2>/dev/null || echo 2)

.PHONY: quickstart test lint clean

quickstart: $(VENV)/installed
	PYTHON=$(PY) sh recipes/quickstart.sh

test: $(VENV)/installed lint
	$(PY) -m pytest

lint: $(VENV)/installed
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

$(VENV)/installed: requirements.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "nanoA2D needs Python 3.11 or newer; pass PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

clean:
	rm -rf $(VENV) runs/quickstart
