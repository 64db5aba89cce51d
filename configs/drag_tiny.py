"""D-RAG on the graph of the example world, sized for a laptop.

python -m scripts.kg_prepare build --triples data/rag_examples/graph.txt --graph data/kg
python -m scripts.drag_finetune configs/drag_tiny.py --phase 1
python -m scripts.drag_finetune configs/drag_tiny.py --phase 2
"""

graph = "data/kg"
questions = "data/rag_examples/queries/multihop_train.jsonl"
val_questions = "data/rag_examples/queries/multihop_val.jsonl"
source = "rag"
pool = 16
k_facts = 8
max_seq_len = 512
total_batch_size = 8192
device_batch_size = 16
num_steps = 400
init_lr_frac = 1.0
matrix_lr = 0.01
eval_every = 100
log_every = 10
