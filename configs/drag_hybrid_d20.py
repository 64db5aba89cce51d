"""D-RAG with a d20 hybrid on GPUs. Sizes follow the paper's; this has not been run by us.

python -m scripts.drag_finetune configs/drag_hybrid_d20.py --phase 1
torchrun --standalone --nproc_per_node=8 -m scripts.drag_finetune configs/drag_hybrid_d20.py --phase 2
"""

graph = "data/kg"
questions = "data/webqsp/train.jsonl"
val_questions = "data/webqsp/val.jsonl"
source = "rag"
pool = 100
k_facts = 100
max_seq_len = 2048
device_batch_size = 4
total_batch_size = 131_072
num_epochs = 18.0
init_lr_frac = 0.1
gradient_checkpointing = True
