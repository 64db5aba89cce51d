"""Pretraining of runs/squad.sh: exercises in lookup, then Wikipedia text; --max_minutes bounds it."""

model_tag = "squad"
block_pattern = "M,T,M,T"
d_model = 256
head_dim = 64
d_conv = 8
max_seq_len = 512
device_batch_size = 8
total_batch_size = 4096
copy_warmup_steps = 150
far_copy_warmup_steps = 240
recall_warmup_steps = 500
rope_theta = 1_000_000
num_steps = 450
text_lr_frac = 0.5  # at the full rate the text makes it forget how to look things up
warmdown_frac = 0.0  # training goes on in the next stage
eval_every = 300
log_every = 20
