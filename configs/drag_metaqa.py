"""D-RAG on MetaQA (Zhang et al. 2018), questions of one, two and three facts together, sized for a CPU.

python -m scripts.kg_prepare build --triples metaqa/kb.txt --graph data/kg
python -m scripts.drag_finetune configs/drag_metaqa.py --phase 1 --num_epochs 2
python -m scripts.drag_finetune configs/drag_metaqa.py --phase 2
"""

graph = "data/kg"
questions = ["metaqa/1hop_qa_dev.txt", "metaqa/2hop_qa_dev.txt", "metaqa/3hop_qa_dev.txt"]
source = "base"
pool = 12
k_facts = 10
max_seq_len = 512
total_batch_size = 16_384
device_batch_size = 16
num_steps = 500
matrix_lr = 0.01
init_lr_frac = 1.0
eval_every = 125
log_every = 10
