#!/usr/bin/env bash
# Rounds of the model level (draw, value, pair, tune) until validation accuracy stops rising.
#
#   bash examples/loop.sh REAL VAL TEST [MODEL=tiny] [ROUNDS=5] [PER_CLASS=80]
#   SMOKE=1 bash examples/loop.sh ... tiny 1 8                       a trial of the works, in minutes
#
# Works in the current directory; done stages are not done again. The test set is named once, at
# the end: rounds are judged on the validation images.
set -euo pipefail
real=$1 val=$2 test=$3 rounds=${5:-5} per_class=${6:-80}
export UTILGEN_MODEL=${4:-tiny}
smoke=() force=() few=()
if [ -n "${SMOKE:-}" ]; then # a value model of a few steps may miss the canary's bar
  smoke=(--smoke) force=(--force) few=(--seeds 2)
fi

utilgen invert "$real" -o tokens "${smoke[@]}"
adapter=() init=() best=0 best_accuracy=-1
for round in $(seq 0 "$rounds"); do
  r=round$round
  utilgen generate --tokens tokens "${adapter[@]}" --per-class "$per_class" -o "$r/synth" ${SMOKE:+--steps 4}
  utilgen eval --real "$real" --synthetic "$r=$r/synth" --test "$val" -o "$r/eval" --json \
    "${smoke[@]}" "${few[@]}" > "$r/eval.json"
  accuracy=$(python3 -c '
import json, sys
arms = {arm["name"]: arm["accuracy"]["mean"] for arm in json.load(sys.stdin)["arms"]}
print(arms["real + " + sys.argv[1]])' "$r" < "$r/eval.json")
  echo "round $round: validation accuracy $accuracy"
  if ! awk "BEGIN { exit !($accuracy > $best_accuracy) }"; then break; fi
  best=$round best_accuracy=$accuracy
  utilgen value train --real "$real" --synthetic "$r/synth" --val "$val" -o "$r/value" "${smoke[@]}"
  utilgen value score "$r/synth" --value "$r/value" -o "$r/scored" "${force[@]}"
  utilgen pairs "$r/scored" -o "$r/pairs"
  utilgen dpo "$r/pairs" --tokens tokens "${init[@]}" -o "$r/dpo" "${smoke[@]}"
  adapter=(--adapter "$r/dpo") init=(--init "$r/dpo")
done
utilgen eval --real "$real" --synthetic "before=round0/synth" --synthetic "after=round$best/synth" \
  --val "$val" --test "$test" -o eval --report report.html "${smoke[@]}" "${few[@]}"
