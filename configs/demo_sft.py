"""Chat fine-tuning of runs/demo.sh: questions about one passage."""

tasks = []
max_seq_len = 512
device_batch_size = 16
total_batch_size = 8192
num_steps = 120
warmdown_frac = 0.0
eval_every = 60
log_every = 20
