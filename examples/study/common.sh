# shellcheck shell=bash disable=SC2034
# What the studies share: sourced by them, not run.
#
# A study is run as `bash NAME.sh [--smoke] [--seeds "0 1 2"] [--per-class 80] [DIR]` and may be stopped at any time: a
# step that is done is not done again, and studies in the same DIR share what they have in common.
# Every seed has a directory: it draws other starting noise, trains another value model, another
# generator and another classifier. All arms of a seed start from the same noise.
#
# Data of your own: DATA=dir (shards in real/, val/, test/), UTILGEN_MODEL=bundle, and POOL=shards to
# train the judge on (JUDGE=file names one that is there); NO_FLIP=1 where a mirror image is another thing.
set -euo pipefail

study=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
data=$(cd "${DATA:-$study/../data}" && pwd)
pool=() && [ -z "${POOL:-}" ] || pool=(--pool "$(realpath -e "$POOL")")
smoke=() per_class=80 seeds="0 1 2 3 4"
while [ $# -gt 0 ]; do
  case $1 in
    --smoke) smoke=(--smoke) per_class=4 seeds="0 1"; shift ;;
    --seeds) seeds=$2; shift 2 ;;
    --per-class) per_class=$2; shift 2 ;;
    *) break ;;
  esac
done
model=${UTILGEN_MODEL:-tiny}
[ "$model" = tiny ] || [ ! -d "$model" ] || model=$(realpath "$model")
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive} UTILGEN_MODEL=$model
[ -z "${JUDGE:-}" ] || JUDGE=$(realpath -m "$JUDGE")
mkdir -p "${1:-study}" && cd "${1:-study}"
: "${LORA_LR:=3e-3}" # found on development images; the command's default is the recipe's 1e-4
setup="$data $model $per_class lora $LORA_LR" # what all steps in a directory were made with
[ ! -e setup ] || [ "$(cat setup)" = "$setup" ] || {
  echo "$PWD was made with: $(cat setup); now: $setup. Name another directory." >&2
  exit 2
}
echo "$setup" > setup
: "${GUIDANCE:=1}" # the better scale for accuracy without adaptation (model card of the bundle)

once() { # MARK COMMAND...: run a step, unless it has run
  [ ! -e "steps/$1" ] || return 0
  echo "== $PWD: ${*:2}" >&2
  local start=$SECONDS
  "${@:2}"
  mkdir -p steps
  echo "$((SECONDS - start)) s" > "steps/$1"
}

draw() { # NAME OPTIONS...: $per_class images a class, from the starting noise of this seed
  once "$1" utilgen generate --per-class "$per_class" --guidance-scale "$GUIDANCE" --seed "$seed" \
    -q -o "$1" "${@:2}"
}

score() { # NAME VALUE: the same images with utility.json, under NAME-scored
  once "$1-scored" utilgen value score "$1" --value "$2" -q -o "$1-scored"
}

learn_value() { # the value model of this seed, learnt beside images that nobody adapted
  draw base
  once value utilgen value train --real "$data/real" --val "$data/val" --synthetic base \
    --seed "$seed" "${valued[@]}" -q -o value "${smoke[@]}"
}

filtered() { # of twice as many images, the useful and diverse half, or all seen as their class
  draw base-more --start "$per_class"
  once filter pass_useful base base-more
  agreed base base-more
}

pass_useful() {
  utilgen value score "$@" --value value --select "$(samples "$1")" -q -o filter
}
samples() { # SHARDS: how many they hold
  utilgen check "$1" -q --json | python -c 'import json, sys; print(json.load(sys.stdin)["samples"])'
}

