#!/usr/bin/env bash
# The utility-centric loop on real photographs of clothes: 10 classes, 16 labelled images each.
#
#   bash examples/quickstart.sh [--smoke] [DIR]     (DIR: quickstart/)
#
# Ends with a table of test accuracy, the cost of each stage, and DIR/report.html. A stage that is
# done is not done again: stop it whenever you like and run the same command to go on.
set -euo pipefail

smoke=() per_class=80
if [ "${1:-}" = --smoke ]; then smoke=(--smoke) per_class=4; shift; fi
data=$(cd "$(dirname "$0")/data" && pwd)
mkdir -p "${1:-quickstart}" && cd "${1:-quickstart}"
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive} UTILGEN_MODEL=tiny UTILGEN_VALUE=value

stage() { # run a utilgen command and note its seconds
  local start=$SECONDS
  echo "== utilgen $*" >&2
  utilgen "$@" > last-output
  echo "$((SECONDS - start)) s: utilgen $1 $([ "$1" = value ] && echo "$2")" >> costs.txt
}

# Before the loop: images of the class prompts.
stage generate --per-class "$per_class" --seed 0 --guidance-scale 1 -o before

# How useful is a sample to the classifier? Learnt on the validation images, canary included.
stage value train --real "$data/real" --synthetic before --val "$data/val" -o value "${smoke[@]}"
stage value score before -o before-scored

# Model level: prefer useful images to useless ones of the same class, and tune the generator so.
utilgen pairs before-scored | stage dpo -o dpo "${smoke[@]}"

# What it takes to draw the 16 images: four prompts a class, learnt by denoising them.
stage invert "$data/real" --adapter dpo --population 4 --steps 600 --lr 0.05 --batch-size 64 --flip \
  -o prompts "${smoke[@]}"

# Instance level: from these prompts a short climb for utility, held to the 16 images, and starting
# noise that suits the prompts.
stage ilpo --adapter dpo --init prompts --iterations 5 --anchor-weight 1 --real "$data/real" \
  --noise single --per-class "$per_class" --seed 0 --guidance-scale 1 -o after --save-policy policy \
  "${smoke[@]}"
stage value score after -o after-scored

# What it did for the classifier, on test images that nothing above has seen. The loop has used the
# validation images, so every arm with real images gets them as well.
stage eval --real "$data/real" --synthetic before=before-scored --synthetic after=after-scored \
  --real-share 0.8 --val "$data/val" --val-as-train --test "$data/test" --seeds 3 --baseline real \
  -o eval --value value --report report.html "${smoke[@]}"

cat last-output
printf '\nCost of each stage on this machine (all runs of it together):\n'
awk -F ' s: ' '!($2 in s) { order[++n] = $2 } { s[$2] += $1 }
               END { for (i = 1; i <= n; i++) print s[order[i]] " s: " order[i] }' costs.txt
printf '\nLook at %s/report.html\n' "$PWD"
