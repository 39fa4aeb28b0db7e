#!/usr/bin/env bash
# Build, test and measure everything on a CUDA machine, in under 8 minutes and without a network:
#
#   bash benchmarks/gpu.sh [OUT]        (default OUT: benchmarks/results)
#
# Needs a CUDA torch, triton, nvcc, pytest and hypothesis in `python3` (or PYTHON=...). Builds for this GPU only, into the
# source tree. A failed test does not stop the measurements; the exit status says whether all was green.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
out=${1:-benchmarks/results}
mkdir -p "$out"
failed=0

step() {  # step NAME COMMAND...: run it, say how long it took, remember a failure
  local name=$1 begin=$SECONDS
  shift
  echo "== $name"
  if "$@"; then echo "== $name: ok, $((SECONDS - begin)) s"; else
    echo "== $name: FAILED, $((SECONDS - begin)) s"
    failed=1
  fi
}

capability=$($python -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())') || {
  echo "no GPU that torch can use; this script measures one" >&2
  exit 2
}
export TORCH_CUDA_ARCH_LIST=$capability BKDFAST_REQUIRE_EXT=1 OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1
step build $python -m pip install -q --no-index --no-build-isolation --no-deps -e .
$python -m bkdfast doctor

# Each test on its own is short; processes share the GPU.
step "kernels on the GPU" $python -m pytest -q -n 4 tests/kernels/test_gpu.py
step "ops on the CPU of this machine" $python -m pytest -q -n 8 tests/ops
if command -v compute-sanitizer >/dev/null; then
  step memcheck compute-sanitizer --tool memcheck --error-exitcode 1 $python -m pytest -q tests/kernels/test_gpu.py -k "cuda and small"
  step racecheck compute-sanitizer --tool racecheck --error-exitcode 1 $python -m pytest -q tests/kernels/test_gpu.py -k "cuda and small"
fi
gpu=$($python -c 'from benchmarks.run import slug; import torch; print(slug(torch.cuda.get_device_name()))')
step measurements $python -m benchmarks.run --device cuda --out "$out/$gpu.json"
echo "total $SECONDS s"
exit $failed
