"""Facts before a question, each there or not, with a gradient to either.

A gate of 0 leaves every other token as if the fact's tokens had never been read, a gate of 1 as if there were no gates;
in between, attention and the state of Mamba blocks see so much of it:

- Attention weighs key j by gate_j e^{s_j} / sum_k gate_k e^{s_k}.
- Mamba-2 multiplies dt by the gate: at 0 the state does not decay and takes nothing in.
- The convolution starts anew at every fact, and after the last: no window reaches across a border.
- Positions count the tokens that are there.

Within one fact all gates are 1, so that what a closed fact would say is known. Leaving closed facts out of the pass
would be cheaper, and their gates would get no gradient: D-RAG (Gao et al., EMNLP 2025) is about those.

A gate that is exactly 0 or 1 can only jump to the other side, and its gradient through attention says where that leads:
out(1) - out(0), as in a secant. The derivative at 0, e^{s_j} / Z (v_j - out), has no bound: one key that scores 25
above the open ones outweighs all else that is learned in a step, a million million to one.

Shapes: B batch, L length, F facts, H heads, Dh head width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

HIGHEST = 30.0  # by how much a closed key may score above the best open one; the square of e^30 is finite, too


@dataclass
class GatedFacts:
    """fact (B, L): which of the F facts a token belongs to, negative for text; a fact's tokens stand together. The
    convolution starts anew where the number changes: text before and behind facts needs different ones to read the
    same when all facts are closed. gate (B, F), in 0..1; None: all facts are there. valid (B,): tokens of each row, if
    padding follows them: it need not tell gates anything."""

    fact: Tensor
    gate: Tensor | None = None
    valid: Tensor | None = None

    def tokens(self) -> Tensor | None:
        """(B, L): the gate of each token for those outside of its fact; 1 for text."""
        if self.gate is None:
            return None
        return F.pad(self.gate, (1, 0), value=1.0).gather(1, self.fact.clamp_min(-1) + 1)

    def positions(self) -> Tensor:
        """(B, L): how many tokens are there before each one; tokens of a closed fact count on within it."""
        B, L = self.fact.shape
        index = torch.arange(L, device=self.fact.device).expand(B, L)
        if self.gate is None:
            return index
        there = self.tokens() > 0
        borders = torch.ones(B, L, dtype=torch.bool, device=self.fact.device)
        borders[:, 1:] = self.fact[:, 1:] != self.fact[:, :-1]
        within = index - torch.where(borders, index, 0).cummax(1).values
        return there.cumsum(1) - there.long() + torch.where(there, 0, within)

    def pairs(self) -> Pairs | None:
        if self.gate is None:
            return None
        L = self.fact.shape[1]
        index = torch.arange(L, device=self.fact.device)
        tokens = self.tokens()
        fixed = tokens.detach()
        own = (self.fact.unsqueeze(-1) == self.fact.unsqueeze(1)) & (self.fact >= 0).unsqueeze(-1)
        bias = torch.where(own, torch.zeros((), device=fixed.device), fixed.log().unsqueeze(1))
        bias = bias.masked_fill(index > index.unsqueeze(-1), -torch.inf)
        hard = bool(((fixed == 0) | (fixed == 1)).all())
        told = self.after_facts() if hard else torch.ones_like(own[:, 0])
        if self.valid is not None:
            told = told & (index < self.valid.unsqueeze(-1))
        # the queries of each row side by side, the first one again where a row has fewer
        queries = torch.where(told, index, L).sort(1).values[:, : int(told.sum(1).max())]
        weights = torch.where(own, torch.ones_like(bias), tokens.unsqueeze(1)).tril()
        weights = weights.gather(1, queries.clamp_max(L - 1).unsqueeze(-1).expand(-1, -1, L))
        weights = torch.where((queries < L).unsqueeze(-1), weights, weights.detach())
        member = self.fact.unsqueeze(-1) == torch.arange(self.gate.shape[1], device=self.fact.device)
        return Pairs(bias.unsqueeze(1), queries.clamp_max(L - 1), weights.unsqueeze(1), fixed, member)

    def after_facts(self) -> Tensor:
        """(B, L) bool: text with no fact behind it."""
        return (self.fact >= 0).flip(1).cumsum(1).flip(1) == 0

    def after_borders(self, valid: Tensor | None) -> Tensor:
        """(B, L) bool: text with no border between it and the row's last token, the valid-th (B,) or the L-th."""
        pieces = F.pad((self.fact[:, 1:] != self.fact[:, :-1]).long(), (1, 0)).cumsum(1)
        last = torch.full_like(pieces[:, :1], pieces.shape[1]) if valid is None else valid.unsqueeze(-1)
        return (pieces == pieces.gather(1, (last - 1).clamp_min(0))) & (self.fact < 0)


