"""RAG fine-tuning that answers and refuses well: many invented worlds, many questions without an answer.

python -m scripts.prepare_rag_dataset --num_documents 10000 --more_worlds 20 --retriever_type bm25 --output data/worlds
python -m scripts.rag_finetune configs/rag_example.py

An hour on one thread of a CPU, from the demo's chat model (NANOCHAT_BASE_DIR=data/demo). What it reaches is in
docs/results.md, "Answers and refusals"; what it is asked with there is --refusal_threshold 0.1.
"""

knowledge_base = "data/worlds/knowledge_base"
# a quarter of the talks begin with a question about somebody who does not exist, named after two who do
queries = ["data/worlds/queries/train.jsonl"] + 3 * ["data/worlds/queries/unanswerable_train.jsonl"]
val_queries = "data/worlds/queries/val.jsonl"
base_tasks = []
source = "mid"
save_tag = "example"
retriever_type = "bm25"
top_k = 5
max_doc_length = 200
max_seq_len = 2304
device_batch_size = 1
total_batch_size = 4608
curriculum = ["1:0.03", "2:0.04", "5:0.6", "1-5:0.33"]
questions_per_document = 1
absent = 0.45
num_steps = 12000
init_lr_frac = 1.0
matrix_lr = 0.01
warmdown_frac = 0.4
eval_every = 2000
save_every = 2000
log_every = 20
