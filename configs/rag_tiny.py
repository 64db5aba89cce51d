"""RAG fine-tuning sized for a laptop: from few documents to top_k, several questions on each context.

python -m scripts.rag_finetune configs/rag_tiny.py --knowledge_base data/rag_examples/knowledge_base \
    --queries data/rag_examples/queries/train.jsonl
"""

knowledge_base = "data/rag_examples/knowledge_base"
queries = "data/rag_examples/queries/train.jsonl"
base_tasks = []
source = "mid"
retriever_type = "bm25"
top_k = 5
max_doc_length = 200
max_seq_len = 2304
device_batch_size = 1  # so that two processes add up the same two gradients as one
total_batch_size = 4608
curriculum = ["1:0.1", "2:0.1", "5:0.5", "1-5:0.3"]
questions_per_document = 2
num_steps = 1100
init_lr_frac = 1.0
matrix_lr = 0.01  # at .02 a model this small forgets how to look things up
warmdown_frac = 0.3
eval_every = 550
log_every = 20
