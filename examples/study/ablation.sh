#!/usr/bin/env bash
# The paper's table on this test bed: every arm alone and joined with real, at 5 times real volume.
#
#   bash examples/study/ablation.sh [--smoke] [--seeds "0 1 2 3 4"] [DIR]     (DIR: study/)
#
# Class prompts (base), inversion (tokens), DataDream (lora), GAP as tuned (gap-held: held to the
# shots as prompt is; instance_level.sh has it loose), filtering alone (filter), then
# UtilGen: a round of preference tuning (round-1), prompts inverted from the shots (inverted), with
# an anchored climb for utility (prompt), with noise (prompt-noise), and inversion and climb on the
# generator of the first round, with noise (full); and as many further real images, in the place of
# generated ones (further-real, not with DATA of your own): what the best generator could be worth. With
# BEYOND=1 also volume and other architectures, for base and full; four times the training; and (not
# with DATA of your own) 1 to 8 labelled images a class, for base, lora and prompt. What model_level.sh
# and instance_level.sh have made in DIR is used; the plots go to DIR/plots. About 45 minutes of one
# core a seed.
# shellcheck source=examples/study/common.sh
source "$(dirname "$0")/common.sh"

bound=()
[ -n "${DATA:-}" ] || bound=(further-real)
arms() {
  learn_value
  filtered
  adapted_by_lora
  dpo_rounds 1
  once inversion utilgen invert "$data/real" --seed "$seed" -q -o inversion "${smoke[@]}"
  draw tokens --tokens inversion
  inverted
  optimise gap-held --init prompts --iterations 5 --anchor-weight 4 --noise none --objective loss \
    --clip-weight 0
  optimise prompt --init prompts "${anchored[@]}" --noise none --save-policy prompt-policy
  optimise prompt-noise --init prompt-policy --iterations 0 --noise single
  invert_prompts round-1-prompts --adapter round-1-adapter
  optimise full --adapter round-1-adapter --init round-1-prompts "${anchored[@]}" --noise single \
    --save-policy full-policy
  [ -n "${DATA:-}" ] || once further-real python "$study/../tiny/make_shards.py" . --shots 0 --val 0 \
    --test 0 --further "$per_class" --start $((500 + seed * per_class))
  compare ablation base tokens lora gap-held filter round-1 inverted prompt prompt-noise full \
    "${bound[@]}"
}

counts=(1 3 5 10) # generated images a real shot
[ ${#smoke[@]} = 0 ] || counts=(0.25 0.5)
volumes() {
  local times=() k
  for k in "${counts[@]}"; do times+=(--times "$k"); done
  for name in base full; do
    options=() && [ "$name" = base ] || options=(--adapter round-1-adapter --policy full-policy)
    once "$name-x10" utilgen generate --per-class $((2 * per_class)) --seed "$seed" \
      --guidance-scale "$GUIDANCE" -q -o "$name-x10" "${options[@]}"
  done
  once volume utilgen eval --real "$data/real" --val "$data/val" --val-as-train \
    --synthetic base=base-x10 --synthetic full=full-x10 "${times[@]}" --test "$data/test" \
    --seeds 1 --seed "$seed" "${joint[@]}" -o runs --report volume -q "${smoke[@]}" > /dev/null
}

longer() { # until more steps help real images alone no further; joint batches are half real then
  local joint=("${joint[@]}" --steps 1600 --real-share 0.5)
  compare longer base lora round-1 prompt-noise full "${bound[@]}"
}

architectures() {
  once architectures utilgen eval --real "$data/real" --val "$data/val" --val-as-train \
    --synthetic base=base --synthetic full=full --test "$data/test" --seeds 1 --seed "$seed" \
    --arch resnet18 --arch mobilenetv2_100 --size 32 "${joint[@]}" -o runs --report architectures \
    -q "${smoke[@]}" > /dev/null
}

few_shots=(1 2 4 8)
[ ${#smoke[@]} = 0 ] || few_shots=(2)
few() { # fewer labelled images a class, and as few to validate on, for base, lora and prompt
  local k
  for k in "${few_shots[@]}"; do
    mkdir -p "shots-$k"
    (cd "shots-$k" && with_few "$k")
  done
}
with_few() { # SHOTS: by the shot as many steps, and as much weight in a joint batch, as 16 have
  data=$PWD population=$(($1 < population ? $1 : population))
  lora_steps=$((lora_steps * $1 / 16)) invert_steps=$((invert_steps * $1 / 16))
  joint+=(--real-share "$(awk -v k="$1" 'BEGIN { print k / (k + 4) }')")
  once data python "$study/../tiny/make_shards.py" . --shots "$1" --val "$1"
  once base cp -r ../base .
  learn_value
  adapted_by_lora
  invert_prompts prompts
  if grep -q '"verdict": "inverted"' value/value.json; then # its canary failed: ilpo would refuse it
    draw prompt --policy prompts
  else
    optimise prompt --init prompts "${anchored[@]}" --noise none
  fi
  compare few base lora prompt
}

judge
each_seed arms
python "$study/table.py" . --part ablation --baseline base
if [ -n "${BEYOND:-}" ]; then
  each_seed volumes
  python "$study/table.py" . --part volume --baseline "base x${counts[0]}"
  each_seed longer
  python "$study/table.py" . --part longer --baseline base
  each_seed architectures
  python "$study/table.py" . --part architectures --baseline base
fi
if [ -n "${BEYOND:-}" ] && [ -z "${DATA:-}" ]; then
  each_seed few
  for k in "${few_shots[@]}"; do
    echo "$k labelled images a class:"
    python "$study/table.py" . --part "shots-$k/few" --baseline base
  done
fi
python "$study/plots.py" . --out plots
