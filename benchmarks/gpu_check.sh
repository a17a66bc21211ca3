#!/usr/bin/env bash
# What needs a GPU: build, CUDA tests and the demo (test), benchmarks (bench), compute-sanitizer on the small tests
# (sanitize); all of it by default, part by part with an argument. What fails does not stop what comes after, but the
# exit status says so. Leaves build.log, environment.json, tests*.xml, benchmarks*.json and sanitizer.log in $OUT
# (default out/gpu).
set -euo pipefail
cd "$(dirname "$0")/.."
stage=${1:-all}
case $stage in all | test | bench | sanitize) ;; *) echo "test, bench, sanitize or all, not $stage" >&2; exit 2 ;; esac
python=${PYTHON:-python3}
out=${OUT:-out/gpu}
mkdir -p "$out"
failed=0
attempt() { "$@" || { failed=1; echo "FAILED: $*" >&2; }; }
part() { [[ $stage == all || $stage == "$1" ]]; }

# In place and without pip: a GPU machine may have no network and a Python that is not ours to install into. For the GPU
# that is there alone: every other architecture takes a minute more.
capability=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -n 1 | tr -d '. ')
FASTUNLEARN_CUDA=ON FASTUNLEARN_CUDA_ARCHS=${FASTUNLEARN_CUDA_ARCHS:-$capability} \
  "$python" setup.py --quiet build_ext --inplace >"$out/build.log" 2>&1 || { tail -n 40 "$out/build.log"; exit 1; }
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}

"$python" - "$out/environment.json" <<'PY'
import json, subprocess, sys
import torch, fastunlearn
query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
name, driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0].split(", ")
info = {"gpu": name, "driver": driver, "cuda": torch.version.cuda, "torch": torch.__version__,
        "build": fastunlearn.ops._C.build_info()}
json.dump(info, open(sys.argv[1], "w"), indent=2)
print(info)
PY

operators=(tests/test_ops.py tests/test_reset.py tests/test_add_rounded.py tests/test_gram.py tests/test_lowrank.py
  tests/test_codec_ops.py)
if part test; then
  FASTUNLEARN_TEST_BACKENDS=cuda attempt "$python" -m pytest -q "${operators[@]}" -k "cuda or opcheck" \
    --junitxml="$out/tests.xml"
  attempt "$python" -m pytest -q tests/test_offload.py -k cuda
  # The Hopper kernel, which is off by default, and its instructions against their emulation; elsewhere both pass by.
  FASTUNLEARN_WGMMA=1 FASTUNLEARN_TEST_BACKENDS=cuda attempt "$python" -m pytest -q tests/test_wgmma.py \
    tests/test_ops.py -k "cuda" --junitxml="$out/tests-wgmma.xml"
  attempt "$python" -m pytest -q tests/test_emulator_hopper.py -k "gpu"
  attempt "$python" -m fastunlearn demo --device cuda --out "$(mktemp -d)"
fi

if part bench; then
  export FASTUNLEARN_BENCH_DEVICE=cuda
  attempt "$python" -m pytest -q benchmarks --benchmark-only --benchmark-json="$out/benchmarks.json"
  FASTUNLEARN_WGMMA=1 attempt "$python" -m pytest -q benchmarks/test_fisher.py --benchmark-only \
    -k "sq_grad_linear and bfloat16" --benchmark-json="$out/benchmarks-wgmma.json"
fi

if part sanitize && command -v compute-sanitizer >/dev/null; then
  # The caching allocator hides overruns inside its own blocks.
  export PYTORCH_NO_CUDA_MEMORY_CACHING=1 FASTUNLEARN_TEST_BACKENDS=cuda
  small="cuda and (test_repetition or repeat_their_bits or test_bits or test_dependent or test_nan_in_one or test_bad_number)"
  for tool in memcheck racecheck initcheck synccheck; do
    echo "== $tool" >>"$out/sanitizer.log"
    attempt timeout 120 compute-sanitizer --tool "$tool" --error-exitcode 9 "$python" -m pytest -q -x \
      "${operators[@]}" -k "$small" >>"$out/sanitizer.log" 2>&1
  done
  for tool in memcheck synccheck; do
    echo "== $tool, Hopper kernel" >>"$out/sanitizer.log"
    FASTUNLEARN_WGMMA=1 attempt timeout 120 compute-sanitizer --tool "$tool" --error-exitcode 9 "$python" -m pytest \
      -q -x tests/test_wgmma.py -k "cuda and error" >>"$out/sanitizer.log" 2>&1
  done
fi
exit $failed
