#!/usr/bin/env bash
# What each part of instance-level optimisation is worth (the paper's ablation, and the set term).
#
#   bash examples/study/instance_level.sh [--smoke] [--seeds "0 1 2 3 4"] [DIR]     (DIR: study/)
#
# Plain generation; + noise; prompts learnt by denoising the real shots (inverted); a short climb from
# there for utility, anchored to the shots (prompt), with noise, with the terms that value the set, and
# without the anchor (free-prompt); the climb from class prompts alone; and GAP (objective: the
# classifier's loss). Ends with a table over the seeds; the judge needs Fashion-MNIST (Debian:
# dataset-fashion-mnist). About 25 minutes of one core a seed.
# shellcheck source=examples/study/common.sh
source "$(dirname "$0")/common.sh"

arms() {
  learn_value
  inverted
  optimise noise --iterations 0 --population 1 --noise single
  optimise inverted-noise --init prompts --iterations 0 --noise single
  optimise prompt --init prompts "${anchored[@]}" --noise none --save-policy prompt-policy
  optimise prompt-noise --init prompt-policy --iterations 0 --noise single
  optimise prompt-set --init prompts "${anchored[@]}" --noise none "${set_terms[@]}"
  optimise free-prompt --init prompts --iterations 20 --noise none
  optimise class-prompt --noise none
  optimise gap --noise none --objective loss --clip-weight 0
  compare instance-level base noise inverted inverted-noise prompt prompt-noise prompt-set \
    free-prompt class-prompt gap
}

judge
each_seed arms
python "$study/table.py" . --part instance-level --baseline base
