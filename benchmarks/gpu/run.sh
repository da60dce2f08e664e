#!/bin/bash
# Figures on one GPU: benchmarks/gpu/run.sh [SECONDS [--skip WORDS…]]. Repeat it until it says "all measured".
# Results go to $OUT (or measured/); a call goes on from what earlier ones left there,
# in /tmp on the same machine, or in measured/gpu.jsonl of the checkout.
set -eu
cd "$(dirname "$0")/../.."
out=${OUT:-measured}
mkdir -p "$out" measured
files=("$out/gpu.jsonl" /tmp/gpu.jsonl measured/gpu.jsonl)
export PYTHONUNBUFFERED=1 DJEPA_HOME=${DJEPA_HOME:-/tmp/djepa-home}
nvidia-smi || true
if [ ! -e /tmp/gpu-tests.txt ]; then
    timeout 120 python3 -m pytest -p no:cacheprovider tests/test_graphed.py tests/test_precision.py \
        2>&1 | tee /tmp/gpu-tests.txt || true
fi
cp /tmp/gpu-tests.txt "$out/" || true
# A case that hangs is cut; what was measured before it is there.
timeout "$((${1:-480} + 60))" python3 -m benchmarks.gpu all --seconds "${1:-480}" \
    --out "${files[@]}" "${@:2}" 2>&1 | tee "$out/gpu.txt" || true
# The tables: python -m benchmarks.gpu report --out gpu.jsonl, anywhere; the memory's takes minutes.
