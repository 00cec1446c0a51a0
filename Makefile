# make demo    watch a Mixture-of-Experts model forget, from a fresh machine; at most 8 minutes on 2 cores
# make test    every test; at most 40 minutes on 2 cores
# make quick   the developers' tier; at most 3 minutes
# make lint    ruff check and format
# make ledger  compile every Triton and CUDA kernel and record its registers, spills ...; no GPU needed
# make mutants   the tests against wrong versions of every Triton kernel; about half an hour on 2 cores
# make soak    the full exactness matrix of the fused step; hours on one core, `make soak SOAK="--minutes 30"` a sample
# make gpu     the kernels' tests and compute-sanitizer on this machine's GPU
# make bench   the whole step against transformers and torch, table and plots; 40 minutes, 15 GB of memory
# make bench-gpu   the same on this machine's GPU, three published geometries; at most 9 minutes
# make clean-cache   forget the trained models of the demo

PYTHON ?= python3
BIN := .venv/bin
# further arguments of `moe-unlearn demo`, e.g. make demo DEMO="--seeds 5 6 7"
DEMO ?=
# further arguments of the soak
SOAK ?=
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile
# a change here builds the native extension again
NATIVE := $(wildcard csrc/*.h csrc/*.cpp csrc/cpu/* csrc/cuda/*)

.PHONY: demo test quick lint ledger mutants soak gpu bench bench-gpu clean-cache clean

# without build isolation, so that the native extension is built against this very torch
.venv/.installed: pyproject.toml setup.py constraints.txt $(NATIVE)
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch "setuptools>=77" ninja
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable .[dev]
	touch $@

# the oldest supported Triton, beside the one the environment uses; its folder is only ever complete
OLDEST_TRITON := 3.6.0
OLDEST := .venv/triton-$(OLDEST_TRITON)

$(OLDEST): | .venv/.installed
	rm -rf $@.partial $@
	$(BIN)/python -m pip install --quiet --no-deps --target $@.partial triton==$(OLDEST_TRITON)
	mv $@.partial $@
	touch $@

demo: .venv/.installed
	$(BIN)/moe-unlearn demo $(DEMO)

test: .venv/.installed $(OLDEST)
	$(PYTEST)

quick: .venv/.installed
	$(PYTEST) -m quick

lint: .venv/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

ledger: .venv/.installed $(OLDEST)
	$(BIN)/python -m tests.static.ledger

mutants: .venv/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.mutants

soak: .venv/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.soak $(SOAK)

# in the machine's own environment: its torch is built for its CUDA and brings the Triton that goes with it
gpu:
	$(PYTHON) -m tests.gpu

bench: .venv/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.bench_step
	$(BIN)/python -m benchmarks.plots

bench-gpu:
	$(PYTHON) -m benchmarks.bench_step --device cuda

clean-cache: .venv/.installed
	$(BIN)/moe-unlearn demo --clean-cache

clean:
	rm -rf .venv build *.egg-info runs moe_unlearn/_C_*
