#!/usr/bin/env bash
# The whole line on the demo model: scenes, archive, verify, TorchServe up, curl, predict, compare, TorchServe down.
# Usage: demo.sh OUT_DIR, with `detserve` on the PATH and the repository's root as the working directory.
set -euo pipefail
out=${1:?usage: demo.sh OUT_DIR}
export DETSERVE_INSTANCE=demo

say() { printf '\n\033[1m$ %s\033[0m\n' "$*"; }
run() { say "$@"; "$@"; }

rm -rf "$out" && mkdir -p "$out"
trap 'detserve serve stop >/dev/null 2>&1 || true' EXIT

run detserve scenes --out "$out/scenes" --count 8 --seed 2026
run detserve archive model_store/shapes/shapes.yaml --force
run detserve verify model_store/shapes.mar
run detserve serve start --models shapes --port free
url=$(detserve serve status --json | python -c 'import json, sys; print(json.loads(sys.stdin.readlines()[-1])["inference_url"])')
image=$out/scenes/images/000001.jpg
if command -v curl >/dev/null; then
  say curl -H 'Authorization: Bearer $(detserve serve token)' "$url/predictions/shapes" -T "$image"
  curl --fail-with-body --silent --show-error -H "Authorization: Bearer $(detserve serve token)" \
    "$url/predictions/shapes" -T "$image"
  echo
else
  echo "curl is not installed; detserve predict sends the same request"
fi
run detserve predict shapes "$out"/scenes/images/*.jpg --score-threshold 0.5 --save-dir "$out/pictures" >"$out/predictions.jsonl"
run detserve compare shapes "$out"/scenes/images/*.jpg --work-dir "$out/compare"
run detserve serve stop
printf '\nDone. Look at the pictures:\n  %s\n  %s\n' "$out/pictures" "$out/compare"
