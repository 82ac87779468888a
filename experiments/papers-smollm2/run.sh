#!/usr/bin/env bash
# What the three papers do, beside ours, at one budget; each run is scored as soon as it is done, and what has a file in scores/ is skipped.
#
#   DATA     folder with wikitext2/{train,valid,test}.txt.gz, tinystories/train.txt.gz and the tasks' NAME/eval.jsonl
#   TOKENS   training tokens of every run; SEEDS: order of the data
#   ONLY     a pattern of names (PART-METHOD-SEED, parts loss, importance, curve, edits): the runs that match are done
#   ITEMS    of each task, at most; ALONG: after every stage of a curve; TEXT: tokens of each text that perplexity is measured on
set -euo pipefail
cd "$(dirname "$0")/../.."
DATA=${DATA:?folder with wikitext2, tinystories and the tasks}
TOKENS=${TOKENS:-14848}
SEEDS=${SEEDS:-0 1}
ONLY=${ONLY:-*}
TRAINER=${TRAINER:-auto}
OUT=${OUT:-runs/papers-smollm2}
PYTHON=${PYTHON:-.venv/bin/python}
HERE=experiments/papers-smollm2
ASKED=$(realpath -m "$OUT/asked") # the data, and gaps in stories
[ -f "$ASKED/cbt_sentence/eval.jsonl" ] || "$PYTHON" "$HERE/gaps.py" "$DATA" "$ASKED"
COMMON=(model=smollm2 trainer="$TRAINER" data=mix data.sources.wikitext.data=wikitext2
        data.sources.wikitext.path="$DATA/wikitext2/train.txt.gz" data.sources.wikitext.val_path="$DATA/wikitext2/valid.txt.gz"
        data.sources.stories.path="$DATA/tinystories/train.txt.gz" data.val_tokens=2048 data.batch_size=1 schedule.tokens="$TOKENS"
        run.measure_before=false run.checkpoint_every=1000000 run.score_tokens=4096 run.efficiency_seconds=0 run.samples=0 run.mfu=false export=false)

method() { # name, seed, overrides...
  local name="$1-$2" seed=$2 dir
  shift 2
  dir="$OUT/$name"
  # shellcheck disable=SC2053
  if [[ $name != $ONLY ]] || [ -f "$HERE/scores/$name.json" ]; then return; fi
  rm -rf "${dir:?}"
  "$PYTHON" train.py "${COMMON[@]}" seed="$seed" hydra.run.dir="$dir" "$@"
  "$PYTHON" "$HERE/evaluate.py" score "$dir" --data "$ASKED" --items "${ITEMS:-300}" --tokens "${TEXT:-8192}"
  rm -rf "$dir/checkpoints"
}

gone() { "$PYTHON" -c "import json, sys; print(sorted({*range(30)} - {*json.load(open(sys.argv[1]))[0]['left']}))" "$1" | tr -d ' '; }

# ILD's loss (sum-KL/100, MSE of the state before the gap and after the final norm) and its neighbours, and which weights learn:
# the same seven layers out at once, no refit
SEVEN=(schedule=oneshot edit=remove schedule.layers=[12,13,14,15,16,17,18] schedule.lr=1e-4)
MSE=(+loss.hidden.kind=mse +loss.hidden.layers=stage)
FINAL=(+loss.final._target_=iskd.losses.kl_sum.FinalState +loss.final.weight=1.0)
# ISKD's students: blocks replaced one after the other, from 1 to 12, with tasks after every one
ALONG=(eval=quick eval.tasks=[hellaswag,cbt_sentence] eval.data_dir="$ASKED" eval.limit="${ALONG:-100}" eval.every=stage)
# at one size, 77 % of the parameters of the blocks: all three edits, and each alone
REFIT="refit: [{name: output, tokens: 8192, held_tokens: 2048}]" # once a step
REMOVE="{edit: remove, count: 3, per_stage: 3, importance: ablation, $REFIT}"
REPLACE="{edit: replace, block: slim, count: 4, per_stage: 4, importance: ablation, $REFIT}"
CONVERT="{edit: convert, mixer: gated_deltanet, layers: every_second, $REFIT}"

for seed in $SEEDS; do
  method loss-paper "$seed" "${SEVEN[@]}" loss=[kl_sum,hidden] "${MSE[@]}" "${FINAL[@]}" schedule.train=adjacent
  method loss-paper-all "$seed" "${SEVEN[@]}" loss=[kl_sum,hidden] "${MSE[@]}" "${FINAL[@]}"
  method loss-kl-adjacent "$seed" "${SEVEN[@]}" loss=[kl] schedule.train=adjacent
  method loss-kl "$seed" "${SEVEN[@]}" loss=[kl]
  method loss-kl-mse "$seed" "${SEVEN[@]}" loss=[kl,hidden] "${MSE[@]}"

  method importance-kl "$seed" experiment=ild schedule.target_layers=23 importance=racing
  # the items of tasks do not go by the run's seed: a choice of an hour would be the same for every seed
  CHOSEN=(importance=task_accuracy importance.data_dir="$DATA" importance.tasks=[blimp,copa,openbookqa] importance.items=100
          schedule.target_layers=23)
  for chosen in "$HERE"/scores/importance-tasks-*.json; do
    if [ -f "$chosen" ]; then CHOSEN=(schedule.target_layers=null "schedule.layers=$(gone "$chosen")"); fi
  done
  method importance-tasks "$seed" experiment=ild "${CHOSEN[@]}"

  # healed after every block, as published, and refitted and trained after the last one alone, where there is no curve of training
  method curve-between "$seed" experiment=iskd schedule.count=12 refit=[none] schedule.final_share=0 schedule.lr_new=3e-4 "${ALONG[@]}"
  method curve-iskd "$seed" experiment=iskd schedule.count=12
  for blocks in 4 8 12; do
    # bottlenecks in the same layers, and all blocks slimmed to the size that the student has then
    method "curve-kd$blocks" "$seed" experiment=kd schedule.count="$blocks"
    method "curve-l1-$blocks" "$seed" experiment=l1 block.ratio="$("$PYTHON" -c "print(round(1 - $blocks / 30 * 0.815, 3))")"
  done

  method edits-all "$seed" schedule=mixed "schedule.steps=[$REMOVE, $REPLACE, $CONVERT]" loss=[kl]
  method edits-remove "$seed" schedule=mixed "schedule.steps=[{edit: remove, count: 6, per_stage: 6, importance: ablation, $REFIT}]" loss=[kl]
  method edits-replace "$seed" schedule=mixed "schedule.steps=[{edit: replace, block: slim, count: 8, per_stage: 8, importance: ablation, $REFIT}]" loss=[kl]
  method edits-convert "$seed" schedule=mixed "schedule.steps=[$CONVERT]" loss=[kl]
done
"$PYTHON" "$HERE/evaluate.py" table
