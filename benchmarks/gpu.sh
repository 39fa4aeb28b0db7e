#!/usr/bin/env bash
# Build, test and measure everything on a CUDA machine, in under 8 minutes and without a network:
#
#   bash benchmarks/gpu.sh [OUT]                    (default OUT: benchmarks/results)
#   STEPS="build tests" bash benchmarks/gpu.sh      (default: all of them, in this order)
#
#   build         for this GPU only, into the source tree; nothing goes on without the CUDA kernels
#   doctor        what bkdfast finds here
#   tests         every kernel on the GPU
#   measurements  OUT/<gpu>.json, written after every case
#   sweep         all heads of a 7B model: OUT/sweep-7b-<gpu>.json, written after every step
#   svd           deltas of a 7B model: OUT/svd-7b-<gpu>.json, written after every step
#   triton        opcheck and torch.compile with Triton's kernels behind the dispatcher
#   cpu           the ops on this machine's CPU
#   memcheck, racecheck  compute-sanitizer on a selection that launches every kernel of every op
#
# Needs a CUDA torch, triton, nvcc, pytest, pytest-xdist and hypothesis in `python3` (or PYTHON=...). The steps that tell
# most come first and each has a time limit, so what a cut run leaves is of use: every step's output is also in
# OUT/<step>.log. A failed step does not stop the others, except the build; the exit status is 1 if any failed, 2 without
# a GPU.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
python=${PYTHON:-python3}
out=${1:-benchmarks/results}
steps=${STEPS:-build doctor tests measurements sweep svd triton cpu memcheck racecheck}
deadline=470  # seconds; later steps get what the earlier ones left
failed=0

step() {  # step NAME SECONDS COMMAND...: run it within the time if it was asked for; remember a failure
  local name=$1 limit=$2 begin=$SECONDS status
  shift 2
  [[ " $steps " == *" $name "* ]] || return 0
  ((limit <= deadline - SECONDS)) || limit=$((deadline - SECONDS))
  if ((limit < 5)); then
    echo "== $name: FAILED, no time left"
    failed=1
    return 1
  fi
  echo "== $name"
  timeout -k 5 "$limit" "$@" 2>&1 | tee "$out/$name.log"
  status=${PIPESTATUS[0]}
  ((status != 124)) || echo "cut off after $limit s" | tee -a "$out/$name.log"
  if ((status == 0)); then
    echo "== $name: ok, $((SECONDS - begin)) s"
  elif [[ $name == *check ]] && grep -q "Device not supported" "$out/$name.log"; then
    echo "== $name: compute-sanitizer does not support this device, $((SECONDS - begin)) s"
  else
    echo "== $name: FAILED ($status), $((SECONDS - begin)) s"
    failed=1
    return 1
  fi
}

sanitize() {  # sanitize TOOL SECONDS SELECTION: the CUDA kernels under compute-sanitizer, every allocation its own
  if ! command -v compute-sanitizer >/dev/null; then
    [[ " $steps " != *" $1 "* ]] || echo "== $1: there is no compute-sanitizer"
    return 0
  fi
  step "$1" "$2" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$1" --error-exitcode 1 \
    "$python" -m pytest -q --tb=short tests/kernels/test_gpu.py -k "$3"
}

for name in $steps; do
  case $name in
    build | doctor | tests | measurements | sweep | svd | triton | cpu | memcheck | racecheck) ;;
    *)
      echo "STEPS: there is no step $name" >&2
      exit 1
      ;;
  esac
done
gpu=$("$python" -c 'import torch
if torch.cuda.is_available():
  print("%d.%d" % torch.cuda.get_device_capability())')
if [[ -z $gpu ]]; then
  echo "no GPU that torch can use; this script measures one" >&2
  exit 2
fi
mkdir -p "$out" || exit 1
export TORCH_CUDA_ARCH_LIST=$gpu BKDFAST_REQUIRE_EXT=1 OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1

step build 150 "$python" -m pip install -q --no-index --no-build-isolation --no-deps -e . || exit 1
"$python" -c 'from bkdfast.ops._library import EXTENSION as e
why = e.reason or e.why_no_cuda()
raise SystemExit(why and f"the CUDA kernels are not there: {why}")' || exit 1
step doctor 30 "$python" -m bkdfast doctor
step tests 120 "$python" -m pytest -q -n 12 --maxfail=20 --tb=short tests/kernels/test_gpu.py tests/sweep/test_gpu.py
name=$("$python" -c 'from benchmarks.run import slug; import torch; print(slug(torch.cuda.get_device_name()))')
step measurements 150 "$python" -m benchmarks.run --device cuda --out "$out/$name.json"
step sweep 120 "$python" -m benchmarks.sweep_7b --out "$out/sweep-7b-$name.json"
step svd 60 "$python" -m benchmarks.svd_7b --out "$out/svd-7b-$name.json"
step triton 60 env BKDFAST_BACKEND=triton "$python" -m pytest -q -n 8 --tb=short tests/kernels/test_gpu.py \
  -k "opcheck or one_graph"
step cpu 60 "$python" -m pytest -q -n 12 --tb=short tests/ops
# 70 tests: the edits, decode, prefill, both norms and the sketch, by whole vectors and by single cells.
small="cuda and bfloat16 and (test_edits and (odd or neurons or meeting or decode or longer or wider)"
small+=" or any_strides and meeting or test_tokens and (decode or small or request or many or special)"
small+=" or test_norm_tap and (3-64 or 5-37 or 20000) or test_norm_monitor and (256 or distinct)"
small+=" or test_sketch and (7 or 70))"
sanitize memcheck 60 "$small"
sanitize racecheck 60 "$small"
echo "total $SECONDS s"
exit "$failed"
