#!/bin/bash
# The jobs of a plan on a bare GPU machine: benchmarks/gpu/lease.sh PLAN SECONDS [FIRST].
# PLAN is what `python -m benchmarks.gpu.plan` wrote; wheels of packages that the machine lacks lie in
# .whl, the glyphs of scale small in .whl/openmoji.npz. The jobs run in a session of their own and go on
# after this call, which shows for SECONDS what they are at. Repeat it until it says "all done"; each
# call brings into $OUT what is there by then: lease.jsonl, lease.txt, metrics.tgz and, of the weights
# that a job keeps, four parts of 14 MiB from number FIRST on (`cat part-* | tar x` at home).
set -eu
cd "$(dirname "$0")/../.."
plan=$1 seconds=$2 first=${3:-0}
out=${OUT:-measured}
work=${LEASE_WORK:-/tmp/djepa-lease}
mkdir -p "$out" "$work"
if [ ! -e "$work/code" ]; then
    # A copy: the next call may lay the checkout anew while the jobs read it.
    mkdir "$work/code.new"
    cp -r benchmarks components dvc.yaml "$plan" "$work/code.new"
    if compgen -G ".whl/*.whl" >/dev/null; then
        python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade \
            --target "$work/site" .whl/*.whl
    fi
    cp .whl/openmoji.npz "$work" 2>/dev/null || true
    mv "$work/code.new" "$work/code"
fi
export PYTHONUNBUFFERED=1 PYTHONPATH="$work/site${PYTHONPATH:+:$PYTHONPATH}"
if [ -e "$work/openmoji.npz" ]; then export DJEPA_ATLAS="$work/openmoji.npz"; fi
touch "$work/lease.txt"
before=$(wc -c <"$work/lease.txt")
if ! kill -0 "$(cat "$work/pid" 2>/dev/null || echo none)" 2>/dev/null; then
    cat measured/lease.jsonl >>"$work/lease.jsonl" 2>/dev/null || true
    (
        cd "$work/code"
        setsid python3 -m benchmarks.gpu.lease "$(basename "$plan")" "$work" "$work/lease.jsonl" \
            >>"$work/lease.txt" 2>&1 </dev/null &
        echo $! >"$work/pid"
    )
fi
timeout "$seconds" tail -c "+$((before + 1))" -f --pid="$(cat "$work/pid")" "$work/lease.txt" || true
cp "$work/lease.txt" "$out"
cp "$work/lease.jsonl" "$out" 2>/dev/null || true
(cd "$work" && find . \( -path './*/metrics/*.json' -o -path './*/samples/*/grid.png' \
    -o -path './*/samples/*/seen/*.png' -o -name log \) -print0 | tar -czf - --null -T -) >"$out/metrics.tgz"
for kept in "$work"/*/kept; do
    if [ -e "$kept/model_index.json" ] && [ ! -e "$work/parts" ]; then
        mkdir -p "$work/parts.new"
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
if [ -e "$work/parts" ]; then echo "$number parts of weights; this call brings $first to $((first + 3))"; fi
