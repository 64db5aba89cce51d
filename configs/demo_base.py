"""Pretraining of runs/demo.sh: a million parameters on two CPU cores, in a few minutes."""

model_tag = "demo"
block_pattern = "M,T,M,T"
d_model = 128
head_dim = 32
max_seq_len = 256
device_batch_size = 16
total_batch_size = 4096
copy_warmup_steps = 240
num_steps = 60
warmdown_frac = 0.0  # training goes on in the next stage
eval_every = 0
log_every = 20
