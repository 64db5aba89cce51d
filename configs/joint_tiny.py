"""A search index that learns from answers, sized for a laptop: after configs/dsi_tiny.py and configs/rag_tiny.py.

python -m scripts.joint_train configs/joint_tiny.py --documents data/rag_examples/documents.jsonl \
    --queries data/rag_examples/queries/train.jsonl --val_queries data/rag_examples/queries/val.jsonl
"""

num_steps = 300
warmdown_frac = 0.5
eval_every = 100
log_every = 10
