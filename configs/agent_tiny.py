"""When to search, sized for a laptop: from a model that answers from documents (configs/rag_tiny.py).

python -m scripts.agent_train configs/agent_tiny.py --knowledge_base data/rag_examples/knowledge_base
"""

knowledge_base = "data/rag_examples/knowledge_base"
queries = "data/rag_examples/queries/train.jsonl"
source = "rag"
retriever_type = "bm25"
max_hops = 1
top_k_per_hop = 1
max_doc_length = 200
max_seq_len = 1024
device_batch_size = 4
total_batch_size = 4096
num_steps = 3000
init_lr_frac = 1.0
matrix_lr = 0.01  # at .02 a model this small forgets how to look things up
warmdown_frac = 0.4
eval_every = 250
eval_questions = 200
max_tokens = 64
log_every = 20

# by reward: right answers teach, wrong ones differ in too many ways (docs/lab_notes.md)
rl_steps = 60
rl_lr_frac = 0.3
negative_weight = 0.0
reward_metric = "em"
kl = 0.0
group_size = 4
queries_per_step = 32
rollout_batch_size = 32
save_every = 60
