"""Search while answering, sized for a laptop: from a model that answers from documents (configs/rag_tiny.py).

python -m scripts.refrag_finetune configs/refrag_tiny.py --knowledge_base data/rag_examples/knowledge_base
"""

knowledge_base = "data/rag_examples/knowledge_base"
source = "rag"
retriever_type = "bm25"
max_hops = 4
top_k_per_hop = 2
follow_ups = 6  # a small model learns to look things up from many questions
max_doc_length = 200
max_seq_len = 1536
device_batch_size = 1
total_batch_size = 4608
num_steps = 600
init_lr_frac = 1.0
matrix_lr = 0.01  # at .02 a model this small forgets how to look things up
warmdown_frac = 0.3
eval_every = 200
log_every = 20
