#!/usr/bin/env bash
# Write the completion files of bash, zsh and fish into the directory named (default: this one).
set -euo pipefail
cd "${1:-$(dirname "$0")}"
_UTILGEN_COMPLETE=source_bash utilgen > utilgen.bash
_UTILGEN_COMPLETE=source_zsh utilgen > _utilgen
_UTILGEN_COMPLETE=source_fish utilgen > utilgen.fish
