"""Gates on the facts before a question, inside a causal language model of transformers.

A gate of 0 leaves every other token as if the fact were not there, a gate of 1 is the model as it is. Three places look
from one token to another:

- Attention weighs key j by gate_j e^{s_j} / sum_k gate_k e^{s_k}. The gradient is that of nanochat/model/gates.py,
  which says why at 0 and 1 it is no derivative. Tokens of one fact see each other fully.
- Mamba-2's state (Dao and Gu 2024, arXiv 2405.21060): each step dt is multiplied by the gate, so that nothing decays
  and nothing is added at 0. in_proj's output is changed such that softplus(dt' + bias) = gate softplus(dt + bias).
- Mamba-2's convolution looks W = kernel - 1 tokens back. W fillers follow each fact, which no one attends to and which
  leave the state alone. As inputs of the convolution they repeat what stood at the end of the fact, or before the fact,
  weighed by the gate: x_after = gate x_fact_end + (1 - gate) x_before.

Both of the latter are hooks on in_proj: what comes after may be a fused kernel. Gates travel as an argument of the
model, not in a global: layers are computed again in backward, in another thread on a GPU. What remains: a window of
sliding attention still counts the tokens of closed facts.

Shapes: B batch, L length with fillers, F facts, W fillers of a fact, P fillers of a row, H heads, G queries of a key.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanochat.common import UserError
from nanochat.model.gates import HIGHEST, told_to_gates

ATTENTION = "gated_facts"  # its name among transformers' attention functions
ARGUMENT = "fact_gates"  # of the model's forward, handed down to every mixer
MIXERS = ("NemotronHMamba2Mixer", "GraniteMoeHybridMambaLayer", "BambaMixer")  # in_proj gives [z, x B C, dt]
STEP_FLOOR = 1e-9  # of softplus(dt' + bias) where a gate is 0: its inverse must be finite


@dataclass
class Gates:
    """What the mixers of one forward pass need to know.

    token (B, L): the gate of each token for those outside of its fact; 1 for text, 0 for fillers.
    pair (B, L, L): the same for each query and key, 1 within a fact.
    member (B, L, F) bool: which tokens are whose.
    fillers: rows and places (n,) of all fillers, and their index (n,) among those of the row.
    refill (B, P, L): each filler's input of the convolution, as a mean of the real tokens' inputs.
    seen: whether any attention or Mamba layer was given these gates.
    """

    token: Tensor
    pair: Tensor
    member: Tensor
    fillers: tuple[Tensor, Tensor, Tensor] | None = None
    refill: Tensor | None = None
    seen: bool = False


@dataclass
class Layout:
    """Rows with room for fillers: place (B, L before) of each token, fact (B, L) with -1 for text, filler (B, L) bool,
    and of each run of a fact (n,) its row, its number in the row, its first and its last place."""

    place: Tensor
    fact: Tensor
    filler: Tensor
    runs: tuple[Tensor, Tensor, Tensor, Tensor]
    width: int

    def spread(self, x: Tensor, empty: float = 0) -> Tensor:
        """(B, L before, ...) -> (B, L, ...)."""
        place = self.place.view(*self.place.shape, *[1] * (x.dim() - 2)).expand_as(x)
        return x.new_full((*self.fact.shape, *x.shape[2:]), empty).scatter(1, place, x)


def lay_out(fact: Tensor, width: int) -> Layout:
    """fact (B, L before): each token's fact, -1 for text; a fact's tokens stand together. width: fillers of a fact."""
    B, length = fact.shape
    at = torch.arange(length, device=fact.device)
    first = (fact >= 0) & (fact != F.pad(fact[:, :-1], (1, 0), value=-1))
    last = (fact >= 0) & (fact != F.pad(fact[:, 1:], (0, 1), value=-1))
    before = last.cumsum(1) - last.long()  # runs that end before
    place = at + width * before
    rows, ends = last.nonzero(as_tuple=True)
    starts = first.nonzero(as_tuple=True)[1]
    runs = rows, before[rows, ends], place[rows, starts], place[rows, ends]
    long = length + width * int(last.sum(1).max())
    spread_fact = fact.new_full((B, long), -1).scatter(1, place, fact)
    filler = torch.zeros_like(spread_fact, dtype=torch.bool)
    after = runs[3][:, None] + 1 + torch.arange(width, device=fact.device)
    filler[rows[:, None], after] = True
    spread_fact[rows[:, None], after] = fact[rows, ends][:, None]
    return Layout(place, spread_fact, filler, runs, width)


def make_gates(layout: Layout, gate: Tensor) -> Gates:
    """gate (B, F) in [0, 1]."""
    gate = gate.float()
    fact = layout.fact
    token = torch.where(fact >= 0, gate.gather(1, fact.clamp(min=0)), 1.0).masked_fill(layout.filler, 0)
    within = (fact[:, :, None] == fact[:, None, :]) & (fact >= 0)[:, :, None]
    member = (fact[:, :, None] == torch.arange(gate.shape[1], device=fact.device)) & ~layout.filler[:, :, None]
    gates = Gates(token, torch.where(within, 1.0, token[:, None, :]), member)
    if layout.width and len(layout.runs[0]):
        gates.fillers, gates.refill = _refill(layout, gate)
    return gates


def _refill(layout: Layout, gate: Tensor) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    """A filler repeats the place W before it (in the fact, or a filler before a short one) or the same place before the
    fact, itself perhaps a filler: a triangular system, x_fillers = N x_tokens + T x_fillers."""
    rows, number, first, last = layout.runs
    (B, L), W = layout.fact.shape, layout.width
    each = torch.arange(W, device=gate.device)
    places = last[:, None] + 1 + each  # (runs, W)
    index = number[:, None] * W + each
    rows = rows[:, None].expand_as(places)
    opened = gate[rows, layout.fact[rows, places]]
    P = int(index.max()) + 1
    mean = gate.new_zeros(B, P, L + 1)  # the last column is before the row's start, where inputs are 0
    for source, share in ((places - W, opened), (first[:, None] - W + each, 1 - opened)):
        source = torch.where(source < 0, L, source)
        mean = mean.index_put((rows, index, source), share, accumulate=True)
    where = torch.full((B, P), L, device=gate.device).index_put((rows, index), places)
    fillers = mean.gather(2, where[:, None, :].expand(B, P, P))  # T, strictly lower triangular
    tokens = mean[:, :, :L].masked_fill(layout.filler[:, None, :], 0)
    missing = (where == L)[:, None, :]  # rows with fewer facts
    system = torch.eye(P, device=gate.device) - fillers.masked_fill(missing, 0)
    solved = torch.linalg.solve_triangular(system, tokens, upper=False, unitriangular=True)
    return (rows.flatten(), places.flatten(), index.flatten()), solved


def positions(layout: Layout, token: Tensor) -> Tensor:
    """token (B, L), the gates -> position ids (B, L) that count the tokens that are there. Those of a closed fact stand
    where they would if it were open."""
    there = token.detach() > 0
    at = torch.arange(token.shape[1], device=token.device)
    starts = layout.fact != F.pad(layout.fact[:, :-1], (1, 0), value=-2)
    inside = at - torch.where(starts, at, 0).cummax(1).values
    closed = ~there & ~layout.filler
    return there.cumsum(1) - there.long() + torch.where(closed, inside, 0)


def weighted_attention(
    q: Tensor, k: Tensor, v: Tensor, gates: Gates, visible: Tensor, scale: float, dropout: float = 0.0
) -> Tensor:
    """q (B, H, L, Dh), k and v (B, Hkv, S, Dh), visible (B or 1, L, S) -> (B, Hkv, G, L, Dh): v weighed by weight e^s /
    sum(weight e^s)."""
    B, _, L, Dh = q.shape
    v = v.unsqueeze(2)
    scores = q.view(B, k.shape[1], -1, L, Dh) @ k.unsqueeze(2).transpose(-1, -2)
    scores = scores.float() * scale
    weight, visible = gates.pair[:, None, None], visible[:, None, None]
    fixed = weight.detach()
    best = scores.detach().masked_fill(~visible | (fixed == 0), -torch.inf).amax(-1, keepdim=True)
    best = best.masked_fill(best == -torch.inf, 0)  # padding that sees nothing
    powers = (scores - best).clamp(max=HIGHEST).exp().masked_fill(~visible, 0) * fixed
    shares = powers / powers.sum(-1, keepdim=True).clamp(min=1e-30)
    out = F.dropout(shares, dropout).to(v.dtype) @ v
    return out + told_to_gates(scores, visible, weight, gates.token, gates.member, v, out)


def gated_attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
    """transformers' attention interface: query (B, H, L, Dh), key and value (B, Hkv, S, Dh), attention_mask bool
    (B, 1, L, S) or None for causal -> (B, L, H, Dh). Without gates it is PyTorch's fused attention."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    gates: Gates | None = kwargs.pop(ARGUMENT, None)
    if any(kwargs.get(name) is not None for name in ("softcap", "s_aux", "position_bias")):
        raise UserError(
            f"{type(module).__name__}: attention with soft caps, sinks or position biases has no gates here"
        )
    if gates is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
        )
    gates.seen = True
    if attention_mask is None:
        visible = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()[None]
    else:
        visible = attention_mask[:, 0]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out = weighted_attention(query, key, value, gates, visible, scale, dropout if module.training else 0.0)
    return out.flatten(1, 2).transpose(1, 2).contiguous(), None


