# make demo    watch a Mixture-of-Experts model forget, from a fresh machine; at most 8 minutes on 2 cores
# make quick   the developers' tier; at most 2 minutes on 2 cores
# make test    every test that a change must pass; at most 20 minutes on 2 cores
# make nightly   what that leaves out: other architectures, the oldest Triton, repetitions, whole mutants, samples of the
#              soak and of the study; a night on 2 cores
# make extremes   what a library's products decide, held against the most and the least accurate products; 5 minutes
# make portable   the same as on other processors too: AVX2, AVX-512, with BF16, none; at most 15 minutes
# make versions   tests of what reaches into transformers, torch and PEFT, against the oldest and the newest allowed;
#              it makes two environments in .venv/versions; part of `make nightly`
# make lint    ruff check and format, and mypy on the package
# make ledger  compile every Triton and CUDA kernel and record its registers, spills ...; no GPU needed
# make mutants   the tests against wrong versions of every Triton, C++ and CUDA kernel; about an hour on 2 cores;
#              `make mutants MUTANTS="--family cuda"` those of CUDA, `--family native` those of C++
# make soak    the full exactness matrix of the fused step, and steps of two ranks, verified and killed; 2 hours on 2
#              cores; `make soak SOAK="--minutes 30" SOAK_RANKS="--minutes 10"` a sample
# make gpu-rehearsal   all of the next that can be done without a GPU: build, load, collect, compile; several gigabytes
# make gpu     the kernels proven on this machine's GPU, in at most 5 minutes; `make gpu GPU="--out DIR"` elsewhere
# make bench   every op and the whole step against what else there is: one file, pictures, the tables of results, and one
#              table of ours against every peer, where figures of a GPU that is not here are predicted; at most 15 minutes
#              on one core, 15 GB of memory; `make bench BENCH="--only route"` a part
# make bench-gpu   the same on this machine's GPU, published geometries, what matters first; at most 4 minutes
# make gpu-ranks    what several GPUs alone can prove of ranks that share weights out: order, memory, overlap, a lost
#              rank; two GPUs, torch 2.13, some 3 minutes
# make gpu-wheels   peers that `make bench-gpu` measures too, fetched beforehand into build/gpu-wheels
# make gpu-report DIR=...   what both left, in results, their tables and the choice of implementations
# make bench-step  the whole step alone, in full: growth, memory, NPO, MOLLM; 40 minutes, 15 GB of memory
# make size    each verb of the command line on a checkpoint of 3.8 GB, its memory held against what is planned; half an
#              hour, 10 GB of memory, 20 GB of disk
# make scorecard   what faults of the disk, kills and damaged files do to every verb, an hour of them on 2 cores
# make study   what each lever buys, half an hour on 2 cores; `make study STUDY=` the whole study, 2 hours and more,
#              goes on where it was stopped
# make clean-cache   forget the trained models of the demo

PYTHON ?= python3
BIN := .venv/bin
# further arguments of `moe-unlearn demo`, e.g. make demo DEMO="--seeds 5 6 7"
DEMO ?=
# further arguments of the soak, and of its part on ranks
SOAK ?=
SOAK_RANKS ?=
# further arguments of the mutants
MUTANTS ?=
# further arguments of the benchmark suite
BENCH ?=
# further arguments of a GPU run, and where its lines lie
GPU ?=
DIR ?= benchmarks/results
# which study: --small or, empty, the whole
STUDY ?= --small
# tests start threads of their own, which must not wait for each other in loops; they start interpreters too, which would
# compile every module anew, and pytest rewrite every test, where the environment forbids to keep bytecode
PYTEST := PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n 2 --dist loadfile
# in the order of tests/support/order.py
PYTEST += --no-loadscope-reorder
# a change here builds the native extension again
NATIVE := $(wildcard csrc/*.h csrc/*.cpp csrc/cpu/* csrc/cuda/*)

.PHONY: demo quick test nightly nightly-tests soak-sample extremes portable versions lint ledger mutants soak scorecard gpu gpu-install gpu-ranks gpu-rehearsal gpu-wheels gpu-report
.PHONY: bench bench-step bench-gpu size study clean-cache clean

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

quick: .venv/.installed
	$(PYTEST) -m "quick and not slow and not nightly"

test: .venv/.installed
	$(PYTEST) -m "not nightly"

# each whatever became of those before it: a night finds more than one fault
nightly:
	$(MAKE) --keep-going nightly-tests versions portable mutants study soak-sample

nightly-tests: .venv/.installed $(OLDEST)
	$(PYTEST) -m nightly

soak-sample: SOAK := --minutes 30
soak-sample: SOAK_RANKS := --minutes 10
soak-sample: soak

extremes: .venv/.installed
	$(BIN)/python -m tests.portable --only products

portable: .venv/.installed
	$(BIN)/python -m tests.portable

versions: .venv/.installed
	PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/python -m tests.versions

lint: .venv/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

ledger: .venv/.installed $(OLDEST)
	$(BIN)/python -m tests.static.ledger

mutants: .venv/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.mutants $(MUTANTS)

soak: .venv/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.soak --jobs $$(nproc) $(SOAK)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.soak_ranks $(SOAK_RANKS)

scorecard: .venv/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.trust.scorecard --jobs $$(nproc) $(SCORECARD)

# offline, into the machine's own environment; libraries of these sources that are there already are not built again
gpu-install:
	$(PYTHON) -m tests.gpu_stages || rm -f moe_unlearn/_C_*.so
	MOE_UNLEARN_BUILD=$${MOE_UNLEARN_BUILD-$$(ls moe_unlearn/_C_cuda*.so >/dev/null 2>&1 && echo 0)} \
		$(PYTHON) -m pip install --no-index --no-deps --no-build-isolation --editable .
	$(PYTHON) -m tests.gpu_stages --built

gpu bench-gpu gpu-ranks: gpu-install

gpu-rehearsal:
	$(PYTHON) -m tests.gpu_rehearsal

# in the machine's own environment: its torch is built for its CUDA and brings the Triton that goes with it
gpu:
	$(PYTHON) -m tests.gpu_run 1 $(GPU)

gpu-ranks:
	$(PYTHON) -m tests.gpu_ranks --out $(DIR) $(GPU)

gpu-wheels:
	$(PYTHON) -m pip download --quiet --no-deps --only-binary :all: --dest build/gpu-wheels liger-kernel cut-cross-entropy

gpu-report: .venv/.installed
	$(BIN)/python -m benchmarks.gpu_report $(DIR)

bench: .venv/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.suite $(BENCH)
	$(BIN)/python -m benchmarks.plots
	$(BIN)/python -m benchmarks.readme
	$(BIN)/python -m benchmarks.peers_table

bench-step: .venv/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.bench_step
	$(BIN)/python -m benchmarks.plots

size: .venv/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.size || test $$? = 1
	$(BIN)/python -m benchmarks.plots
	$(BIN)/python -m benchmarks.readme

study: .venv/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.study $(STUDY)
	$(BIN)/python -m benchmarks.study $(STUDY) --report
	$(BIN)/python -m benchmarks.readme

bench-gpu:
	$(PYTHON) -m tests.gpu_run 2 $(GPU)

clean-cache: .venv/.installed
	$(BIN)/moe-unlearn demo --clean-cache

clean:
	rm -rf .venv build *.egg-info runs moe_unlearn/_C_*
