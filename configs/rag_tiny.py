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
max_seq_len = 1536
device_batch_size = 4
total_batch_size = 6144  # small steps, many of them: twice as fast per token read as steps of 12,288
curriculum = ["2:0.1", "3:0.3", "5:0.6"]
questions_per_context = 14
num_steps = 1100
init_lr_frac = 1.0
warmdown_frac = 0.5
eval_every = 275
log_every = 20
