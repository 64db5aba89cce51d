"""RAG fine-tuning of runs/squad.sh on SQuAD 1.1's training questions; --max_minutes bounds it."""

knowledge_base = "data/squad_run/squad/knowledge_base"
base_tasks = []
source = "mid"
retriever_type = "bm25"
top_k = 5
max_doc_length = 300
max_seq_len = 3072
device_batch_size = 3
total_batch_size = 9216
curriculum = ["1:0.45", "3:0.15", "5:0.25", "1-5:0.15"]
questions_per_document = 5
cite = True
absent = 0.15
num_steps = 2000
init_lr_frac = 1.0
matrix_lr = 0.01  # at .02 a small model forgets how to look things up
eval_every = 200
log_every = 20
