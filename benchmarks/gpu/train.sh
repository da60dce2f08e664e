#!/bin/bash
# Phase 1 and its scores on a GPU machine without DVC: benchmarks/gpu/train.sh [SECONDS [FIRST]].
# The checkout must have what `dvc repro encode` leaves: curated/, encoded/, metrics/contract.json.
# Repeat it on the same machine: training goes on from its snapshot. Once all is done, each call puts
# four parts of at most 15 MiB into $OUT, from number FIRST on. With its parts (named part-NNN
# again) and its stage.json in a folder, `djepa import-stage FOLDER` takes a stage at home.
set -eu
cd "$(dirname "$0")/../.."
out=${OUT:-measured}
mkdir -p "$out"
export PYTHONUNBUFFERED=1 DJEPA_HOME=${DJEPA_HOME:-/tmp/djepa-home}
end=$((SECONDS + ${1:-540}))
for stage in phase1 evaluate@phase1; do
    packed=/tmp/packed-${stage%@*}
    if [ ! -e "$packed/stage.json" ]; then
        timeout "$((end - SECONDS))" python3 -c \
            "from components.stages import run_stage; run_stage('$stage')"
        python3 -c "from pathlib import Path; from components.carried import export_stage
export_stage('$stage', Path('$packed'), 15 * 2**20)"
    fi
done
first=${2:-0}
cp /tmp/packed-phase1/stage.json "$out/phase1.json"
cp /tmp/packed-evaluate/stage.json "$out/evaluate.json"
number=0
for part in /tmp/packed-*/part-*; do
    if [ "$number" -ge "$first" ] && [ "$number" -lt "$((first + 4))" ]; then
        folder=$(basename "$(dirname "$part")")
        cp "$part" "$out/$folder-$(basename "$part")"
    fi
    number=$((number + 1))
done
echo "$number parts in all; this call brings $first to $((first + 3))"
