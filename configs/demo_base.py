"""Pretraining of runs/demo.sh: a million parameters on two CPU cores, in two minutes, nearly all of it warm-up."""

model_tag = "demo"
block_pattern = "M,T,M,T"
d_model = 128
head_dim = 32
max_seq_len = 512
device_batch_size = 8
total_batch_size = 4096
copy_warmup_steps = 160
far_copy_warmup_steps = 150
rope_theta = 1_000_000  # matching names over hundreds of tokens with heads of 32
num_steps = 20
warmdown_frac = 0.0  # training goes on in the next stage
eval_every = 0
log_every = 20
