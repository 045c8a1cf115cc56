#!/usr/bin/env bash
# What each part of instance-level optimisation is worth (the paper's ablation, and the set term).
#
#   bash examples/study/instance_level.sh [--smoke] [DIR]     (DIR: instance-level/)
#
# Arms, all from the same starting noise: plain generation; + prompt; + noise; + both; each prompt arm
# without and with the set term; and GAP (objective: the classifier's loss). Prints accuracy (test),
# and per arm label fidelity, utility by a value model that the optimiser never saw, and cost.
# Finished stages are kept: run it again to go on.
set -euo pipefail

smoke=() per_class=80 seeds=5
if [ "${1:-}" = --smoke ]; then smoke=(--smoke) per_class=2 seeds=2; shift; fi
data=$(cd "$(dirname "$0")/../data" && pwd)
mkdir -p "${1:-instance-level}" && cd "${1:-instance-level}"
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive} UTILGEN_MODEL=${UTILGEN_MODEL:-tiny}

utilgen generate --per-class "$per_class" --seed 0 -o plain --json "${smoke[@]}" 2> plain.log

# One value model to climb, one with other seeds to judge with.
for seed in 0 1; do
  utilgen value train --real "$data/real" --synthetic plain --val "$data/val" --seed "$seed" \
    -o "value-$seed" "${smoke[@]}"
done

arm() { # NAME, then the options of ilpo
  local name=$1; shift
  utilgen ilpo --value value-0 --real "$data/real" --per-class "$per_class" --seed 0 \
    -o "$name" --json "${smoke[@]}" "$@" 2> "$name.log" || tail -n 1 "$name.log" >&2
}

both=(--set-term gradient-match --set-weight 1)
arm prompt --noise none
arm noise --iterations 0 --population 1 --noise single
arm prompt-noise --noise single
arm prompt-set --noise none "${both[@]}"
arm prompt-noise-set --noise single "${both[@]}"
arm gap --noise none --objective loss --max-fidelity-drop 1

sets=()
for name in plain prompt noise prompt-noise prompt-set prompt-noise-set gap; do
  ls "$name"/*.tar > /dev/null 2>&1 || continue   # an arm that collapsed has no images
  utilgen value score "$name" --value value-1 -o "$name-scored"
  sets+=(--synthetic "$name=$name-scored")
done
utilgen eval --real "$data/real" "${sets[@]}" --val "$data/val" --test "$data/test" \
  --seeds "$seeds" -o runs --report report.html "${smoke[@]}"
for name in prompt noise prompt-noise prompt-set prompt-noise-set gap; do
  echo "$name: $(tail -n 1 "$name.log")"
done
