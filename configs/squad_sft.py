"""Chat fine-tuning of runs/squad.sh on Dolly; --max_minutes bounds it."""

tasks = ["Dolly"]
max_seq_len = 512
device_batch_size = 8
total_batch_size = 4096
num_steps = 150
matrix_lr = 0.01
warmdown_frac = 0.0
eval_every = 0
log_every = 20
