#!/usr/bin/env bash
# Rounds of the model level (draw, value, pair, tune) until validation accuracy stops rising: the
# first begins with a LoRA of the shots (DataDream's recipe), every other where the last ended.
#
#   bash examples/loop.sh REAL VAL TEST [MODEL=tiny] [ROUNDS=5] [PER_CLASS=80]
#   SMOKE=1 bash examples/loop.sh ... tiny 1 8                       a trial of the works, in minutes
#
# LORA_LR=3e-3 suits the tiny bundle; the default, 1e-4, Stable Diffusion. The classes are REAL's.
# CLASSIFIER="--arch resnet50 --pretrained --size 224" for photographs: options of value train and eval.
# Works in the current directory; done stages are not done again. The test set is named once, at
# the end: rounds are judged on the validation images.
set -euo pipefail
real=$1 val=$2 test=$3 rounds=${5:-5} per_class=${6:-80}
export UTILGEN_MODEL=${4:-tiny}
smoke=() force=() few=()
read -ra classifier <<< "${CLASSIFIER:-}"
if [ -n "${SMOKE:-}" ]; then # a value model of a few steps may miss the canary's bar
  smoke=(--smoke) force=(--force) few=(--seeds 2)
fi
draw=(--classes "$real" --per-class "$per_class" ${SMOKE:+--steps 4})

utilgen generate "${draw[@]}" -o class-prompts
utilgen lora "$real" --lr "${LORA_LR:-1e-4}" -o lora "${smoke[@]}"
adapter=lora best=0 best_accuracy=-1
for round in $(seq 0 "$rounds"); do
  r=round$round
  utilgen generate "${draw[@]}" --adapter "$adapter" -o "$r/synth"
  utilgen eval --real "$real" --synthetic "$r=$r/synth" --test "$val" -o "$r/eval" --json \
    "${classifier[@]}" "${smoke[@]}" "${few[@]}" > "$r/eval.json"
  accuracy=$(python3 -c '
import json, sys
arms = {arm["name"]: arm["accuracy"]["mean"] for arm in json.load(sys.stdin)["arms"]}
print(arms["real + " + sys.argv[1]])' "$r" < "$r/eval.json")
  echo "round $round: validation accuracy $accuracy"
  if ! awk "BEGIN { exit !($accuracy > $best_accuracy) }"; then break; fi
  best=$round best_accuracy=$accuracy
  utilgen value train --real "$real" --synthetic "$r/synth" --val "$val" -o "$r/value" \
    "${classifier[@]}" "${smoke[@]}"
  utilgen value score "$r/synth" --value "$r/value" -o "$r/scored" "${force[@]}"
  utilgen pairs "$r/scored" -o "$r/pairs"
  utilgen dpo "$r/pairs" --init "$adapter" --reference previous -o "$r/dpo" "${smoke[@]}"
  adapter=$r/dpo
done
utilgen eval --real "$real" --synthetic prompts=class-prompts --synthetic lora=round0/synth \
  --synthetic "loop=round$best/synth" --val "$val" --test "$test" -o eval --report report.html \
  "${classifier[@]}" "${smoke[@]}" "${few[@]}"
