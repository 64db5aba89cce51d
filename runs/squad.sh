#!/usr/bin/env bash
# The whole path on real text: Wikipedia and Dolly to learn from, SQuAD 1.1 to answer questions about.
#     NANOCHAT_DATA=folder bash runs/squad.sh [--minutes 60] [--gpu]
# The folder holds wiki_core.jsonl.gz, wiki_2018plus.jsonl.gz, dolly15k.jsonl.gz, squad11_train.json.gz and
# squad11_dev.json.gz; with squad20_dev.json.gz, half of whose questions have no answer, there is a second table.
# --minutes bounds the training time; preparing and evaluating come on top. --gpu: a model of 12 blocks, 768 wide, and
# batches for one GPU of 80 GB, in place of 4 blocks for two CPU cores. Output: data/squad_run.
set -euo pipefail
cd "$(dirname "$0")/.."
minutes=60
base=() sft=() rag=()
while [ $# -gt 0 ]; do
    case $1 in
        --minutes) minutes=${2:?--minutes needs a number}; shift 2 ;;
        --gpu)
            base=(--block_pattern M,T,M,T,M,T,M,T,M,T,M,T --d_model 768 --device_batch_size 32 --total_batch_size 65536 --num_steps 4000)
            sft=(--device_batch_size 32 --total_batch_size 65536 --num_steps 400)
            rag=(--device_batch_size 8 --total_batch_size 98304 --num_steps 6000)
            shift ;;
        *) echo "error: unknown argument $1; usage: NANOCHAT_DATA=folder bash runs/squad.sh [--minutes 60] [--gpu]" >&2; exit 2 ;;
    esac
done
: "${NANOCHAT_DATA:?error: set NANOCHAT_DATA to the folder with the data files (see the top of runs/squad.sh)}"
for file in wiki_core.jsonl.gz wiki_2018plus.jsonl.gz dolly15k.jsonl.gz squad11_train.json.gz squad11_dev.json.gz; do
    [ -f "$NANOCHAT_DATA/$file" ] || { echo "error: $NANOCHAT_DATA/$file is missing" >&2; exit 2; }
done
source runs/_setup.sh
setup
export NANOCHAT_BASE_DIR=$PWD/data/squad_run
squad=data/squad_run/squad
share() { python -c "print(round($minutes * $1, 2))"; }

prepare() { # DEV_FILE OUTPUT
    python -m scripts.prepare_rag_dataset --mode squad --input "$NANOCHAT_DATA/squad11_train.json.gz" \
        --dev_input "$NANOCHAT_DATA/$1" --output "$2" --retriever_type bm25
}
evaluate() { # DATA OUTPUT
    python -m scripts.rag_eval --knowledge_base "$1/test_knowledge_base" --queries "$1/queries/test.jsonl" \
        --systems closed,bm25,gold --num_questions 1000 --output "$2" --json
}

prepare squad11_dev.json.gz $squad
wiki=$NANOCHAT_DATA/wiki_core.jsonl.gz,$NANOCHAT_DATA/wiki_2018plus.jsonl.gz
python -m scripts.tok_train --input "$wiki" --vocab_size 4096 --max_chars 60000000
python -m scripts.base_train configs/squad_base.py --input "$wiki" --max_minutes "$(share 0.25)" ${base[@]+"${base[@]}"}
python -m scripts.chat_sft configs/squad_sft.py --dolly_path "$NANOCHAT_DATA/dolly15k.jsonl.gz" --max_minutes "$(share 0.05)" \
    ${sft[@]+"${sft[@]}"}
python -m scripts.rag_finetune configs/squad_rag.py --knowledge_base $squad/knowledge_base \
    --queries $squad/queries/train.jsonl --val_queries $squad/queries/val.jsonl --max_minutes "$(share 0.7)" \
    ${rag[@]+"${rag[@]}"}
evaluate $squad data/squad_run/eval
if [ -f "$NANOCHAT_DATA/squad20_dev.json.gz" ]; then
    prepare squad20_dev.json.gz data/squad_run/squad2
    evaluate data/squad_run/squad2 data/squad_run/eval2
fi
