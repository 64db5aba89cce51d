"""D-RAG on MetaQA (Zhang et al. 2018), questions of one, two and three facts together, sized for a CPU.

python -m scripts.kg_prepare build --triples metaqa/kb.txt --graph data/kg
python -m scripts.kg_prepare text --graph data/kg --output data/facts.jsonl
python -m scripts.tok_train --input data/facts.jsonl --vocab_size 1024
python -m scripts.base_train configs/demo_base.py --input data/facts.jsonl
python -m scripts.drag_finetune configs/drag_metaqa.py --phase 1 --num_epochs 2
python -m scripts.drag_finetune configs/drag_metaqa.py --phase 2
"""

graph = "data/kg"
questions = ["metaqa/1hop_qa_dev.txt", "metaqa/2hop_qa_dev.txt", "metaqa/3hop_qa_dev.txt"]
source = "base"
pool = 24
k_facts = 20
min_probability = 0.1
max_answers = 16
fact_price = 0.05
max_seq_len = 512
total_batch_size = 16_384
device_batch_size = 16
num_steps = 600
matrix_lr = 0.01
init_lr_frac = 1.0
eval_every = 150
log_every = 10
