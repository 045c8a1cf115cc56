#!/usr/bin/env bash
# What each part of instance-level optimisation is worth (the paper's ablation, and the set term).
#
#   bash examples/study/instance_level.sh [--smoke] [--seeds "0 1 2 3 4"] [DIR]     (DIR: study/)
#
# Plain generation; + prompt; + noise; + both; the prompt arms without and with the terms that value
# the set; and GAP (objective: the classifier's loss). Ends with a table over the seeds; the judge
# needs Fashion-MNIST (Debian: dataset-fashion-mnist). About 25 minutes of one core a seed.
# shellcheck source=examples/study/common.sh
source "$(dirname "$0")/common.sh"

arms() {
  learn_value
  optimise prompt --noise none
  optimise noise --iterations 0 --population 1 --noise single
  optimise prompt-noise --noise single
  optimise prompt-set --noise none "${set_terms[@]}"
  optimise prompt-noise-set --noise single "${set_terms[@]}"
  optimise gap --noise none --objective loss --clip-weight 0
  compare instance-level base prompt noise prompt-noise prompt-set prompt-noise-set gap
}

judge
each_seed arms
python "$study/table.py" . --part instance-level --baseline base
