#!/usr/bin/env bash
# The whole road in a few minutes on two CPU cores: data -> tiny base model -> DEFT fine-tuning on
# megatron-core -> Hugging Face -> score. Every command is printed before it runs: this is the tutorial.
#
#   examples/quickstart.sh [FOLDER]        default: runs/quickstart
#
# FigFont asks to read a word drawn as ASCII art. The paper trains 1.5B to 8B models on all its fonts;
# here a model of half a million parameters reads one font, and is scored on words it was not trained on.
set -euo pipefail
cd "$(dirname "$0")/.."

out=${1:-runs/quickstart}
config=examples/configs/quickstart.yaml
warmup_steps=${WARMUP_STEPS:-150} # smaller numbers: to see the road work, not to learn anything
steps=${STEPS:-400}
train_size=${TRAIN_SIZE:-8000}
test_size=${TEST_SIZE:-400}
objectives=${OBJECTIVES:-deft} # "deft nll" also keeps training the base with plain NLL

command -v megatron-deft > /dev/null || {
  echo "megatron-deft is not on the PATH: run make quickstart, or activate the environment it is installed in" >&2
  exit 2
}

step() { printf '\n\033[1m# %s\033[0m\n' "$1"; }
run() {
  printf '$'
  for word in "$@"; do
    case $word in *[!A-Za-z0-9_./=:,+-]*) word="'$word'" ;; esac
    printf ' %s' "$word"
  done
  printf '\n'
  "$@"
}

if [ -e "$out" ]; then
  [ -e "$out/.quickstart" ] || { echo "$out exists and is not a quickstart's: name another folder" >&2; exit 2; }
  rm -rf "$out"
fi
mkdir -p "$out" && touch "$out/.quickstart"

step "1. Data: FigFont in one font; no test word is a training word"
run megatron-deft prepare figfont "$out/data" --fonts cybermedium \
  --train-size "$train_size" --test-size "$test_size"

step "2. A tiny Llama: random weights, a tokenizer learnt from the data"
run megatron-deft tiny "$out/random" --corpus "$out/data/train.parquet" --rows 4000 \
  --split '\n+| {4,}|[A-Z](?![a-z ])' --vocab-size 768 --hidden-size 128 --layers 2

step "3. The data as tokens, once for all runs"
run megatron-deft prepare chat "$out/set" "$out/data/train.parquet" --tokenizer "$out/random" \
  --format messages --max-length 256
run megatron-deft inspect data "$out/set" --n 1

step "4. A base worth fine-tuning: Hugging Face -> Megatron, then a short warm-up with plain NLL"
run megatron-deft convert import "$out/random" "$out/random-megatron"
run megatron-deft train "$config" --nproc-per-node 2 objective=nll optim.lr=0.003 \
  run_dir="$out/base-run" model.load="$out/random-megatron" train.steps="$warmup_steps" \
  data.train_sets="$out/set"
run megatron-deft convert export "$out/base-run" "$out/base"

step "5. DEFT fine-tuning, tensor parallel over 2 processes, and back to Hugging Face"
run megatron-deft convert import "$out/base" "$out/base-megatron"
for objective in $objectives; do
  run env OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 -m megatron_deft.train "$config" \
    objective="$objective" parallel.tensor=2 run_dir="$out/$objective-run" \
    model.load="$out/base-megatron" train.steps="$steps" \
    data.train_sets="$out/set" data.show_sample=false
  run megatron-deft convert export "$out/$objective-run" "$out/$objective"
done

step "6. Score base and fine-tuned models on held-out words"
# shellcheck disable=SC2086
run megatron-deft evaluate figfont "$out/base" $(printf "$out/%s " $objectives) \
  --data "$out/data/test.parquet" --out "$out/results.json" --max-new-tokens 8

step "7. What happened, on one page: curves, gates, landscapes, scores"
runs=(base="$out/base-run")
for objective in $objectives; do
  runs+=("$objective=$out/$objective-run")
done
run megatron-deft report "${runs[@]}" "$out/results.json" --out "$out/report.html"
echo
echo "Done in $SECONDS s. What to read next: $out/report.html, $out/deft-run/metrics.jsonl, README.md"
