#!/usr/bin/env bash
# Does the rank-flip guard pay? 30 -> 26 layers with and without it, the same training tokens in all, trials included.
#   DATA, SEEDS, TRAINER, OUT, PYTHON as in run.sh; STAGE: tokens per removed layer, half of them for three trials of
#   whole steps: a multiple of 6 x 1024
set -euo pipefail
cd "$(dirname "$0")/../.."
DATA=${DATA:?folder with wikitext2 and tinystories}
STAGE=${STAGE:-6144}
SEEDS=${SEEDS:-0 1}
TRAINER=${TRAINER:-auto}
OUT=${OUT:-runs/ild-candidates}
PYTHON=${PYTHON:-.venv/bin/python}
COMMON=(trainer="$TRAINER" experiment=iterative_bi importance=racing data=text data.path="$DATA/*/train.txt.gz"
        data.val_path="$DATA/wikitext2/valid.txt.gz" data.source.detokenize=wikitext data.val_tokens=8192
        optim.decay_over=stage run.measure_before=false run.checkpoint_every=1000000 export=false)

for seed in $SEEDS; do
  "$PYTHON" train.py "${COMMON[@]}" seed="$seed" hydra.run.dir="$OUT/one-$seed" schedule.tokens=$((4 * STAGE))
  "$PYTHON" train.py "${COMMON[@]}" seed="$seed" hydra.run.dir="$OUT/three-$seed" schedule.tokens=$((2 * STAGE)) \
    schedule.candidates=3 schedule.trial_tokens=$((STAGE / 6))
done
"$PYTHON" - "$OUT" <<'END'
import json, sys
from pathlib import Path
print("| run | layers removed | tokens k | s | KL | ppl | trials that changed the choice |\n|---|---|---|---|---|---|---|")
for run in sorted(Path(sys.argv[1]).iterdir()):
    rows = json.loads((run / "stages.json").read_text())
    last = [row for row in rows if row["status"] == "kept"][-1]
    left = [edit["layer"] for row in rows if row["status"] == "kept" for edit in row["edits"]]
    flips = sum("instead of" in event for row in rows for event in row.get("events", []))
    seconds = sum(row["seconds"] for row in rows)
    print(f"| {run.name} | {left} | {last['tokens'] / 1e3:.0f} | {seconds:.0f} | {last['kl']:.4f} | {last['ppl']:.2f} | {flips} |")
END
