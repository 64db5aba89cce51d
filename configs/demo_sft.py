"""Chat fine-tuning of runs/demo.sh: questions about one passage."""

tasks = []
max_seq_len = 512
device_batch_size = 16
total_batch_size = 8192
num_steps = 150
warmdown_frac = 0.0
eval_every = 150
log_every = 20