def gated_step(dt: Tensor, bias: Tensor, gate: Tensor) -> Tensor:
    """dt (B, L, H), bias (H,), gate (B, L) -> dt' with softplus(dt' + bias) = gate softplus(dt + bias), in dt's type;
    at a gate of 1 dt itself, at 0 STEP_FLOOR for the softplus."""
    raw = dt.float() + bias.float()
    step = F.softplus(raw)
    gate = gate.unsqueeze(-1)
    step = (gate * step + (1 - gate) * STEP_FLOOR).clamp(min=1e-30)
    inverse = step + torch.log(-torch.expm1(-step))  # of softplus
    return (dt.float() + (inverse - raw)).to(dt.dtype)


def gate_mixer(mixer: nn.Module) -> None:
    """Hooks on a Mamba-2 mixer of transformers and on its in_proj."""
    # Its own lower limit on dt is no part of the trained model (the reference kernels get (0, inf)), and would keep a
    # closed fact from leaving the state alone.
    mixer.time_step_limit = (0.0, mixer.time_step_limit[1])
    given: list[Gates | None] = []

    def take(_module, args, kwargs):
        given[:] = [kwargs.pop(ARGUMENT, None)]  # the kernels would not know it
        return args, kwargs

    def change(_module, _args, projected):
        gates = given.pop() if given else None
        if gates is None:
            return projected
        gates.seen = True
        z, x, dt = projected.split([mixer.intermediate_size, mixer.conv_dim, mixer.num_heads], dim=-1)
        if gates.fillers is not None:
            rows, places, index = gates.fillers
            x = x.index_put((rows, places), (gates.refill.to(x.dtype) @ x)[rows, index])
        return torch.cat([z, x, gated_step(dt, mixer.dt_bias, gates.token)], dim=-1)

    mixer.register_forward_pre_hook(take, with_kwargs=True)
    mixer.in_proj.register_forward_hook(change)


def check_mixers(model: nn.Module) -> None:
    """A UserError for a model with layers that could look at a closed fact."""
    for name, module in model.named_modules():
        known = type(module).__name__ in MIXERS
        if not known and (hasattr(module, "A_log") or hasattr(module, "conv1d")):
            raise UserError(
                f"{type(model).__name__}: facts cannot be gated in {name} ({type(module).__name__}); "
                "choose a Transformer or a hybrid with Mamba-2 (NemotronH, GraniteMoeHybrid, Bamba)"
            )


def prepare(model: nn.Module) -> int:
    """Make a causal language model of transformers take gates, after LoRA has exchanged its layers; returns how many
    tokens its convolutions look back."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(ATTENTION, gated_attention)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)
    model.set_attn_implementation(ATTENTION)
    mixers = [module for module in model.modules() if type(module).__name__ in MIXERS]
    for mixer in mixers:
        gate_mixer(mixer)
    return max((mixer.conv_kernel_size - 1 for mixer in mixers), default=0)
