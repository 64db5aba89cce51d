"""Search while answering, for a hybrid d20 that answers from documents (configs/rag_hybrid_d20.py).

torchrun --standalone --nproc_per_node=8 -m scripts.refrag_finetune configs/refrag_hybrid_d20.py \
    --knowledge_base data/my_kb --queries data/my_multihop_questions.jsonl
"""

knowledge_base = "data/rag_examples/knowledge_base"
source = "rag"
model_tag = "d20"
max_hops = 3
top_k_per_hop = 3
max_doc_length = 500
max_seq_len = 4096
device_batch_size = 2
total_batch_size = 524288
num_epochs = 1
init_lr_frac = 0.02
use_rewards = True
algorithm = "grpo"
group_size = 5
queries_per_step = 128
rollout_batch_size = 8
rl_steps = 300
rl_lr_frac = 0.002
kl = 0.001
eval_every = 50
