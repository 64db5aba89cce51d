"""Pretraining of runs/demo.sh: a million parameters on two CPU cores, nearly all of it exercises in lookup."""

model_tag = "demo"
block_pattern = "M,T,M,T"
d_model = 128
head_dim = 64
rope_theta = 1_000_000  # matching names over hundreds of tokens
d_conv = 8  # as wide as a name; causal-conv1d's kernels take up to 4
max_seq_len = 512
device_batch_size = 8
total_batch_size = 4096
copy_warmup_steps = 130
far_copy_warmup_steps = 260
recall_warmup_steps = 330
record_warmup_steps = 800
num_steps = 30
text_lr_frac = 0.25
warmdown_frac = 0.0  # training goes on in the next stage
eval_every = 0
log_every = 50
