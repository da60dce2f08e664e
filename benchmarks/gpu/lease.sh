#!/bin/bash
# The jobs of a plan on a bare GPU machine: benchmarks/gpu/lease.sh SECONDS [FIRST].
# .lease/ beside the code has all that is carried there: plan.json (benchmarks/gpu/plan.py), wheels of
# packages that the machine lacks, openmoji.npz for scale small, lease.jsonl of an earlier machine.
# The jobs run in a session of their own and go on after this call, which shows for SECONDS what they
# are at. Repeat it until it says "all done". Each call brings into $OUT what is there by then:
# lease.jsonl, lease.txt, metrics.tgz and, of the weights that a job keeps, four parts of 14 MiB from
# number FIRST on (at home: cat part-* | tar x).
set -eu
cd "$(dirname "$0")/../.."
seconds=$1 first=${2:-0}
out=${OUT:-measured}
work=${LEASE_WORK:-/tmp/djepa-lease}
mkdir -p "$out" "$work"
if [ ! -e "$work/code" ]; then
    # A copy: the next call may lay the checkout anew while the jobs read it.
    rm -rf "$work/new"
    mkdir "$work/new"
    cp -r benchmarks components dvc.yaml .lease "$work/new"
    if compgen -G ".lease/*.whl" >/dev/null; then
        python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade \
            --target "$work/new/site" .lease/*.whl
    fi
    mv "$work/new" "$work/code"
fi
lines=$work/lease.jsonl
if [ ! -e "$lines" ] && [ -e .lease/lease.jsonl ]; then cp .lease/lease.jsonl "$lines"; fi
export PYTHONUNBUFFERED=1 PYTHONPATH="$work/code/site${PYTHONPATH:+:$PYTHONPATH}"
if [ -e "$work/code/.lease/openmoji.npz" ]; then
    export DJEPA_ATLAS="$work/code/.lease/openmoji.npz"
fi
touch "$work/lease.txt"
before=$(wc -c <"$work/lease.txt")
if ! kill -0 "$(cat "$work/pid" 2>/dev/null || echo none)" 2>/dev/null; then
    cd "$work/code"
    setsid python3 -m benchmarks.gpu.lease .lease/plan.json "$work" "$lines" \
        >>"$work/lease.txt" 2>&1 </dev/null &
    echo $! >"$work/pid"
    cd - >/dev/null
fi
timeout "$seconds" tail -c "+$((before + 1))" -f --pid="$(cat "$work/pid")" "$work/lease.txt" || true

cp "$work/lease.txt" "$out"
if [ -e "$lines" ]; then cp "$lines" "$out"; fi
(cd "$work" && find . \( -path './*/metrics/*.json' -o -path './*/samples/*/grid.png' \
    -o -path './*/samples/*/seen/*.png' -o -name log \) -print0 |
    tar -czf - --null -T -) >"$out/metrics.tgz"
for kept in "$work"/*/kept; do
    if [ -e "$kept/model_index.json" ] && [ ! -e "$work/parts" ]; then
        rm -rf "$work/parts.new"
        mkdir "$work/parts.new"
        tar -cf - -C "$(dirname "$kept")" kept | split -b 14M -d -a 3 - "$work/parts.new/part-"
        mv "$work/parts.new" "$work/parts"
    fi
done
number=0
for part in "$work"/parts/part-*; do
    if [ -e "$part" ] && [ "$number" -ge "$first" ] && [ "$number" -lt "$((first + 4))" ]; then
        cp "$part" "$out"
    fi
    number=$((number + 1))
done
if [ -e "$work/parts" ]; then
    echo "$number parts of weights; this call brings those from $first to $((first + 3))"
fi
