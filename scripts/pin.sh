#!/usr/bin/env bash
# Write constraints.txt anew: the newest release of everything but torch, for every Python we run on.
# torch is pinned without a local version, so that CPU and CUDA builds both satisfy it, and what only
# the CUDA builds need is left out: torch itself names those versions exactly.
set -euo pipefail
cd "$(dirname "$0")/.."

uv=$(command -v uv || echo .venv/bin/uv)
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
echo "torch==2.13.0" > "$tmp/torch.txt"

"$uv" pip compile pyproject.toml --all-extras --universal --python-version 3.11 \
    --constraints "$tmp/torch.txt" --quiet --upgrade \
    --no-header --no-annotate --no-emit-index-url --no-emit-find-links --output-file "$tmp/pins.txt"
{
    echo "# What octavo is tested with; scripts/pin.sh writes it. pyproject.toml allows more."
    grep -vE "^(nvidia|cuda|triton)" "$tmp/pins.txt" | grep -v "== 'emscripten'"
} | sed -E "s/ ; sys_platform != 'emscripten'$//; s/sys_platform != 'emscripten' and //" > constraints.txt
