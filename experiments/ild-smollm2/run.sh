#!/usr/bin/env bash
# All runs of this comparison, one after the other, each scored as soon as it is done.
# On a machine with a GPU: TRAINER=gpu STAGE=1000000 SEEDS="0 1 2" ITEMS=1000 TOKENS=65536 ./run.sh
#
#   DATA     folder with wikitext2/{train,valid,test}.txt.gz, tinystories/train.txt.gz and the tasks' NAME/eval.jsonl
#   STAGE    training tokens for every layer that goes, equal for all methods that heal
#   SEEDS    order of the data; which layers go, for random removal
#   ITEMS    of each task, at most; TOKENS: of each text that perplexity is measured on
set -euo pipefail
cd "$(dirname "$0")/../.."
DATA=${DATA:?folder with wikitext2, tinystories and the tasks}
STAGE=${STAGE:-4096}
SEEDS=${SEEDS:-0 1}
TRAINER=${TRAINER:-auto}
OUT=${OUT:-runs/ild-smollm2}
PYTHON=${PYTHON:-.venv/bin/python}
DEPTHS="23 20" # -23 % and -33 % of the layers
COMMON=(trainer="$TRAINER" data=text data.path="$DATA/*/train.txt.gz" data.val_path="$DATA/wikitext2/valid.txt.gz"
        data.source.detokenize=wikitext data.val_tokens=4096 optim.decay_over=stage run.measure_before=false
        run.checkpoint_every=1000000 run.keep=100 run.score_tokens=4096 run.efficiency_seconds=0 run.mfu=false export=false)

method() { # name, seed, overrides...
  local dir="$OUT/$1-$2" seed=$2
  shift 2
  if [ -f "$dir/done" ]; then return; fi
  rm -rf "$dir"
  "$PYTHON" train.py "${COMMON[@]}" seed="$seed" hydra.run.dir="$dir" "$@"
  "$PYTHON" experiments/ild-smollm2/evaluate.py score "$dir" --data "$DATA" --depths $DEPTHS \
    --items "${ITEMS:-64}" --tokens "${TOKENS:-8192}"
  rm -rf "$dir/checkpoints"
  touch "$dir/done"
}

method shortgpt-unhealed 0 experiment=shortgpt schedule=iterative schedule.target_layers=20 schedule.tokens=0
method ablation-no-heal 0 experiment=ablation_no_heal importance=racing schedule.target_layers=20
for seed in $SEEDS; do
  method ild "$seed" experiment=ild importance=racing schedule.target_layers=20 schedule.tokens=$((10 * STAGE))
  # half of the budget heals the student that is kept
  for depth in $DEPTHS; do
    method "ild-late-to-$depth" "$seed" experiment=ild importance=racing schedule.target_layers="$depth" \
      schedule.final_share=0.5 schedule.tokens=$(((30 - depth) * STAGE))
  done
  method iterative-bi "$seed" experiment=iterative_bi schedule.target_layers=20 schedule.tokens=$((10 * STAGE))
  method random "$seed" experiment=random_removal schedule.target_layers=20 schedule.tokens=$((10 * STAGE))
  for depth in 26 $DEPTHS; do
    method "shortgpt-to-$depth" "$seed" experiment=shortgpt schedule.target_layers="$depth" \
      schedule.tokens=$(((30 - depth) * STAGE))
  done
done
"$PYTHON" experiments/ild-smollm2/evaluate.py table "$OUT"
