#!/usr/bin/env bash
# The whole path on an invented world, from raw text to a model that answers from documents it never saw:
#     bash runs/demo.sh
# Makes .venv, installs, and needs no download beyond that: about 12 minutes on 2 CPU cores, most of it training. The last line is
# one JSON object. Everything it makes lies under data/demo; delete that folder to start anew, or run again to go on.
set -euo pipefail
cd "$(dirname "$0")/.."
started=$(date +%s)
source runs/_setup.sh
setup
export NANOCHAT_BASE_DIR=$PWD/data/demo
examples=data/demo/rag_examples

# 1. documents, questions, a graph and a knowledge base; train, val and test are about different people and places
python -m scripts.prepare_rag_dataset --mode example --output $examples --num_documents 10000 --retriever_type bm25

# 2. tokenizer and pretraining on the training documents, after exercises in lookup
python -m scripts.tok_train --input $examples/text/train.jsonl --vocab_size 1024
python -m scripts.base_train configs/demo_base.py --input $examples/text/train.jsonl --resume auto

# 3. chat: questions about a passage in the message
python -m scripts.chat_sft configs/demo_sft.py --conversations $examples/conversations/train.jsonl --resume auto

# 4. answering from what the retriever finds
python -m scripts.rag_finetune configs/rag_tiny.py --knowledge_base $examples/knowledge_base \
    --queries $examples/queries/train.jsonl --val_queries $examples/queries/val.jsonl --resume auto

# 5. the same test questions closed book, with retrieved documents, with the gold document
python -m scripts.rag_eval --knowledge_base $examples/knowledge_base --queries $examples/queries/test.jsonl \
    --num_questions 1000 --output data/demo/eval

echo
echo "Ask it yourself: NANOCHAT_BASE_DIR=data/demo .venv/bin/python -m scripts.rag_chat --knowledge_base $examples/knowledge_base"
python - "$started" <<'PY'
import json, sys, time

figures = json.load(open("data/demo/eval/results.json"))["figures"]
names = {"closed_book_em": "closed_em", "rag_em": "rag_em", "gold_em": "gold_em", "recall_at_5": "recall_at_5"}
shown = {name: round(figures[key], 4) for name, key in names.items()}
print(json.dumps(shown | {"minutes": round((time.time() - int(sys.argv[1])) / 60, 1)}))
PY
