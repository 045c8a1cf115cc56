#!/usr/bin/env bash
# Train a tiny bundle: CLIP, VAE and U-Net for 32 x 32 images.
#
#   bash examples/tiny/make.sh --pool SHARDS [--percent 30] OUT    a bundle in OUT, of images of your own
#   bash examples/tiny/make.sh [OUT]                  what utilgen ships (Debian: dataset-fashion-mnist)
#
# The second makes utilgen_cli/tiny/ and the task's shards, in about 90 minutes of one core; --percent
# takes that share of the steps. Each part is seeded and runs on one thread; what is there is not made
# again, and U-Net training goes on from its last checkpoint. OUT is build/tiny by default.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
pool=() percent=100
while [ $# -gt 0 ]; do
  case $1 in
    --pool) pool=(--pool "$2"); shift 2 ;;
    --percent) percent=$2; shift 2 ;;
    *) break ;;
  esac
done
out=${1:-$here/../../build/tiny}
[ $# -le 1 ] || { echo "make.sh: options come before OUT" >&2; exit 2; }
export OMP_WAIT_POLICY=passive
mkdir -p "$out"

part() { # MADE NAME STEPS OPTIONS...: train a part, unless it is there
  [ -e "$out/$1" ] || python "$here/train_$2.py" "$out" --steps $(($3 * percent / 100)) "${pool[@]}" "${@:4}"
}
part open_clip clip 2000
part vae vae 2500
part .unet unet 5000 --latents $((100000 * percent / 100))
touch "$out/.unet"
[ ${#pool[@]} -eq 0 ] || exit 0

python "$here/make_shards.py" "$out/data"
bundle=$here/../../utilgen_cli/tiny
for part in model_index.json utilgen.json open_clip scheduler text_encoder tokenizer unet vae; do
  rm -rf "${bundle:?}/$part" && cp -r "$out/$part" "$bundle/"
done
du -sh "$bundle"
