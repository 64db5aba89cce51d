"""Which optimizer moves which parameter: Muon for the matrices inside blocks, AdamW for everything else.

Muon (Jordan et al. 2024; torch.optim.Muon) orthogonalises the momentum of a matrix, which needs a 2-D weight whose rows
and columns are features; embeddings, the output layer, norms, convolutions and the scan's A, D, dt_bias are not that.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Optimizers:
    """Muon and AdamW behind one step(). Learning rates are scaled together by `set_lr_scale`."""

    def __init__(
        self,
        model: nn.Module,
        matrix_lr: float = 0.02,
        embed_lr: float = 0.02,
        head_lr: float = 0.004,
        scalar_lr: float = 0.005,
        weight_decay: float = 0.0,
    ):
        groups: dict[str, list[tuple[str, nn.Parameter]]] = {"matrix": [], "embed": [], "head": [], "scalar": []}
        for name, p in model.named_parameters():
            if not p.requires_grad:
                continue
            if name.startswith("embed."):
                kind = "embed"
            elif name.startswith("lm_head."):
                kind = "head"
            else:
                kind = "matrix" if p.ndim == 2 and name.endswith("proj.weight") else "scalar"
            groups[kind].append((name, p))
        width_scale = (model.config.d_model / 768) ** -0.5  # AdamW's rates were tuned at width 768 (nanochat)
        rates = {"embed": embed_lr * width_scale, "head": head_lr * width_scale, "scalar": scalar_lr}
        adam = [{"params": [p for _, p in groups[k]], "lr": rates[k]} for k in rates if groups[k]]
        self.parts: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(adam, betas=(0.8, 0.95), eps=1e-10, weight_decay=0.0, fused=True)
        ]
        if groups["matrix"]:
            matrices = [p for _, p in groups["matrix"]]
            self.parts.append(
                torch.optim.Muon(matrices, lr=matrix_lr, momentum=0.95, nesterov=True, weight_decay=weight_decay)
            )
        self.names = {p: name for members in groups.values() for name, p in members}
        for part in self.parts:
            for group in part.param_groups:
                group["initial_lr"] = group["lr"]

    def set_lr_scale(self, scale: float) -> None:
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = group["initial_lr"] * scale

    def step(self) -> None:
        for part in self.parts:
            part.step()

    def zero_grad(self) -> None:
        for part in self.parts:
            part.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, Tensor]:
        """Whole tensors keyed by "parameter name/state name": independent of how many ranks wrote or read it."""
        return {
            f"{self.names[p]}/{key}": value
            for part in self.parts
            for p, state in part.state.items()
            for key, value in state.items()
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        by_name: dict[str, dict[str, Tensor]] = {}
        for key, value in state.items():
            name, _, field = key.rpartition("/")
            by_name.setdefault(name, {})[field] = value
        if missing := set(by_name) - set(self.names.values()):
            raise ValueError(f"optimizer state for unknown parameters: {sorted(missing)[:3]}")
        for part in self.parts:
            for group in part.param_groups:
                for p in group["params"]:
                    for field, value in by_name.get(self.names[p], {}).items():
                        # AdamW counts its steps in a CPU-or-device scalar; the moments live with their parameter
                        part.state[p][field] = value.to(p.device)
