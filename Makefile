# make demo    set up, then the main job on the embedded backdoored model (report in demo-report/report.html)
# make test    set up, then the tests (under 12 minutes on 2 cores)
# make check   linters and types
# make slow    the slower test lanes: training a pair from scratch, wheels in fresh environments
# make bench   time every op next to plain PyTorch (about 5 minutes) and write the table into README.md
# make bench-sweep  time sweeps next to hook loops (about 15 minutes on 2 cores) and write the table into README.md
# make bench-svd  time singular vectors of deltas next to other methods, and from disk to result next to reading the same
#              files alone (about 15 minutes, 1.6 GB), likewise
# make bench-peers  install other libraries and run the same sweep in them (about 15 minutes and 6 GB), likewise
# make readme  measure the demo and write its figures and picture into README.md
#
# VENV=DIR     use (or make) the virtual environment DIR instead of .venv; a torch that is already there is kept
# PYTHON=...   the interpreter that makes the environment
# TORCH=...    what to install when there is no torch yet; TRITON=... likewise

VENV   ?= .venv
PYTHON ?= python3
TORCH  ?= torch==2.13.0
TRITON ?= triton==3.6.0
BIN    := $(VENV)/bin
READY  := $(VENV)/.bkdfast-ready
# One thread a process: the models of the tests are tiny, and two processes share the cores.
PYTEST := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest

# The files that run the C++ kernels, again for each instruction set that the CPU can be told to do without.
KERNELS := tests/ops/test_patch_heads.py tests/ops/test_delta_sketch.py tests/ops/test_cosine_monitor.py tests/ops/test_norm_tap.py \
           tests/ops/test_prefix_attention.py tests/ops/test_tall_products.py
# Those that use the matrix unit (AMX) where there is one, and AVX-512 without.
MATRIX_UNIT := tests/ops/test_delta_sketch.py

.PHONY: demo test slow check bench bench-sweep bench-svd bench-peers readme setup clean help
.DEFAULT_GOAL := help

help:
	@sed -n '/^$$/q;s/^# \{0,1\}//p' Makefile

setup: $(READY)

$(READY): setup.py pyproject.toml $(wildcard csrc/*/*)
	@test -x $(BIN)/python || { echo "making the virtual environment $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/python -m pip install -q "$(TORCH)"
	@$(BIN)/python -c "import triton" 2>/dev/null || $(BIN)/python -m pip install -q "$(TRITON)" || echo "going on without Triton"
	$(BIN)/python -m pip install -q "setuptools>=77" wheel ninja pybind11
	$(BIN)/python -m pip install -q --no-build-isolation -e ".[dev]"
	@touch $(READY)

demo: setup
	$(BIN)/bkdfast demo --out demo-report

test: setup
	$(PYTEST) -q -n 2 -m "not slow"
	@for isa in avx512 avx2 scalar; do \
	  files="$(KERNELS)"; if [ $$isa = avx512 ]; then files="$(MATRIX_UNIT)"; fi; \
	  if BKDFAST_CPU=$$isa $(BIN)/python -c "from bkdfast.ops._library import EXTENSION; EXTENSION.cpu_isa()" 2>/dev/null; \
	  then echo "the C++ kernels with $$isa"; BKDFAST_CPU=$$isa $(PYTEST) -q -n 2 $$files || exit 1; \
	  else echo "SKIPPED: this CPU has no $$isa"; fi; done
	TRITON_INTERPRET=1 $(PYTEST) -q -n 2 tests/kernels/test_triton_interpreter.py

slow: setup
	$(PYTEST) -q -m slow

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror csrc/*/* tests/kernels/*.h

bench: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.run
	$(BIN)/python -m benchmarks.tables

bench-sweep: setup
	$(BIN)/python -m benchmarks.sweep
	$(BIN)/python -m benchmarks.tables

bench-svd: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.svd
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.svd_disk
	$(BIN)/python -m benchmarks.tables

bench-peers: setup
	$(BIN)/python -m benchmarks.peers install
	$(BIN)/python -m benchmarks.peers
	$(BIN)/python -m benchmarks.tables

readme: setup
	$(BIN)/python -m benchmarks.demo

clean:
	rm -rf build dist *.egg-info bkdfast/_C*.so bkdfast/_native*.so bkdfast/_build.json $(READY)
