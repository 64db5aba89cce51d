"""Training in FP8: the large matrix products of forward and backward in 8-bit floats, weights kept in fp32.

torchao's float8 training with one scale for each tensor (Micikevicius et al. 2022, arXiv 2209.05433), on the linear
layers inside blocks whose both sides are at least 128: for smaller ones the casts cost more than the products gain. The
hardware wants sides in multiples of 16, which Mamba-2's in_proj seldom has (its last columns are the heads' dt), so it
gets rows of zeros for the product. Evaluation runs in the model's own type, and weights keep their names.

    pip install torchao
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanochat.common import UserError

SMALLEST = 128


def takes_fp8(name: str, module: nn.Module) -> bool:
    """Whether a module of HybridLM, by its name, is one of those that run in FP8."""
    if not isinstance(module, nn.Linear) or not name.startswith("blocks."):
        return False
    return module.in_features % 16 == 0 and min(module.in_features, module.out_features) >= SMALLEST


def fp8_config(device: torch.device, emulate: bool) -> Any:
    """torchao's settings: one scale for each tensor. UserError where the hardware or torchao is not there."""
    if not emulate and (device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 9)):
        raise UserError(
            f"--fp8 needs an Ada or Hopper GPU or newer, this is {device}; --fp8_emulate shows its roundings"
        )
    try:
        from torchao.float8 import Float8LinearConfig
    except ImportError:
        raise UserError("--fp8 needs torchao: pip install torchao") from None
    return dataclasses.replace(Float8LinearConfig.from_recipe_name("tensorwise"), emulate=emulate)


def use_fp8(model: nn.Module, device: torch.device, emulate: bool = False) -> int:
    """Exchange the model's large linear layers, in place; returns how many. emulate: the same roundings anywhere."""
    config = fp8_config(device, emulate)
    from torchao.float8.float8_linear import Float8Linear, matmul_with_hp_or_float8_args

    class FP8Linear(Float8Linear):
        def forward(self, x: Tensor) -> Tensor:
            if not self.training:
                return F.linear(x, self.weight)
            if torch.is_autocast_enabled(x.device.type):
                x = x.to(torch.get_autocast_dtype(x.device.type))
            missing = -self.out_features % 16
            weight = F.pad(self.weight, (0, 0, 0, missing)) if missing else self.weight
            y = matmul_with_hp_or_float8_args.apply(x, weight.t(), self.linear_mm_config, self.config)
            return y[..., : self.out_features] if missing else y

    chosen = [name for name, module in model.named_modules() if takes_fp8(name, module)]
    for name in chosen:
        parent, _, child = name.rpartition(".")
        owner = model.get_submodule(parent)
        setattr(owner, child, FP8Linear.from_float(getattr(owner, child), config))
    return len(chosen)
