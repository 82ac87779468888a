#!/usr/bin/env bash
# All plans and runs of this comparison. What is there is skipped: plans by their file, rows by their file in scores/, fitted
# options and scores by the library, so that it may be stopped anywhere and started again, with more SHARES too. The plans of
# the table lie beside this script, and are searched for again where FOUND is another folder.
#
#   DATA     folder with wikitext2/{train,valid,test}.txt.gz, tinystories/train.txt.gz and the tasks' NAME/eval.jsonl
#   SHARES   of the blocks' parameters
#   DECODE   of the teacher's time for a token after 2,048 tokens, e.g. 70%; empty = these rows are left out
#   FOUND    folder of the plans, a folder for each method
#   METHODS  of mixed, removal, slim, merge, width, random
#   SEEDS    of the order of the training text; untrained = as refitted
#   TOKENS   training tokens of every run but those; FITS, REFIT: tokens that a run fits its blocks to, and that its refit reads
#   ONLY     a pattern of names (METHOD-SHARE-SEED): the runs that match are done; ONLY=plans: plans and front.csv alone
#   FIT, HELD, SCORE, RACE   tokens that options are fitted to and judged by, that students and single options are scored on
#   EPOCHS   of local training behind a fit; ROUNDS, PAIRS, PLANS, FINALISTS: see conf/budget/default.yaml, whose values are
#            SCORE=4096 RACE=null EPOCHS=1 ROUNDS=2 PAIRS=16 PLANS=3 FINALISTS=4
#   ITEMS    of each task, at most; TEXT: tokens of each text that perplexity is measured on
set -euo pipefail
cd "$(dirname "$0")/../.."
DATA=${DATA:?folder with wikitext2, tinystories and the tasks}
SHARES=${SHARES:-0.9 0.8 0.7 0.6 0.5}
DECODE=${DECODE-70%}
METHODS=${METHODS:-mixed removal slim merge width random}
TOKENS=${TOKENS:-8192}
SEEDS=${SEEDS:-untrained 0 1}
ONLY=${ONLY:-*}
TRAINER=${TRAINER:-auto}
OUT=${OUT:-runs/budget-smollm2}
CACHE=${CACHE:-$OUT/cache}
PYTHON=${PYTHON:-.venv/bin/python}
HERE=experiments/budget-smollm2
FOUND=${FOUND:-$HERE/plans}
TEXTS=(trainer="$TRAINER" data=text data.path="$DATA/*/train.txt.gz" data.val_path="$DATA/wikitext2/valid.txt.gz"
       data.source.detokenize=wikitext cache_dir="$CACHE")
BUDGET=(budget.fit_tokens="${FIT:-8192}" budget.held_tokens="${HELD:-2048}" budget.score_tokens="${SCORE:-2048}"
        budget.race_tokens="${RACE:-512}" budget.epochs="${EPOCHS:-0}" budget.rounds="${ROUNDS:-0}"
        budget.pairs="${PAIRS:-16}" budget.plans="${PLANS:-2}" budget.finalists="${FINALISTS:-2}")
RUN=(data.val_tokens=1024 run.measure_before=false run.checkpoint_every=1000000 run.efficiency_seconds=0 run.samples=0 run.mfu=false data.batch_size=1)

has() { [[ " $METHODS " == *" $1 "* ]]; }

search() { # method, overrides...: plans for all sizes that lack one; what the method cannot have is told and left out
  local method=$1 lacking=() share
  shift
  has "$method" || return 0
  for share in $SHARES; do
    [ -f "$FOUND/$method/plan-params-$share.json" ] || lacking+=("$share")
  done
  if [ ${#lacking[@]} -gt 0 ] && ! solve "$method" "budget.params=[$(IFS=,; echo "${lacking[*]}")]" "$@"; then
    for share in "${lacking[@]}"; do
      solve "$method" "budget.params=[$share]" "$@" || true
    done
  fi
  for share in $DECODE; do
    [ -f "$FOUND/$method/plan-decode_ms-$share.json" ] || solve "$method" "budget.decode_ms=[$share]" budget.context=2048 "$@" || true
  done
}

solve() { # method, limit, overrides...
  local method=$1
  shift
  "$PYTHON" -m iskd search model=smollm2 "${TEXTS[@]}" data.val_tokens=4096 "${BUDGET[@]}" hydra.run.dir="$OUT/plans/$method" "$@" && mkdir -p "$FOUND/$method" \
    && cp "$OUT/plans/$method"/plan-*.json "$FOUND/$method"
}

run() { # method, size, seed, plan: refitted once, and healed from there; one student of two sizes is one row twice
  local made="$1-$2-untrained" name="$1-$2-$3"
  # shellcheck disable=SC2053
  if [[ $name != $ONLY ]] || [ -f "$HERE/scores/$name.json" ]; then return; fi
  "$PYTHON" "$HERE/evaluate.py" again "$name" "$4"
  if [ -f "$HERE/scores/$name.json" ]; then return; fi
  if [ ! -f "$OUT/$made/model/config.json" ]; then
    rm -rf "${OUT:?}/$made"
    "$PYTHON" train.py experiment=budget model=smollm2 "${TEXTS[@]}" "${RUN[@]}" schedule.tokens=0 hydra.run.dir="$OUT/$made" budget.plan="$4" \
      run.fit_tokens="${FITS:-16384}" refit.output.tokens="${REFIT:-8192}" refit.output.held_tokens=2048 export.dtype=float32
  fi
  if [ "$name" != "$made" ]; then
    rm -rf "${OUT:?}/$name"
    "$PYTHON" train.py model=local model.path="$OUT/$made/model" schedule=none loss=[kl] "${TEXTS[@]}" "${RUN[@]}" schedule.tokens="$TOKENS" \
      schedule.lr="${LR:-1e-4}" seed="$3" export=false hydra.run.dir="$OUT/$name"
  fi
  "$PYTHON" "$HERE/evaluate.py" score "$OUT/$name" --plan "$OUT/$made" --data "$DATA" --items "${ITEMS:-300}" --tokens "${TEXT:-4096}"
  rm -rf "$OUT/$name/checkpoints"
}

# One library, filled and raced once by `mixed`; the others choose from a part of it. Finalists with twenty blocks to fit make 40
# minutes of a search: those of removals, which have none, say how deep to go, and all other plans are chosen by the library's blocks.
search mixed budget.finalists="${FINALISTS:-0}"
search removal budget.use=[remove]
search slim budget.use=[slim_75,slim_50,slim_30] budget.finalists=0
search merge budget.use=[merge] budget.finalists=0
search width budget.use=[slim_75,slim_50,slim_30] budget.native=true budget.finalists=0
if has random; then "$PYTHON" "$HERE/evaluate.py" random "$FOUND/mixed" "$FOUND/random" --libraries "$CACHE/budget"; fi
"$PYTHON" "$HERE/evaluate.py" front "$FOUND"
[ "$ONLY" = plans ] && exit 0
for seed in $SEEDS; do
  for share in $SHARES $DECODE; do
    for method in $METHODS; do
      for plan in "$FOUND/$method"/plan-*-"$share".json; do
        if [ -f "$plan" ]; then run "$method" "${share%\%}" "$seed" "$plan"; fi
      done
    done
  done
done
"$PYTHON" "$HERE/evaluate.py" table
