#!/usr/bin/env bash
# Everything that needs a GPU, in one run: build, CUDA tests, the demo, compute-sanitizer on the small ones, benchmarks.
# Leaves tests.xml, sanitizer-*.log, benchmarks.json and environment.json in $OUT (default out/gpu).
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
out=${OUT:-out/gpu}
mkdir -p "$out"

# In place and without pip: a GPU machine may have no network and a Python that is not ours to install into.
FASTUNLEARN_CUDA=ON "$python" setup.py --quiet build_ext --inplace >"$out/build.log" 2>&1 ||
  { tail -n 40 "$out/build.log"; exit 1; }
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

FASTUNLEARN_TEST_BACKENDS=cuda "$python" -m pytest -q tests/test_ops.py tests/test_reset.py tests/test_gram.py tests/test_lowrank.py \
  -k "cuda or opcheck" \
  --junitxml="$out/tests.xml"
# The Hopper kernel, which is off by default, and its instructions against their emulation; elsewhere both pass by.
FASTUNLEARN_WGMMA=1 FASTUNLEARN_TEST_BACKENDS=cuda "$python" -m pytest -q tests/test_wgmma.py tests/test_ops.py \
  -k "cuda" --junitxml="$out/tests-wgmma.xml"
"$python" -m pytest -q tests/test_emulator_hopper.py -k "gpu"
"$python" -m fastunlearn demo --device cuda --out "$out/demo"

if command -v compute-sanitizer >/dev/null; then
  for tool in memcheck racecheck initcheck synccheck; do
    # The caching allocator hides overruns inside its own blocks.
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 FASTUNLEARN_TEST_BACKENDS=cuda timeout 240 \
      compute-sanitizer --tool "$tool" --error-exitcode 9 "$python" -m pytest -q -x tests/test_ops.py tests/test_reset.py \
      tests/test_gram.py tests/test_lowrank.py \
      -k "cuda and (test_repetition or repeat_their_bits or test_bits or test_dependent or test_nan_in_one)" >"$out/sanitizer-$tool.log" 2>&1 ||
      { tail -n 30 "$out/sanitizer-$tool.log"; exit 1; }
    tail -n 1 "$out/sanitizer-$tool.log"
  done
fi

FASTUNLEARN_BENCH_DEVICE=cuda "$python" -m pytest -q benchmarks --benchmark-only --benchmark-json="$out/benchmarks.json"
