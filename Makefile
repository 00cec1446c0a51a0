# make demo    watch a Mixture-of-Experts model forget, from a fresh machine; at most 8 minutes on 2 cores
# make test    every test; at most 40 minutes on 2 cores
# make quick   the developers' tier; at most 3 minutes
# make lint    ruff check and format
# make clean-cache   forget the trained models of the demo

PYTHON ?= python3
BIN := .venv/bin
# further arguments of `moe-unlearn demo`, e.g. make demo DEMO="--seeds 1 2 3"
DEMO ?=
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile
# a change here builds the native extension again
NATIVE := $(wildcard csrc/*.cpp csrc/cpu/* csrc/cuda/*)

.PHONY: demo test quick lint clean-cache clean

# without build isolation, so that the native extension is built against this very torch
.venv/.installed: pyproject.toml setup.py constraints.txt $(NATIVE)
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch "setuptools>=77" ninja
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable .[dev]
	touch $@

demo: .venv/.installed
	$(BIN)/moe-unlearn demo $(DEMO)

test: .venv/.installed
	$(PYTEST)

quick: .venv/.installed
	$(PYTEST) -m quick

lint: .venv/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean-cache: .venv/.installed
	$(BIN)/moe-unlearn demo --clean-cache

clean:
	rm -rf .venv build *.egg-info runs moe_unlearn/_C_*
