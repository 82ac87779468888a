#!/usr/bin/env bash
# Techniques by mixers on SmolLM2-135M, one run after the other; finished ones are skipped.
# On a machine with a GPU: TRAINER=gpu TOKENS=100000000 TECHNIQUES="kl copy matrix hidden all" MIXERS="$(ls conf/mixer | sed 's/.yaml//')" ./run.sh
#
#   DATA        folder with wikitext2/{train,valid}.txt.gz and tinystories/train.txt.gz
#   TOKENS      training tokens of every run, equal for all
#   MIXERS      names in conf/mixer; TECHNIQUES  among kl copy matrix hidden all
set -euo pipefail
cd "$(dirname "$0")/../.."
DATA=${DATA:?folder with wikitext2 and tinystories}
TOKENS=${TOKENS:-32768}
SEED=${SEED:-0}
TRAINER=${TRAINER:-auto}
OUT=${OUT:-runs/subquadratic-smollm2}
PYTHON=${PYTHON:-.venv/bin/python}
MIXERS=${MIXERS:-sliding gated_deltanet gla linear_attention}
TECHNIQUES=${TECHNIQUES:-copy all}
COMMON=(experiment=subquadratic model=smollm2 trainer="$TRAINER" data=text data.path="$DATA/*/train.txt.gz"
        data.val_path="$DATA/wikitext2/valid.txt.gz" data.source.detokenize=wikitext data.val_tokens=16384 data.seq_len=256 data.batch_size=2
        schedule.mixers_share=0.1 schedule.hidden_share=0.2 # the published 2.6 and 5.3 % would be 2 and 3 steps
        schedule.tokens="$TOKENS" run.measure_before=false run.checkpoint_every=1000000 run.efficiency_seconds=0 run.mfu=false
        seed="$SEED")

for mixer in $MIXERS; do
  # Mamba has no mixing matrix per head: its outputs are aligned instead
  matrix=matrix; [ "$mixer" = mamba ] && matrix=mixer_output
  for technique in $TECHNIQUES; do
    case $technique in
      kl) keys=(mixer.init=random schedule.mixers=null schedule.hidden=false) ;;
      copy) keys=(schedule.mixers=null schedule.hidden=false) ;;
      matrix) keys=(mixer.init=random schedule.mixers=$matrix schedule.hidden=false) ;;
      hidden) keys=(mixer.init=random schedule.mixers=null) ;;
      all) keys=(schedule.mixers=$matrix) ;;
      *) echo "unknown technique $technique" >&2; exit 1 ;;
    esac
    dir="$OUT/$mixer-$technique"
    if [ -f "$dir/report.html" ]; then continue; fi
    rm -rf "$dir"
    "$PYTHON" train.py "${COMMON[@]}" mixer="$mixer" hydra.run.dir="$dir" "${keys[@]}"
    rm -rf "$dir/checkpoints"
  done
done
"$PYTHON" experiments/subquadratic-stories/table.py "$OUT" experiments/subquadratic-smollm2/results.csv
