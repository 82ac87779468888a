#!/usr/bin/env bash
# All runs of this comparison, one after the other, each scored as soon as it is done; what has a file in scores/ is skipped.
#
#   DATA     folder with wikitext2/{train,valid,test}.txt.gz, tinystories/train.txt.gz and the tasks' NAME/eval.jsonl
#   SHARES   of the blocks' parameters; DECODE: of the teacher's time for a token after 2,048 tokens
#   TOKENS   training tokens of every run; SEEDS: order of the data
#   ONLY     a pattern of names (METHOD-SHARE-SEED): the runs that match are done
#   ITEMS    of each task, at most; TEXT: tokens of each text that perplexity is measured on
set -euo pipefail
cd "$(dirname "$0")/../.."
DATA=${DATA:?folder with wikitext2, tinystories and the tasks}
SHARES=${SHARES:-0.9 0.8 0.7 0.6 0.5}
DECODE=${DECODE:-70%}
TOKENS=${TOKENS:-28672}
SEEDS=${SEEDS:-0 1}
ONLY=${ONLY:-*}
TRAINER=${TRAINER:-auto}
OUT=${OUT:-runs/budget-smollm2}
PYTHON=${PYTHON:-.venv/bin/python}
HERE=experiments/budget-smollm2
TEXTS=(model=smollm2 trainer="$TRAINER" data=text data.path="$DATA/*/train.txt.gz" data.val_path="$DATA/wikitext2/valid.txt.gz"
       data.source.detokenize=wikitext data.val_tokens=4096 budget.fit_tokens=8192 budget.held_tokens=2048 budget.score_tokens=4096)
RUN=(run.measure_before=false run.checkpoint_every=1000000 run.efficiency_seconds=0 run.mfu=false export=false schedule.tokens="$TOKENS")

search() { # name, overrides...
  local name=$1
  shift
  if [ -f "$OUT/plans/$name/front.csv" ]; then return; fi
  "$PYTHON" -m iskd search "${TEXTS[@]}" hydra.run.dir="$OUT/plans/$name" "budget.params=[${SHARES// /,}]" "$@"
}

run() { # name, share, seed, overrides...
  local name="$1-$2-$3" seed=$3
  shift 3
  # shellcheck disable=SC2053
  if [[ $name != $ONLY ]] || [ -f "$HERE/scores/$name.json" ]; then return; fi
  rm -rf "${OUT:?}/$name"
  "$PYTHON" train.py experiment=budget "${TEXTS[@]}" "${RUN[@]}" seed="$seed" hydra.run.dir="$OUT/$name" "$@"
  "$PYTHON" "$HERE/evaluate.py" score "$OUT/$name" --data "$DATA" --items "${ITEMS:-300}" --tokens "${TEXT:-8192}"
  rm -rf "$OUT/$name/checkpoints"
}

search mixed
search removal budget.use=[remove]
search slim budget.use=[slim_75,slim_50,slim_30]
search merge budget.use=[merge]
search width budget.use=[slim_75,slim_50,slim_30] budget.native=true
"$PYTHON" "$HERE/evaluate.py" random "$OUT/plans/mixed" "$OUT/plans/random"
for share in $SHARES; do
  for seed in $SEEDS; do
    for method in mixed removal slim merge width random; do
      plan="$OUT/plans/$method/plan-params-$share.json"
      [ -f "$plan" ] && run "$method" "$share" "$seed" budget.plan="$plan"
    done
  done
done
for seed in $SEEDS; do
  for method in mixed removal; do
    use=$([ "$method" = removal ] && echo "budget.use=[remove]" || echo "budget.use=null")
    run "decode-$method" "$DECODE" "$seed" budget.decode_ms="$DECODE" budget.context=2048 "$use"
  done
done
"$PYTHON" "$HERE/evaluate.py" table
