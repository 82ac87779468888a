#!/usr/bin/env bash
# All runs of this comparison, one after the other. On a machine with a GPU: TRAINER=gpu TOKENS=20000000 ./run.sh
#
#   DATA     folder with wikitext2/{train,valid,test}.txt.gz and lambada/eval.jsonl
#   TOKENS   training tokens of every run, equal for all methods
#   SEEDS    order of the data and fresh weights
set -euo pipefail
cd "$(dirname "$0")/../.."
DATA=${DATA:-../shared/data}
TOKENS=${TOKENS:-67584}
SEEDS=${SEEDS:-0 1}
TRAINER=${TRAINER:-cpu}
OUT=${OUT:-runs/iskd-smollm2}
PYTHON=${PYTHON:-.venv/bin/python}
COMMON=(trainer="$TRAINER" data=wikitext2 data.path="$DATA/wikitext2/train.txt.gz" data.val_path="$DATA/wikitext2/valid.txt.gz"
        data.val_tokens=8192 schedule.tokens="$TOKENS" run.measure_before=false run.checkpoint_every=1000000 export=true)

method() { # name, overrides...
  local name=$1; shift
  for seed in $SEEDS; do
    local dir="$OUT/$name-$seed"
    if [ -f "$dir/model/config.json" ]; then continue; fi
    rm -rf "$dir"
    "$PYTHON" train.py "${COMMON[@]}" seed="$seed" hydra.run.dir="$dir" "$@"
    rm -rf "$dir/checkpoints"
  done
}

method ours experiment=iskd
method paper experiment=iskd_paper
method kd experiment=kd
method l1 experiment=l1
method control experiment=finetune
SEEDS=0 method l1-unhealed experiment=l1 schedule.tokens=0
SEEDS=0 method ours-unhealed experiment=iskd schedule=oneshot schedule.count=11 schedule.tokens=0
"$PYTHON" experiments/iskd-smollm2/evaluate.py --data "$DATA" "$OUT"/*-[0-9]
