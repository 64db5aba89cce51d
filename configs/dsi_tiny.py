"""A search index of some thousand documents, sized for a laptop.

python -m scripts.dsi_train configs/dsi_tiny.py --documents data/rag_examples/documents.jsonl
"""

model = "t5"
scheme = "atomic"
width = 256
layers = 1
vocab_size = 8192
lr = 3e-4
embed_lr = 0.05
total_batch_size = 4096
num_steps = 1200
warmup_steps = 50
warmdown_frac = 0.5
eval_every = 500
save_every = 1200
log_every = 50
