"""Chat fine-tuning of runs/demo.sh: questions about one passage."""

tasks = []
max_seq_len = 512
device_batch_size = 8
total_batch_size = 4096
num_steps = 50
matrix_lr = 0.01  # at .02 what the exercises taught is forgotten
warmdown_frac = 0.0
eval_every = 50
log_every = 10
