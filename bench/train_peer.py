"""A worker of bench/train.py: karpathy/nanochat's own model and optimizer, from a checkout of it.

Runs in a process of its own with that checkout first on the path, since both packages are called nanochat. Reads
numbers of steps from standard input, trains that many, answers with the seconds they took.

    python bench/train_peer.py DEPTH WIDTH VOCABULARY ROWS LENGTH COMPILE THREADS
"""

from __future__ import annotations

import sys
import time

import torch


def main() -> None:
    depth, width, vocabulary, rows, length, compiled, threads = map(int, sys.argv[1:8])
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    from nanochat.gpt import GPT, GPTConfig

    heads = width // 64
    model = GPT(GPTConfig(length, vocabulary, depth, heads, heads, width, window_pattern="L"))
    model.init_weights()
    optimizer = model.setup_optimizer()
    parameters = sum(p.numel() for p in model.parameters())
    step_model = torch.compile(model, dynamic=False) if compiled else model
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, vocabulary, (rows, length + 1), generator=generator)

    def step() -> None:
        step_model(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()).backward()
        optimizer.step()
        model.zero_grad(set_to_none=True)

    step()
    step()
    print(f"ready {parameters}", flush=True)
    for line in sys.stdin:
        began = time.perf_counter()
        for _ in range(int(line)):
            step()
        print(time.perf_counter() - began, flush=True)


if __name__ == "__main__":
    main()
