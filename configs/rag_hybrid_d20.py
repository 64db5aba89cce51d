"""RAG fine-tuning of a hybrid d20: 8 attention and 12 Mamba-2 blocks, attention early.

torchrun --standalone --nproc_per_node=8 -m scripts.rag_finetune configs/rag_hybrid_d20.py --knowledge_base data/my_kb
"""

source = "mid"
model_tag = "d20"
block_pattern = "T,T,T,T,T,T,T,T,M,M,M,M,M,M,M,M,M,M,M,M"
knowledge_base = "data/rag_examples/knowledge_base"
retriever_type = "bm25"  # every base has it; "hybrid" finds more in a base that has embeddings
top_k = 5
max_doc_length = 500
max_seq_len = 4096
device_batch_size = 4
total_batch_size = 524288
base_tasks = ["SmolTalk"]
num_epochs = 1
init_lr_frac = 0.02
