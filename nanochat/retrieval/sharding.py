"""Encoding documents with many processes: torchrun --nproc_per_node=8 -m nanochat.retrieval index ... (any machines).

Rank 0 runs the command as ever and hands each block of texts out in equal parts; the others load the same model, each
on its own GPU or share of the CPU's cores, and do nothing but encode until they are told to stop.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import numpy as np

from nanochat.common import UserError

_WAIT = timedelta(days=7)  # rank 0 may read documents for long before it has something to encode
_ranks = 1  # that encode together, inside of group(); a training script's ranks each encode for themselves


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


@contextlib.contextmanager
def group() -> Iterator[None]:
    """Rank 0 does what is inside; the others encode for it meanwhile."""
    global _ranks
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield
        return
    import torch
    import torch.distributed as dist

    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // local))  # torchrun leaves one to each
    dist.init_process_group("gloo", timeout=_WAIT)
    _ranks = size
    try:
        yield
    finally:
        if rank() == 0:
            _hand_out([None] * size)
            dist.barrier()
        _ranks = 1
        dist.destroy_process_group()


def local_device(device: str | None) -> str | None:
    """The device of this rank where none, or just "cuda", is asked for."""
    if _ranks > 1 and device in (None, "cuda"):
        import torch

        if torch.cuda.is_available():
            return f"cuda:{int(os.environ.get('LOCAL_RANK', '0')) % torch.cuda.device_count()}"
    return device


def sharded(encode: Callable[[list[str]], np.ndarray], settings: dict[str, Any]) -> Callable[[list[str]], np.ndarray]:
    """encode with the help of the other ranks, who make the same encoder from its settings."""
    if _ranks == 1:
        return encode

    def encode_together(texts: list[str]) -> np.ndarray:
        size = _ranks
        parts = [texts[len(texts) * r // size : len(texts) * (r + 1) // size] for r in range(size)]
        _hand_out([(settings, part) for part in parts])
        try:
            own: Any = encode(parts[0]) if parts[0] else None
        except Exception as error:  # raised when the others have answered: they must not wait for ever
            own = error
        found = _collect(own)
        for answer in found:
            if isinstance(answer, Exception):
                raise answer
        return np.concatenate([vectors for vectors in found if vectors is not None])

    return encode_together


def help_encoding(make: Callable[[dict[str, Any]], Callable[[list[str]], np.ndarray]]) -> None:
    """What the other ranks do; make: an encoder from its settings."""
    encoders: dict[str, Any] = {}
    while (task := _hand_out(None)) is not None:
        settings, texts = task
        answer: Any = None
        try:
            if texts:
                key = repr(sorted(settings.items()))
                encoders[key] = encoders.get(key) or make(settings)
                answer = encoders[key](texts)
        except Exception as error:  # rank 0 tells it
            answer = UserError(f"rank {rank()}: {error}")
        _collect(answer)
    import torch.distributed as dist

    dist.barrier()  # gloo's threads are done with what was sent: one that is not when Python ends aborts the process


def _hand_out(tasks: list[Any] | None) -> Any:
    import torch.distributed as dist

    own: list[Any] = [None]
    dist.scatter_object_list(own, tasks, src=0)
    return own[0]


def _collect(answer: Any) -> list[Any]:
    import torch.distributed as dist

    found: list[Any] = [None] * _ranks if rank() == 0 else []
    dist.gather_object(answer, found if rank() == 0 else None, dst=0)
    return found
