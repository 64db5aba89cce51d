"""Pretraining of runs/squad.sh on Wikipedia text; --max_minutes bounds it."""

model_tag = "squad"
block_pattern = "M,T,M,T"
d_model = 256
head_dim = 64
max_seq_len = 512
device_batch_size = 8
total_batch_size = 8192
copy_warmup_steps = 200
num_steps = 600
warmdown_frac = 0.0  # training goes on in the next stage
eval_every = 200
log_every = 20
