#!/usr/bin/env bash
# A row per mixer and technique, and hybrids without a token, one run after the other, each scored as soon as it is done; what has
# a file in scores/ is skipped, so that the table fills over days.
# On a machine with a GPU: TRAINER=gpu TOKENS=100000000 ITEMS=1000 EVAL_TOKENS=65536 ./run.sh
#
#   DATA        folder with wikitext2/{train,valid,test}.txt.gz, tinystories/train.txt.gz and the tasks' NAME/eval.jsonl
#   TOKENS      training tokens of every run but the hybrids without a token, equal for all; rows of other budgets than
#               8,192 stand beside those, as TECHNIQUE@TOKENS
#   MIXERS      names in conf/mixer; TECHNIQUES  among copy local all (kl matrix hidden, for the paper's grid); HYBRIDS  among
#               restore gates every_fourth every_second (which keeps half); TRAINED  mixers in conf/mixer, with a quarter of the
#               layers left as restore says and TOKENS of local work and training; each may be empty
#   ONLY        a pattern of names (MIXER-TECHNIQUE, hybrid-CHOICE): the runs that match are done
#   ITEMS       of each task, at most, for hybrids; EVERY: the best technique of a mixer is asked every n-th of them, the others
#               texts and recall to 256 tokens alone; EVAL_TOKENS: of each text; SECONDS_OF_DECODING: for timing at 8,192 tokens
#   MODEL       tiny = random weights, to try the script; EXTRA  further overrides; PLAN=1 shows the plans alone
set -euo pipefail
cd "$(dirname "$0")/../.."
DATA=${DATA:?folder with wikitext2, tinystories and the tasks}
TOKENS=${TOKENS:-8192}
SEED=${SEED:-0}
MODEL=${MODEL:-smollm2}
TRAINER=${TRAINER:-auto}
OUT=${OUT:-runs/subquadratic-smollm2}
SCORES=${SCORES:-experiments/subquadratic-smollm2/scores}
PYTHON=${PYTHON:-.venv/bin/python}
MIXERS=${MIXERS-gated_deltanet gla window sliding $(cd conf/mixer && for file in *.yaml; do echo "${file%.yaml}"; done | grep -vxE 'gated_deltanet|gla|window|sliding')}
TECHNIQUES=${TECHNIQUES-copy local all}
HYBRIDS=${HYBRIDS-restore gates every_fourth every_second}
TRAINED=${TRAINED-sliding gated_deltanet}
ONLY=${ONLY:-*}
HERE=experiments/subquadratic-smollm2
read -ra EXTRA <<< "${EXTRA:-} ${PLAN:+plan_only=true}"
if [ "$MODEL" = tiny ]; then LENGTH=160 LAYERS=4; else LENGTH=256 LAYERS=30; fi
COMMON=(model="$MODEL" trainer="$TRAINER" data=text data.path="$DATA/*/train.txt.gz" data.val_path="$DATA/wikitext2/valid.txt.gz"
        data.source.detokenize=wikitext data.val_tokens=4096 data.seq_len="$LENGTH" run.score_tokens=2048
        run.measure_before=false run.checkpoint_every=1000000 run.efficiency_seconds=0 run.samples=0 run.mfu=false seed="$SEED")

AT=$([ "$TOKENS" = 8192 ] || echo "@$TOKENS")

skipped() { # name
  # shellcheck disable=SC2053
  [[ $1 != $ONLY ]] || [ -f "$SCORES/$1.json" ]
}

train() { # name, overrides...
  local dir="$OUT/$1"
  shift
  if [ ! -f "$dir/model/config.json" ]; then
    rm -rf "$dir"
    "$PYTHON" train.py "${COMMON[@]}" "$@" hydra.run.dir="$dir" "${EXTRA[@]}"
  fi
  rm -rf "$dir/checkpoints"
}

ask() { # what of evaluate.py, its arguments...
  if [ -n "${PLAN:-}" ]; then return; fi
  "$PYTHON" "$HERE/evaluate.py" "$@" --data "$DATA" --items "${ITEMS:-300}" --tokens "${EVAL_TOKENS:-4096}" \
    --seconds "${SECONDS_OF_DECODING:-60}" --scores "$SCORES"
}

row() { # name, overrides...: asked everything
  if skipped "$1"; then return; fi
  train "$@"
  ask score "$OUT/$1"
  rm -rf "$OUT/$1/model"
}

UNALIGNED=(schedule.mixers=null schedule.hidden=false)
SHARES=(schedule.mixers_share=0.1 schedule.hidden_share=0.2) # the published 2.6 and 5.3 % would be 2 and 3 steps
# no token first: minutes each, and what every trained row has to beat
for choice in $HYBRIDS; do
  keys=()
  case $choice in
    restore | gates) keys=(schedule.attention_share=0.25 importance="$choice") ;;
    every_fourth) # its attention stays, in as many layers as a share of a quarter keeps: 0, 4, 8 ...
      layers=""
      for ((layer = 0; layer < LAYERS; layer++)); do if ((layer % 4 != 0)); then layers+="${layers:+,}$layer"; fi; done
      keys=(schedule.layers="[$layers]") ;;
    every_second) keys=(schedule.layers=every_second) ;;
    *) echo "unknown hybrid $choice" >&2; exit 1 ;;
  esac
  row "hybrid-$choice" experiment=subquadratic mixer=window "${UNALIGNED[@]}" schedule.tokens=0 "${keys[@]}"
done
for mixer in $TRAINED; do
  row "hybrid_$mixer-restore$AT" experiment=local_first mixer="$mixer" schedule.attention_share=0.25 importance=restore importance.stand_in=64 schedule.tokens="$TOKENS"
done
for mixer in $MIXERS; do
  runs=()
  for technique in $TECHNIQUES; do
    case $technique in
      copy) keys=(experiment=subquadratic "${UNALIGNED[@]}") ;;
      local) keys=(experiment=local_first) ;;
      all) keys=(experiment=subquadratic "${SHARES[@]}") ;; # mixing matrices, or outputs of a mixer that has none
      kl) keys=(experiment=subquadratic mixer.init=random "${UNALIGNED[@]}") ;;
      matrix) keys=(experiment=subquadratic mixer.init=random schedule.hidden=false "${SHARES[@]}") ;;
      hidden) keys=(experiment=subquadratic mixer.init=random schedule.mixers=null "${SHARES[@]}") ;;
      *) echo "unknown technique $technique" >&2; exit 1 ;;
    esac
    name="$mixer-$technique$AT"
    if ! skipped "$name"; then
      train "$name" "${keys[@]}" mixer="$mixer" schedule.tokens="$TOKENS"
      ask look "$OUT/$name"
    fi
    if [ -f "$SCORES/$name.json" ]; then runs+=("$OUT/$name"); fi
  done
  if [ ${#runs[@]} -gt 0 ]; then
    ask best "${runs[@]}" --every "${EVERY:-3}"
    for run in "${runs[@]}"; do rm -rf "$run/model"; done
  fi
done
if [ -z "${PLAN:-}" ]; then "$PYTHON" "$HERE/evaluate.py" table --scores "$SCORES"; fi
