#!/usr/bin/env bash
# Submit the loop as a chain of jobs: arrays draw and score, one job for each trainer.
#
#   bash submit.sh MODEL REAL VAL TEST [TASKS=8] [PER_CLASS=80]     in the directory of the run
#   SMOKE=1 bash submit.sh tiny ...                                 a trial of the works, in minutes
#
# A LoRA of the shots draws, a round of DPO tunes it, prompts are learnt for it and climb a little.
# LORA_LR=3e-3 suits the tiny bundle; the default, 1e-4, Stable Diffusion. The classes are REAL's.
# CLASSIFIER="--arch resnet50 --pretrained --size 224" for photographs: options of value train and eval.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
model=$1 real=$2 val=$3 test=$4 tasks=${5:-8} per_class=${6:-80}

job() { # job NAME AFTER ARRAY ARGS...: prints the job's number; AFTER and ARRAY may be empty
  local name=$1 after=$2 array=$3
  shift 3
  sbatch --parsable --job-name="utilgen-$name" ${after:+--dependency="afterok:$after"} \
    ${array:+--array="0-$((array - 1))"} "$here/stage.sbatch" "$@"
}

draw=(-m "$model" --classes "$real" --per-class "$per_class" --shard-size 100)
smoke=() force=() few=()
read -ra classifier <<< "${CLASSIFIER:-}"
if [ -n "${SMOKE:-}" ]; then # a value model of a few steps may miss the canary's bar
  draw+=(--shard-size 20 --steps 4) smoke=(--smoke) force=(--force) few=(--seeds 2)
fi

lora=$(job lora "" "" lora "$real" -m "$model" --lr "${LORA_LR:-1e-4}" -o lora "${smoke[@]}")
generate=$(job generate "$lora" "$tasks" generate "${draw[@]}" --adapter lora --part slurm -o synth)
train=$(job value "$generate" "" value train --real "$real" --synthetic synth --val "$val" -o value \
  "${classifier[@]}" "${smoke[@]}")
score=$(job score "$train" "$tasks" value score synth --value value --part slurm -o scored "${force[@]}")
pairs=$(job pairs "$score" "" pairs scored -o pairs)
dpo=$(job dpo "$pairs" "" dpo pairs -m "$model" --init lora --reference previous -o dpo "${smoke[@]}")
invert=$(job invert "$dpo" "" invert "$real" -m "$model" --adapter dpo --population 4 --steps 600 \
  --lr 0.05 --flip -o prompts "${smoke[@]}")
# One job improves the prompts; the array then draws with them.
ilpo=$(job ilpo "$invert" "" ilpo -m "$model" --classes "$real" --adapter dpo --value value --init prompts \
  --real "$real" --anchor-weight 1 --iterations 5 --per-class 1 -o ilpo-trial --save-policy policy "${smoke[@]}")
best=$(job best "$ilpo" "$tasks" generate "${draw[@]}" --adapter dpo --policy policy --part slurm -o best)
eval=$(job eval "$best" "" eval --real "$real" --synthetic before=synth --synthetic after=best \
  --val "$val" --test "$test" -o eval --report report.html "${classifier[@]}" "${smoke[@]}" "${few[@]}")
echo "submitted; the last job is $eval"
