"""Chat fine-tuning of runs/demo.sh: questions about one passage."""

tasks = []
max_seq_len = 512
device_batch_size = 8
total_batch_size = 4096
num_steps = 200
warmdown_frac = 0.0
eval_every = 200
log_every = 20
