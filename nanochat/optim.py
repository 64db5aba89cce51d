"""Which optimizer moves which parameter: Muon for the matrices inside blocks, AdamW for everything else.

Muon (Jordan et al. 2024; torch.optim.Muon) orthogonalises the momentum of a matrix, which needs a 2-D weight whose rows
and columns are features; embeddings, the output layer, norms, convolutions and the scan's A, D, dt_bias are not that.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby

import torch
from torch import Tensor, nn

from nanochat.parallel import gathered, local, part_of, whole_tensors

STACK = 2**21
"""Numbers in one stack of matrices that are orthogonalised together: 4 MB in bfloat16, what a core's cache holds."""


def shortest_first(matrix: Tensor) -> Tensor:
    return matrix.T if matrix.shape[0] > matrix.shape[1] else matrix


def stacks(matrices: Sequence[Tensor]) -> Iterator[list[int]]:
    """Indices of matrices that are equal in shape, or each other's transpose, at most STACK numbers together."""
    shapes = [tuple(sorted(matrix.shape)) for matrix in matrices]
    for (rows, columns), same in groupby(sorted(range(len(matrices)), key=shapes.__getitem__), shapes.__getitem__):
        indices, size = list(same), max(1, STACK // (rows * columns))
        yield from (indices[at : at + size] for at in range(0, len(indices), size))


def orthogonalise(stack: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """Matrices [n, rows, columns] with rows <= columns and their singular values near 1, in bfloat16, by Newton-Schulz
    (Jordan et al. 2024: X <- aX + (bG + cG^2)X with G = XX^T)."""
    a, b, c = coefficients
    x = stack.bfloat16()
    x = x / x.flatten(1).norm(dim=1).clamp(min=eps)[:, None, None]
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


class Muon(torch.optim.Muon):
    """torch.optim.Muon, with the matrices of a shape orthogonalised together: a third faster at width 256 on a CPU,
    and on a GPU a few launches in place of hundreds. Same state, same arguments; the learning rate of a matrix is
    scaled by sqrt(max(1, rows/columns)) (`adjust_lr_fn` is not used). Of matrices that are split over ranks (--shard)
    each rank keeps its part of the momentum, and a stack is gathered to be orthogonalised, which needs all of it."""

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            grads = [local(p.grad) for p in params]
            for p in params:
                if not self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            momenta = [local(self.state[p]["momentum_buffer"]) for p in params]
            torch._foreach_lerp_(momenta, grads, 1 - group["momentum"])
            updates = torch._foreach_lerp(grads, momenta, group["momentum"]) if group["nesterov"] else momenta
            if group["weight_decay"]:
                torch._foreach_mul_([local(p) for p in params], 1 - group["lr"] * group["weight_decay"])
            for indices in stacks(params):
                stack = torch.stack([shortest_first(gathered(updates[i], params[i])) for i in indices])
                stack = orthogonalise(stack, group["ns_coefficients"], group["ns_steps"], group["eps"])
                for i, direction in zip(indices, stack, strict=True):
                    rows, columns = params[i].shape
                    step = direction.T if rows > columns else direction
                    step = local(part_of(step, params[i]))
                    local(params[i]).add_(step, alpha=-group["lr"] * max(1, rows / columns) ** 0.5)


class NamedOptimizers:
    """Several behind one step(), with their state by parameters' names. Learning rates are scaled together by
    `set_lr_scale`."""

    def __init__(self, parts: list[torch.optim.Optimizer], names: dict[nn.Parameter, str]):
        self.parts, self.names = parts, names
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
        """Whole tensors keyed by "parameter name/state name": independent of how many ranks wrote or read it. Where
        weights are split over ranks, all of them have to ask."""
        return whole_tensors(
            {
                f"{self.names[p]}/{key}": value
                for part in self.parts
                for p, state in part.state.items()
                for key, value in state.items()
            }
        )

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
                        value = value.to(p.device)
                        part.state[p][field] = part_of(value, p) if value.shape == p.shape else value


class Optimizers(NamedOptimizers):
    """Of a HybridLM: Muon and AdamW."""

    def __init__(
        self,
        model: nn.Module,
        matrix_lr: float = 0.02,
        embed_lr: float = 0.02,
        head_lr: float = 0.004,
        scalar_lr: float = 0.005,
        weight_decay: float = 0.0,
        beside: nn.Module | None = None,
        beside_lr: float = 0.0,
    ):
        """beside: what is trained along with the model, by AdamW."""
        kinds = ("matrix", "embed", "head", "scalar", "value", "beside")
        groups: dict[str, list[tuple[str, nn.Parameter]]] = {kind: [] for kind in kinds}
        for name, p in model.named_parameters():
            if not p.requires_grad:
                continue
            if name.startswith("embed."):
                kind = "embed"
            elif name.startswith("lm_head."):
                kind = "head"
            elif name.startswith("value_head."):
                kind = "value"
            else:
                kind = "matrix" if p.ndim == 2 and name.endswith("proj.weight") else "scalar"
            groups[kind].append((name, p))
        if beside is not None:
            groups["beside"] = [(f"beside.{name}", p) for name, p in beside.named_parameters() if p.requires_grad]
        width_scale = (model.config.d_model / 768) ** -0.5  # AdamW's rates were tuned at width 768 (nanochat)
        rates = {"embed": embed_lr * width_scale, "head": head_lr * width_scale, "scalar": scalar_lr}
        rates["value"] = matrix_lr  # a critic begins at nothing while all else is trained
        rates["beside"] = beside_lr
        adam = [{"params": [p for _, p in groups[k]], "lr": rates[k]} for k in rates if groups[k]]
        parts: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(adam, betas=(0.8, 0.95), eps=1e-10, weight_decay=0.0, fused=True)
        ]
        if groups["matrix"]:
            matrices = [p for _, p in groups["matrix"]]
            parts.append(Muon(matrices, lr=matrix_lr, momentum=0.95, nesterov=True, weight_decay=weight_decay))
        super().__init__(parts, {p: name for members in groups.values() for name, p in members})


def adamw(parts: Mapping[str, tuple[nn.Module, float]], rates: Mapping[str, float]) -> NamedOptimizers:
    """AdamW for modules, by name, each with its learning rate; rates: of single parameters, by name in their module."""
    names: dict[nn.Parameter, str] = {}
    of_rate: dict[float, list[nn.Parameter]] = {}
    for part, (module, rate) in parts.items():
        for name, p in module.named_parameters():
            if p.requires_grad:
                names[p] = f"{part}.{name}"
                of_rate.setdefault(rates.get(name, rate), []).append(p)
    groups = [{"params": ps, "lr": rate} for rate, ps in of_rate.items()]
    return NamedOptimizers([torch.optim.AdamW(groups, weight_decay=0.0)], names)
