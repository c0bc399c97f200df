#!/bin/sh
# An AR model becomes a starting point for both diffusion objectives: recipes/convert.sh [FLAGS OF convert.py]
set -eu
cd "$(dirname "$0")/.."
exec "${PYTHON:-python}" convert.py --model_name_or_path Qwen/Qwen3-0.6B --output_dir .models/a2d/Qwen3-0.6B "$@"
