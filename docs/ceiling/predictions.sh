#!/usr/bin/env bash
# Checks of the prediction, into docs/ceiling: `predictions.sh noise` and `predictions.sh tiny`.
# A run goes on where it was stopped; after new weights remove results/ceiling/*tiny* first.
set -euo pipefail
cd "$(dirname "$0")/../.."
python="${PYTHON:-.venv/bin/python}"
episodes="${EPISODES:-100}"
tasks="${TASKS:-all}"
level="${LEVEL:-normal}"
runs=results/ceiling

sim() { "$python" -m vlm_local sim --max-steps 70 --films 0 "$@"; }

case "${1:-}" in
noise) # counted in other episodes than those predicted
    sources=() results=()
    for noise in 0.1 0.2 0.3 0.5; do
        sim --policy oracle --noise $noise --task all --episodes 30 --seed 40000 --out $runs/answers-noise-$noise
        sim --policy oracle --noise $noise --task all --episodes "$episodes" --seed 50000 --out $runs/noise-$noise
        sources+=($runs/answers-noise-$noise) results+=($runs/noise-$noise)
    done
    ;;
tiny) # asked about pictures that the oracle's way leads to, then played
    sim --policy oracle --task "$tasks" --level "$level" --episodes 20 --films 20 --seed 40000 --out $runs/pictures-$level
    "$python" -m vlm_local eval --data $runs/pictures-$level --policy tiny --resume --out $runs/answers-tiny-$level
    sim --policy tiny --task "$tasks" --level "$level" --episodes "$episodes" --seed 50000 --out $runs/tiny-$level
    sources=($runs/answers-tiny-$level) results=($runs/tiny-$level)
    ;;
*)
    echo "say noise or tiny" >&2
    exit 2
    ;;
esac
"$python" -m vlm_local ceiling --out docs/ceiling --episodes "$episodes" --predict "${sources[@]}" --observed "${results[@]}"
