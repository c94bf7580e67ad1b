#!/usr/bin/env bash
# All that a GPU must show, in order of worth, each part under ten minutes, on a machine with python >= 3.11 and torch:
#
#     benchmarks/gpu_day.sh [--dry] [PART ...]      # the parts: python benchmarks/gpu_day.py parts
#
# A part that fails or takes too long does not keep the next from running. Figures are added to runs/gpu_day.json
# (OUT=FILE for another); python benchmarks/gpu_day.py render makes a page of them. Nothing is fetched.
set -u
cd "$(dirname "$0")/.."
dry=()
if [ "${1:-}" = --dry ]; then dry=(--dry); shift; fi
missing=$(python -c 'import importlib.util as u; print(*[n for n in
    ("torch", "numpy", "safetensors", "sentencepiece", "tqdm") if u.find_spec(n) is None])')
if [ -n "$missing" ]; then echo "not installed here: $missing" >&2; exit 2; fi
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
if [ ${#dry[@]} = 0 ]; then
    python -m pip install -q --no-deps --no-index --no-build-isolation -e . || echo "not installed; run from $PWD"
fi
[ $# -gt 0 ] || set -- $(python benchmarks/gpu_day.py parts)
failed=()
for part in "$@"; do
    timeout --kill-after=10 590 python benchmarks/gpu_day.py run "$part" "${dry[@]}" --out "${OUT:-runs/gpu_day.json}" ||
        failed+=("$part")
done
if [ ${#failed[@]} -gt 0 ]; then echo "failed: ${failed[*]}" >&2; exit 1; fi
