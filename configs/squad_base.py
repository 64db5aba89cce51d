"""Pretraining of runs/squad.sh on Wikipedia text; --max_minutes bounds it."""

model_tag = "squad"
block_pattern = "M,T,M,T"
d_model = 256
head_dim = 64
max_seq_len = 512
device_batch_size = 8
total_batch_size = 4096
copy_warmup_steps = 160
far_copy_warmup_steps = 120
rope_theta = 1_000_000
num_steps = 1200
warmdown_frac = 0.0  # training goes on in the next stage
eval_every = 200
log_every = 20
