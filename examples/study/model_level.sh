#!/usr/bin/env bash
# What tuning the generator on preference pairs is worth: three rounds of sample, score, pair, dpo.
#
#   bash examples/study/model_level.sh [--smoke] [--seeds "0 1 2 3 4"] [DIR]     (DIR: study/)
#
# Beside no adaptation, DataDream's LoRA on the real shots, and filtering alone (the useful half, or
# what the value model sees as its class). Ends with a table
# over the seeds; the judge needs Fashion-MNIST (Debian: dataset-fashion-mnist). About 20 minutes of
# one core a seed.
# shellcheck source=examples/study/common.sh
source "$(dirname "$0")/common.sh"

arms() {
  learn_value
  filtered
  adapted_by_lora
  dpo_rounds 3
  agreed lora lora-more
  compare model-level base filter base-agreed lora lora-agreed round-1 round-2 round-3
}

judge
each_seed arms
python "$study/table.py" . --part model-level --baseline base
