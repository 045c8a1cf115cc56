#!/usr/bin/env bash
# Make the bundle that utilgen ships (utilgen_cli/tiny/) and the task's shards (examples/data/).
#
#   apt-get install dataset-fashion-mnist; bash examples/tiny/make.sh [OUT]
#
# About 75 minutes on two cores. Each part is seeded and runs on one thread; U-Net training goes on
# from its last checkpoint. What is made appears in OUT (default: build/tiny).
set -euo pipefail
cd "$(dirname "$0")"
out=${1:-../../build/tiny}
export OMP_WAIT_POLICY=passive
mkdir -p "$out"
[ -d "$out/open_clip" ] || python train_clip.py "$out" &
[ -d "$out/vae" ] || python train_vae.py "$out" &
wait
python train_unet.py "$out"
python make_shards.py "$out/data"
bundle=../../utilgen_cli/tiny
for part in model_index.json open_clip scheduler text_encoder tokenizer unet vae; do
  rm -rf "${bundle:?}/$part" && cp -r "$out/$part" "$bundle/"
done
du -sh "$bundle"
