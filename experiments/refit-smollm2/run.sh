#!/usr/bin/env bash
# All runs of this comparison, one after the other; each adds its line to results.csv as soon as it is done.
#
#   DATA     folder with wikitext2/{train,valid,test}.txt.gz, tinystories/{train,valid}.txt.gz and the tasks' NAME/eval.jsonl
#   SEEDS    order of the training data
#   TASKS    that are asked, beside repeating lists of words; all four of the README's: TASKS="lambada hellaswag piqa arc_easy"
#   ITEMS    of each task, at most; TEXT: tokens of each text that perplexity is measured on
#   ONLY     a pattern of names (DEPTH-METHOD-TOKENS-SEED), the runs that match are done: ONLY='23-output-*'
#   DEPTHS, BUDGETS    layers that are left; training tokens after the refit
set -euo pipefail
cd "$(dirname "$0")/../.."
DATA=${DATA:?folder with wikitext2, tinystories and the tasks}
SEEDS=${SEEDS:-0 1}
TASKS=${TASKS:-lambada}
ITEMS=${ITEMS:-300}
TEXT=${TEXT:-8192}
ONLY=${ONLY:-*}
DEPTHS=${DEPTHS:-23 26 20}
BUDGETS=${BUDGETS:-0 29696}
TRAINER=${TRAINER:-auto}
OUT=${OUT:-runs/refit-smollm2}
PYTHON=${PYTHON:-.venv/bin/python}
HERE=experiments/refit-smollm2
MIXED="$DATA/*/train.txt.gz"
WIKITEXT="$DATA/wikitext2/train.txt.gz"
# the same layers for all methods; LINEAR: of each gap the one in whose place a linear block stands
declare -A LAYERS=([26]=12,13,14,25 [23]=3,12,13,14,17,25,26 [20]=3,4,5,6,7,12,13,14,17,26)
declare -A LINEAR=([26]=12,25 [23]=3,12,17,25 [20]=3,12,17,26)
COMMON=(trainer="$TRAINER" data=text data.val_path="$DATA/wikitext2/valid.txt.gz" data.source.detokenize=wikitext
        data.val_tokens=4096 data.batch_size=1 schedule=oneshot schedule.count=null schedule.lr=1e-4 loss=[kl]
        run.checkpoint_every=1000000 run.efficiency_seconds=0 run.mfu=false export=false)

method() { # depth, name, overrides...
  local depth=$1 method=$2 budget seed name dir
  shift 2
  for budget in $BUDGETS; do
    for seed in $SEEDS; do
      # nothing is drawn at random before training
      if [ "$budget" = 0 ] && [ "$seed" != "${SEEDS%% *}" ]; then continue; fi
      name="$depth-$method-$budget-$seed"
      dir="$OUT/$name"
      # shellcheck disable=SC2053
      if [[ $name != $ONLY ]] || [ -f "$dir/done" ]; then continue; fi
      rm -rf "$dir"
      PYTHONPATH="$HERE${PYTHONPATH:+:$PYTHONPATH}" "$PYTHON" train.py "${COMMON[@]}" edit=remove data.path="$MIXED" \
        schedule.layers="[${LAYERS[$depth]}]" schedule.tokens="$budget" seed="$seed" hydra.run.dir="$dir" "$@"
      # shellcheck disable=SC2086
      "$PYTHON" "$HERE/evaluate.py" score "$dir" --data "$DATA" --items "$ITEMS" --tokens "$TEXT" --tasks $TASKS
      rm -rf "$dir/checkpoints"
      touch "$dir/done"
    done
  done
}

for depth in $DEPTHS; do
  # baselines, then ours
  method "$depth" none
  method "$depth" magnitude refit=[magnitude]
  method "$depth" replaceme refit=[replaceme]
  method "$depth" linear edit._target_=gap_edit.LinearAtGaps +edit.linear="[${LINEAR[$depth]}]"
  method "$depth" linear-local edit._target_=gap_edit.LinearAtGaps +edit.linear="[${LINEAR[$depth]}]" \
    refit=[local] refit.local.blocks=gaps
  method "$depth" output refit=[output]
  method "$depth" local refit=[local]
  method "$depth" output-local refit=[output,local]
  if [ -f conf/edit/merge.yaml ]; then
    method "$depth" merge edit=merge
    method "$depth" merge-output edit=merge refit=[output]
  fi
done

# one thing turned, at 23 layers
depth=23
if [[ " $DEPTHS " == *" 23 "* ]]; then
  for blocks in gaps above; do
    method $depth "output-$blocks" refit=[output] refit.output.blocks="$blocks"
    method $depth "local-$blocks" refit=[local] refit.local.blocks="$blocks"
  done
  for ridge in 0.01 0.03 0.1 0.3; do
    method $depth "output-ridge$ridge" refit=[output] refit.output.ridge="[$ridge]"
  done
  for tokens in 4096 8192 16384 65536 131072; do
    method $depth "output-tokens$tokens" refit=[output] refit.output.tokens="$tokens"
  done
  method $depth output-wikitext refit=[output] data.path="$WIKITEXT"
  method $depth output-folds1 refit=[output] refit.output.folds=1
  method $depth output-attention refit=[output] refit.output.projections=[attention]
  method $depth output-mlp refit=[output] refit.output.projections=[mlp]
  for share in 0.25 0.5 1.0; do
    method $depth "output-share$share" refit=[output] +refit.output.attention_share="[$share]"
  done
  for epochs in 1 2 8; do
    method $depth "local-epochs$epochs" refit=[local] refit.local.epochs="$epochs"
  done
  method $depth local-sublayers refit=[local] refit.local.sublayers=true
fi
"$PYTHON" "$HERE/evaluate.py" table
