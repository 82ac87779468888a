#!/usr/bin/env bash
# All runs of this comparison, one after the other, each scored as soon as it is done; what has a file in scores/ is skipped.
# On a machine with a GPU: TRAINER=gpu LAYER=1000000 SEEDS="0 1 2" ITEMS=1000 TOKENS=65536 ./run.sh
#
#   DATA     folder with wikitext2/{train,valid,test}.txt.gz, tinystories/train.txt.gz and the tasks' NAME/eval.jsonl
#   LAYER    training tokens for every layer that goes, equal for all methods that train
#   SEEDS    order of the data; which layers go, for random removal
#   DEPTHS   layers that are left; ONLY: a pattern of names (METHOD-to-DEPTH-SEED), the runs that match are done
#   ITEMS    of each task, at most; TOKENS: of each text that perplexity is measured on
set -euo pipefail
cd "$(dirname "$0")/../.."
DATA=${DATA:?folder with wikitext2, tinystories and the tasks}
LAYER=${LAYER:-4096}
SEEDS=${SEEDS:-0 1}
DEPTHS=${DEPTHS:-23 20 26}
ONLY=${ONLY:-*}
TRAINER=${TRAINER:-auto}
OUT=${OUT:-runs/ild-smollm2}
PYTHON=${PYTHON:-.venv/bin/python}
HERE=experiments/ild-smollm2
COMMON=(trainer="$TRAINER" data.val_tokens=4096 run.measure_before=false run.checkpoint_every=1000000 run.score_tokens=4096
        run.efficiency_seconds=0 run.samples=0 run.mfu=false export=false)
# half of the tokens of each text, or whatever their documents come to: nine tenths of WikiText-2
MIXED=(data=mix data.sources.wikitext.data=wikitext2 data.sources.wikitext.path="$DATA/wikitext2/train.txt.gz"
       data.sources.wikitext.val_path="$DATA/wikitext2/valid.txt.gz" data.sources.stories.path="$DATA/tinystories/train.txt.gz")
BY_DOCUMENTS=(data=text data.path="$DATA/*/train.txt.gz" data.val_path="$DATA/wikitext2/valid.txt.gz"
              data.source.detokenize=wikitext)
TEXT=("${MIXED[@]}")

method() { # name, depth, seed, overrides...
  local name="$1-to-$2-$3" depth=$2 seed=$3
  shift 3
  # shellcheck disable=SC2053
  if [[ $name != $ONLY ]] || [ -f "$HERE/scores/$name.json" ]; then return; fi
  rm -rf "${OUT:?}/$name"
  "$PYTHON" train.py "${COMMON[@]}" "${TEXT[@]}" seed="$seed" hydra.run.dir="$OUT/$name" schedule.target_layers="$depth" "$@"
  "$PYTHON" "$HERE/evaluate.py" score "$OUT/$name" --data "$DATA" --depths "$depth" --items "${ITEMS:-300}" \
    --tokens "${TOKENS:-8192}"
  rm -rf "$OUT/$name/checkpoints"
}

for depth in $DEPTHS; do
  tokens=$(((30 - depth) * LAYER))
  method ild-untrained "$depth" 0 experiment=ild importance=racing schedule.tokens=0
  method shortgpt-untrained "$depth" 0 experiment=shortgpt importance=block_influence
  method ablation-untrained "$depth" 0 experiment=ablation_no_heal importance=racing
  for seed in $SEEDS; do
    method ild "$depth" "$seed" experiment=ild importance=racing schedule.tokens="$tokens"
    method ild-any "$depth" "$seed" experiment=ild importance=racing schedule.contiguous=false schedule.tokens="$tokens"
    TEXT=("${BY_DOCUMENTS[@]}")
    method ild-by-documents "$depth" "$seed" experiment=ild importance=racing schedule.contiguous=false schedule.refit_share=0.25 \
      schedule.tokens="$tokens"
    TEXT=("${MIXED[@]}")
    method shortgpt "$depth" "$seed" experiment=shortgpt importance=block_influence schedule.tokens="$tokens"
    # ShortGPT's choice with our refit and our training; our choice healed after every cut and without refits, as ILD was before
    method shortgpt-refit "$depth" "$seed" experiment=shortgpt importance=block_influence schedule.tokens="$tokens" schedule.lr=1e-4 data.batch_size=1 \
      refit=[output]
    method ild-between "$depth" "$seed" experiment=iterative_bi importance=racing schedule.tokens="$tokens" \
      optim.decay_over=stage
    method iterative-bi "$depth" "$seed" experiment=iterative_bi importance=block_influence schedule.tokens="$tokens" optim.decay_over=stage
    method random "$depth" "$seed" experiment=random_removal schedule.tokens="$tokens" optim.decay_over=stage
  done
done
"$PYTHON" "$HERE/evaluate.py" table
