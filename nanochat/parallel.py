"""Training on many devices: each step's rows shared out, gradients added up, weights copied (DDP) or split (FSDP2).

A step's batch is fixed by its number alone, and every loss is a sum over tokens divided by the whole step's count; so
sums over the ranks are exact however unevenly learned tokens fall on them (an average of averages is not), and any
number of ranks trains the same model on the same examples in the same order.

With --shard each rank holds its part of every weight, gradient and optimizer state (Rajbhandari et al. 2019, ZeRO-3,
arXiv 1910.02054; torch's fully_shard), gathers a block's weights when the block is computed and drops them after.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nanochat.common import Compute, UserError
from nanochat.model.lm import HybridLM


def micro_batches(rows: int, size: int, compute: Compute) -> list[range]:
    """This rank's share of a step's rows, in pieces of the device's batch size."""
    first, last = rows * compute.rank // compute.world_size, rows * (compute.rank + 1) // compute.world_size
    return [range(s, min(s + size, last)) for s in range(first, last, size)]


def sum_over_ranks(tensor: Tensor, compute: Compute) -> None:
    if compute.world_size > 1:
        dist.all_reduce(tensor)


def most_of_ranks(value: float, compute: Compute) -> float:
    """The largest of the ranks' values, on every rank."""
    if compute.world_size == 1:
        return value
    tensor = torch.tensor([value], device=compute.device)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return tensor.item()


def agree_on_step(step: int, run_dir: Path, compute: Compute) -> None:
    """UserError where ranks would go on from different checkpoints: gradients of different models would be added up."""
    if most_of_ranks(step, compute) != -most_of_ranks(-step, compute):
        raise UserError(
            f"the machines see different checkpoints in {run_dir} (this one: step {step}); NANOCHAT_BASE_DIR has to be "
            "one folder for all of them"
        )


def sum_gradients(model: nn.Module, compute: Compute) -> None:
    """Add up the ranks' gradients, where sharding has not done so during the backward pass."""
    if compute.world_size == 1 or is_sharded(model):
        return
    for p in model.parameters():
        if p.requires_grad and p.grad is None:  # a rank whose rows never touched this weight
            p.grad = torch.zeros_like(p)
    pending = [dist.all_reduce(p.grad, async_op=True) for p in model.parameters() if p.requires_grad]
    for work in pending:
        work.wait()


@torch.no_grad()
def clip_gradients(parameters: Iterable[nn.Parameter], largest: float, compute: Compute) -> float:
    """Scale gradients whose norm together is over `largest` (0: none is) down to it; returns the norm. It is added up
    in float64: sharding adds in another order, and Muon, which rounds to bfloat16, would make a difference in the last
    bit one of 1e-4 in the loss within 50 steps."""
    grads = [p.grad for p in parameters if p.grad is not None]
    parts = [local(grad) for grad in grads]
    kind = torch.float32 if compute.device.type == "mps" else torch.float64
    squares = torch.stack(torch._foreach_norm(parts, 2, dtype=kind)).square().sum()
    if any(map(is_part, grads)):
        dist.all_reduce(squares)
    norm = squares.sqrt().float()
    if largest:
        torch._foreach_mul_(parts, (largest / (norm + 1e-6)).clamp(max=1.0))
    return norm.item()


# --- weights split over the ranks


def shard(model: HybridLM, compute: Compute) -> None:
    """Split the model's parameters over the ranks, in place. Each block is gathered by itself; embedding, last norm and
    output layer together, since the loss reads them all."""
    if not dist.is_initialized():
        raise UserError("--shard splits a model over the ranks of torchrun: torchrun --nproc_per_node=8 -m ...")
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(compute.device.type, (compute.world_size,))
    for module in [*model.blocks, model]:
        fully_shard(module, mesh=mesh)
        module.set_gradient_divide_factor(1.0)  # sums, as above
        module.set_force_sum_reduction_for_comms(True)


def is_sharded(model: nn.Module) -> bool:
    return any(map(is_part, model.parameters()))


def is_part(tensor: Tensor) -> bool:
    """Whether this rank holds its part of it alone: a DTensor, whose module takes half a second to import."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """A tensor of which each rank may hold a part, in full; all ranks have to ask for it."""
    return tensor.full_tensor() if is_part(tensor) else tensor


def part_of(tensor: Tensor, like: Tensor) -> Tensor:
    """A tensor that every rank has in full, split as `like` is."""
    if not is_part(like):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)


def local(tensor: Tensor) -> Tensor:
    """The numbers that this rank has of it."""
    return tensor.to_local() if is_part(tensor) else tensor


def gathered(part: Tensor, like: Tensor) -> Tensor:
    """In full, what every rank has a part of, split as `like` is."""
    if not is_part(like):
        return part
    from torch.distributed.tensor import DTensor

    split = DTensor.from_local(part, like.device_mesh, like.placements, shape=like.shape, stride=like.stride())
    return split.full_tensor()


def whole_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: whole(tensor) for name, tensor in tensors.items()}


@torch.no_grad()
def load_whole(model: HybridLM, tensors: Mapping[str, Tensor]) -> None:
    """Take weights that every rank has in full."""
    parts = model.state_dict()
    model.load_state_dict({name: part_of(tensor, parts[name]) for name, tensor in tensors.items()})


def unsharded(model: HybridLM) -> HybridLM:
    """The same model with all weights on every rank."""
    tensors = whole_tensors(model.state_dict())
    with torch.device("meta"):
        copy = HybridLM(model.config)
    copy.load_state_dict(tensors, assign=True)
    if model.config.tie_embeddings:
        copy.lm_head.weight = copy.embed.weight
    return copy.requires_grad_(True).train(model.training)
