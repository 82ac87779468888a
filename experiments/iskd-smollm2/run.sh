#!/usr/bin/env bash
# All runs of this comparison, one after the other. On a machine with a GPU: TRAINER=gpu TOKENS=20000000 ./run.sh
#
#   DATA     folder with wikitext2/{train,valid,test}.txt.gz and lambada/eval.jsonl
#   TOKENS   training tokens of every run, equal for all methods
#   SEEDS    order of the data and fresh weights
set -euo pipefail
cd "$(dirname "$0")/../.."
DATA=${DATA:?folder with wikitext2/*.txt.gz and lambada/eval.jsonl}
TOKENS=${TOKENS:-33792}
SEEDS=${SEEDS:-0 1}
TRAINER=${TRAINER:-auto}
OUT=${OUT:-runs/iskd-smollm2}
PYTHON=${PYTHON:-.venv/bin/python}
COMMON=(trainer="$TRAINER" data=wikitext2 data.path="$DATA/wikitext2/train.txt.gz" data.val_path="$DATA/wikitext2/valid.txt.gz"
        data.val_tokens=4096 schedule.tokens="$TOKENS" run.measure_before=false run.checkpoint_every=1000000 export=true)

method() { # name, seed, overrides...
  local dir="$OUT/$1-$2" seed=$2
  shift 2
  if [ -f "$dir/model/config.json" ]; then return; fi
  rm -rf "$dir"
  "$PYTHON" train.py "${COMMON[@]}" seed="$seed" hydra.run.dir="$dir" "$@"
  rm -rf "$dir/checkpoints"
}

for seed in $SEEDS; do
  method ours "$seed" experiment=iskd
  method ours-between "$seed" experiment=iskd refit=[none] schedule.final_share=0.3 schedule.refit_share=1 schedule.lr_new=3e-4 data.batch_size=2
  method width "$seed" experiment=width
  method paper "$seed" experiment=iskd_paper
  method l1 "$seed" experiment=l1
  method kd "$seed" experiment=kd
  method control "$seed" experiment=finetune
done
method l1-unhealed 0 experiment=l1 schedule.tokens=0
method ours-unhealed 0 experiment=iskd refit=[none] schedule=oneshot schedule.tokens=0
"$PYTHON" experiments/iskd-smollm2/evaluate.py --data "$DATA" "$OUT"/*-[0-9]