agreed() { # NAME MORE: what the value model sees as its class, under NAME-agreed
  once "$1-agreed" pass_agreed "$@"
}
pass_agreed() {
  cat "$1"/*.tar "$2"/*.tar | utilgen value score --value value --agreed -q -o "$1-agreed"
}

lora_steps=400
adapted_by_lora() { # DataDream's recipe, on the real shots alone
  once lora-adapter utilgen lora "$data/real" --lr "$LORA_LR" --steps "$lora_steps" --seed "$seed" \
    -q -o lora-adapter "${smoke[@]}"
  draw lora --adapter lora-adapter
}

dpo_rounds() { # N: sample, score, pair, tune; from the LoRA on, a round begins where the last ended
  local last=lora from=(--adapter lora-adapter --init lora-adapter --reference previous) round
  score lora value
  for round in $(seq "$1"); do
    draw "$last-more" --start "$per_class" "${from[@]:0:2}"
    score "$last-more" value
    once "round-$round-pairs" utilgen pairs "$last-scored" "$last-more-scored" \
      --strategy agreement --seed "$seed" -q -o "round-$round-pairs"
    once "round-$round-adapter" utilgen dpo "round-$round-pairs" "${from[@]:2}" --seed "$seed" \
      "${dpo_options[@]}" -q -o "round-$round-adapter" "${smoke[@]}"
    last=round-$round
    from=(--adapter "$last-adapter" --init "$last-adapter" --reference previous)
    draw "$last" "${from[@]:0:2}"
    score "$last" value
  done
}
dpo_options=(--beta 500 --steps 100) # the default beta keeps the generator nearer to where it was

population=4 invert_steps=600
invert_prompts() { # NAME OPTIONS...: four a class that denoise the real shots
  once "$1" utilgen invert "$data/real" "${@:2}" --population "$population" --steps "$invert_steps" \
    --lr 0.05 --batch-size 64 "${flip[@]}" --seed "$seed" -q -o "$1" "${smoke[@]}"
}
inverted() { # such prompts, and images of them
  invert_prompts prompts
  draw inverted --policy prompts
}

optimise() { # NAME OPTIONS...: ilpo, from the starting noise of this seed; NAME.json has the cost
  once "$1" optimise_once "$@"
}
optimise_once() {
  utilgen ilpo --value value --real "$data/real" --per-class "$per_class" --seed "$seed" \
    --guidance-scale "$GUIDANCE" --max-fidelity-drop 1 -q --json -o "$1" "${@:2}" "${smoke[@]}" \
    2> "$1.json" || { cat "$1.json" >&2; rm "$1.json"; return 1; }
}
anchored=(--iterations 5 --anchor-weight 1) # a short climb for utility, held to the shots
# The set is valued as well: unlike one another, and near the real shots in CLIP's eyes.
set_terms=(--diversity 2 --clip-weight 0 --clip-image-weight 2)

judge() { # trains, once, the classifier that reports label fidelity and does nothing else
  [ -e "${JUDGE:=$PWD/judge.safetensors}" ] ||
    once judge python "$study/judge.py" train "$JUDGE" ${smoke:+--steps 40} "${pool[@]}"
  export JUDGE
}

joint=(--real-share 0.8) # of a batch, in every joint arm
flip=(--flip) valued=()
[ -z "${NO_FLIP:-}" ] || flip=() joint+=(--augment shift) valued=(--augment shift)
compare() { # OUT SET...: accuracy of each set alone and joined with real, and its label fidelity
  local out=$1 sets=() name
  shift
  for name in "$@"; do sets+=(--synthetic "$name=$name"); done
  once "$out" utilgen eval --real "$data/real" --val "$data/val" --val-as-train "${sets[@]}" \
    --test "$data/test" --seeds 1 --seed "$seed" "${joint[@]}" -o runs --report "$out" -q "${smoke[@]}" > /dev/null
  once "$out-fidelity" fidelity "$out/fidelity.jsonl" "$@"
}

fidelity() { # FILE SET...
  python "$study/judge.py" score "$JUDGE" "${@:2}" > "$1"
}

each_seed() { # COMMAND...: in the directory of every seed
  for seed in $seeds; do
    mkdir -p "seed-$seed"
    (cd "seed-$seed" && "$@")
  done
}
