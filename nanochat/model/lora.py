"""LoRA on a HybridLM, by peft: W x + alpha/rank B A x, of which only A and B learn (Hu et al. 2021, arXiv 2106.09685).

Each projection inside the blocks gets its A and B but for Mamba's out_proj: fused kernels take that weight without
calling the module, so what is added to the module would not count. Embedding, output layer and norms stay as they are.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from nanochat.common import UserError, quiet
from nanochat.model.linear import Linear
from nanochat.model.lm import HybridLM

FILE = "lora.safetensors"
_NAME = "default"


def add_lora(model: HybridLM, rank: int, alpha: float) -> int:
    """Put adapters in place and freeze all else; the model's outputs are the same as before, since B begins at zero.
    Returns how many projections have one."""
    try:
        with quiet():
            from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise UserError(
            'LoRA needs peft: pip install "nanochat[lora]"; without --lora_rank all weights learn'
        ) from None
    targets = [
        name
        for name, module in model.named_modules()
        if isinstance(module, Linear) and name.startswith("blocks.") and not name.endswith("out_proj")
    ]
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets), model, _NAME)
    return len(targets)


def has_lora(model: HybridLM) -> bool:
    return any(".lora_A." in name for name, _ in model.named_parameters())


def adapter(model: HybridLM) -> dict[str, Tensor]:
    return {name: t for name, t in model.state_dict().items() if ".lora_" in name}


@torch.no_grad()
def merged(model: HybridLM) -> dict[str, Tensor]:
    """The state dict of a model without adapters that computes the same: theirs are added to the weights."""
    if not has_lora(model):
        return model.state_dict()
    tensors = {name.replace(".base_layer.", "."): t for name, t in model.state_dict().items() if ".lora_" not in name}
    for name, module in model.named_modules():
        if hasattr(module, "get_delta_weight"):
            tensors[f"{name}.weight"] = module.base_layer.weight + module.get_delta_weight(_NAME)
    return tensors


def save_adapter(model: HybridLM, directory: Path) -> None:
    save_file({name: t.contiguous() for name, t in adapter(model).items()}, directory / FILE)


def load_adapter(model: HybridLM, directory: Path, whole: dict[str, Tensor]) -> None:
    """Take a checkpoint's adapter into a model that has one. whole: the checkpoint's merged weights; UserError if the
    model under the adapter is not the one that was trained with it."""
    tensors = load_file(directory / FILE)
    expected = {name: t.shape for name, t in adapter(model).items()}
    if {name: t.shape for name, t in tensors.items()} != expected:
        raise UserError(f"{directory} has a LoRA of another rank: give its own --lora_rank, or another --model_tag")
    model.load_state_dict(tensors, strict=False)
    for name, t in merged(model).items():
        if not torch.allclose(t, whole[name].to(t.device), rtol=1e-4, atol=1e-5):
            raise UserError(
                f"{directory} was adapted from another checkpoint than the one it would go on from: name that one with "
                "--source and --step, or use another --model_tag"
            )
