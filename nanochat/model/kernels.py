"""Which code runs the state-space scan: PyTorch's own operations, or a GPU kernel of one of two packages.

    mamba_ssm   the authors' Triton kernels; the package compiles CUDA when it is installed (with causal-conv1d)
    fla         flash-linear-attention's, plain Triton: pip install fla-core
    torch       nanochat/model/ssd.py; the only one on a CPU

"auto" takes the first of them that is there on a GPU. The packages' kernels take x, B and C in the type of the model
and keep the decay in fp32. Shapes as in ssd.py.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable

import torch
from torch import Tensor

from nanochat.common import UserError, print0

PACKAGES = {
    "mamba_ssm": ("mamba_ssm.ops.triton.ssd_combined", "mamba_chunk_scan_combined", 'pip install "nanochat[mamba]"'),
    "fla": ("fla.ops.simple_gla", "chunk_simple_gla", "pip install fla-core"),
}
KERNELS = ("auto", *PACKAGES, "torch")
_asked = "auto"


def set_ssm_kernel(name: str) -> None:
    """Choose for all models of this process. UserError if the package is not there."""
    global _asked
    if name not in KERNELS:
        raise UserError(f"ssm_kernel {name!r}: there are {', '.join(KERNELS)}")
    if name in PACKAGES and _function(name) is None:
        raise UserError(f"ssm_kernel {name} is not installed: {PACKAGES[name][2]}, or use --ssm_kernel torch")
    _asked = name
    _announced.cache_clear()


@functools.cache
def _function(name: str) -> Callable | None:
    module, function, _ = PACKAGES[name]
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, RuntimeError, AttributeError):  # no package, or no GPU for its Triton
        return None


def ssm_kernel(device: torch.device) -> str:
    """The kernel that runs on a device."""
    if device.type != "cuda" or _asked == "torch":
        return "torch"
    name = _asked if _asked != "auto" else next((n for n in PACKAGES if _function(n) is not None), "torch")
    _announced(name)
    return name


@functools.cache
def _announced(name: str) -> None:
    """Say it once."""
    hint = "; pip install fla-core is faster" if name == "torch" else ""
    print0(f"state-space scan: {name}{hint}")


def kernel_scan(
    name: str,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    Bm: Tensor,
    Cm: Tensor,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`ssd_scan` by a package's kernel."""
    if name == "fla":
        return _fla_scan(x, dt, A, Bm, Cm, initial_state, seq_idx)
    documents = seq_idx.int() if seq_idx is not None else None
    states = {"initial_states": initial_state, "return_final_states": True}
    return _function(name)(x, dt, A, Bm, Cm, chunk_size=256, seq_idx=documents, **states)


def _fla_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    Bm: Tensor,
    Cm: Tensor,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Gated linear attention with one decay a head is the same recurrence: queries C, keys B, values x dt, log decays
    dt A (Yang et al. 2023, arXiv 2312.06635). Its state is (N, P); packed documents are one row with borders."""
    B, L, H, P = x.shape
    N, per_group = Bm.shape[-1], H // Bm.shape[2]
    q, k = (t.repeat_interleave(per_group, dim=2).to(x.dtype) for t in (Cm, Bm))
    v, g = (x * dt.unsqueeze(-1)).to(x.dtype), dt.float() * A.float()
    state = initial_state.transpose(-1, -2).contiguous().float() if initial_state is not None else None
    scan = functools.partial(_function("fla"), scale=1.0, output_final_state=True)
    if seq_idx is None:
        y, final = scan(q, k, v, g, initial_state=state)
        return y, final.transpose(-1, -2)
    starting = torch.ones(B, L, dtype=torch.bool, device=x.device)
    starting[:, 1:] = seq_idx[:, 1:] != seq_idx[:, :-1]
    starts = starting.flatten().nonzero().flatten()
    borders = torch.cat([starts, starts.new_tensor([B * L])])
    first = starting.flatten().cumsum(0).view(B, L)[:, 0] - 1  # each row's first document
    if state is not None:
        state = state.new_zeros(len(starts), H, N, P).index_copy(0, first, state)
    y, final = scan(*(t.reshape(1, B * L, *t.shape[2:]) for t in (q, k, v, g)), initial_state=state, cu_seqlens=borders)
    last = torch.cat([first[1:] - 1, first.new_tensor([len(starts) - 1])])
    return y.view(B, L, H, P), final[last].transpose(-1, -2)