@dataclass
class Pairs:
    """What attention needs to know of gates, without a graph but in weights.

    bias (B, 1, L, L): the logarithm of the gate of each key for each query, -inf for later keys; queries (B, M): the
    places whose attention tells gates where they lead; weights (B, 1, M, L): the gates of all keys for those; gates
    (B, L): of each key for other facts' queries; member (B, L, F) bool: which tokens are whose."""

    bias: Tensor
    queries: Tensor
    weights: Tensor
    gates: Tensor
    member: Tensor


def gated_attention(q: Tensor, k: Tensor, v: Tensor, pairs: Pairs) -> Tensor:
    """q (B, H, L, Dh), k and v (B, Hkv, L, Dh) with Hkv dividing H -> (B, H, L, Dh). Every query has an open key:
    itself. Hard gates are told by the text behind the facts alone: their gradient with what facts read from each other,
    ten times the work, has a cosine of .99 or more with it (MetaQA)."""
    if q.shape[1] != k.shape[1]:
        k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for t in (k, v))
    with torch.autocast(q.device.type, enabled=False):
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=pairs.bias.to(q.dtype))
        if not (pairs.weights.requires_grad and torch.is_grad_enabled()):
            return out
        M, L = pairs.weights.shape[2:]
        index = pairs.queries[:, None, :, None].expand(*q.shape[:2], M, q.shape[3])
        exact = torch.promote_types(q.dtype, torch.float32)
        with torch.no_grad():
            scores = (q.gather(2, index) @ k.transpose(-1, -2)).to(exact) * q.shape[-1] ** -0.5
            visible = torch.arange(L, device=q.device) <= pairs.queries[:, None, :, None]
        told = told_to_gates(scores, visible, pairs.weights, pairs.gates, pairs.member, v, out.gather(2, index))
        return out.scatter_add(2, index, told.to(out.dtype))


def told_to_gates(
    scores: Tensor, visible: Tensor, weights: Tensor, gates: Tensor, member: Tensor, v: Tensor, out: Tensor
) -> Tensor:
    """Nothing, with the gradient of the gates: dout . slope_j (v_j - out), where slope_j is the derivative for a gate
    in between, and for one of 0 or 1 what adds up over a fact's tokens to where the output is at the other side.

    scores (B, ..., L, S), visible (L, S) or like scores, weights (B or 1, ..., L, S) with a graph, gates (B, S), member
    (B, S, F), v and out (B, ..., L, Dh)."""
    if not weights.requires_grad:
        return torch.zeros_like(out)
    fixed = weights.detach()
    with torch.no_grad():
        between = [1] * (scores.dim() - 3)
        member = member.view(len(member), *between, *member.shape[1:]).to(scores.dtype)
        gates = gates.detach().view(len(gates), *between, 1, -1)
        top = scores.masked_fill(~visible | (fixed == 0), -torch.inf).amax(-1, keepdim=True)
        each = (scores - top.nan_to_num(neginf=0.0)).clamp_max(HIGHEST).exp().masked_fill(~visible, 0)
        slopes = each / (each * fixed).sum(-1, keepdim=True).clamp_min(1e-30)
        whole = (slopes @ member) @ member.transpose(-1, -2)  # of the key's fact; text has no gate
        slopes = torch.where(gates == 0, slopes / (1 + whole), slopes)
        slopes = torch.where(gates == 1, slopes / (1 - whole).clamp_min(1e-4), slopes)
    moved = (weights - fixed) * slopes
    return moved.to(v.dtype) @ v.detach() - moved.sum(-1, keepdim=True).to(v.dtype) * out.detach()
