"""Chat fine-tuning of runs/squad.sh on Dolly; --max_minutes bounds it."""

tasks = ["Dolly"]
max_seq_len = 512
device_batch_size = 8
total_batch_size = 8192
num_steps = 150
warmdown_frac = 0.0
eval_every = 0
log_every = 20
