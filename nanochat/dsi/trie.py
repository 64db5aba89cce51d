"""All valid document ids as a tree, and the search for the likeliest of them.

At every step the model chooses among the tokens with which an id can go on, and only among those: its probabilities are
renormalised over them, so that the probabilities of all documents sum to 1. What may be left out is known exactly: a
beginning is never likelier than what it is dropped for. Constrained decoding of names: De Cao et al., "Autoregressive
Entity Retrieval" (ICLR 2021).

    Q queries, R rows (beams of all queries), V vocabulary, S tokens of an id
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Trie:
    """sequences: one for each document, all different, none the beginning of another (an end token sees to that)."""

    def __init__(self, sequences: Sequence[Sequence[int]]):
        self.sequences = [tuple(sequence) for sequence in sequences]
        self._children: list[dict[int, int]] = [{}]
        self.document_at: dict[int, int] = {}  # of leaves
        for document, sequence in enumerate(self.sequences):
            node = 0
            for token in sequence:
                if token not in self._children[node]:
                    self._children[node][token] = len(self._children)
                    self._children.append({})
                node = self._children[node][token]
            if self._children[node] or node in self.document_at or not sequence:
                raise ValueError(f"sequence {document} is empty, or another one begins with it")
            self.document_at[node] = document
        if any(self._children[node] for node in self.document_at):
            raise ValueError("a sequence is the beginning of another")
        self._tokens: dict[int, Tensor] = {}

    def __len__(self) -> int:
        return len(self.sequences)

    def child(self, node: int, token: int) -> int:
        return self._children[node][token]

    def nodes(self, document: int) -> list[int]:
        """Where each token of a document's id is chosen: (S,)."""
        path = [0]
        for token in self.sequences[document]:
            path.append(self.child(path[-1], token))
        return path[:-1]

    def tokens(self, node: int) -> Tensor:
        if node not in self._tokens:
            self._tokens[node] = torch.tensor(list(self._children[node]), dtype=torch.long)
        return self._tokens[node]

    def allowed(self, nodes: Sequence[int], size: int) -> Tensor:
        """(R, V) whether each token can come at each node. A leaf and a negative node allow token 0 alone."""
        mask = torch.zeros(len(nodes), size, dtype=torch.bool)
        rows_at: dict[int, list[int]] = {}
        for row, node in enumerate(nodes):
            rows_at.setdefault(node, []).append(row)
        for node, rows in rows_at.items():
            going = node >= 0 and self._children[node]
            mask[torch.tensor(rows)[:, None], self.tokens(node) if going else torch.zeros(1, dtype=torch.long)] = True
        return mask


def constrained(logits: Tensor, mask: Tensor) -> Tensor:
    """Log-probabilities (..., V) among the tokens of the mask, in float32 at least."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits.masked_fill(~mask.to(logits.device), -torch.inf).log_softmax(-1)


class Decoding(Protocol):
    """A model at work on the ids of some queries."""

    logits: Tensor
    """(R, V): of each row's next token."""

    def advance(self, parents: Tensor, tokens: Tensor) -> None:
        """Row r becomes what row parents[r] was, with tokens[r] behind it."""


@dataclass
class Ranked:
    """documents and their log-probabilities, the likeliest first; exact: no document that is not here is likelier than
    the last of them."""

    documents: list[int]
    scores: list[float]
    exact: bool


@torch.no_grad()
def beam_search(begin: Callable[[], Decoding], queries: int, trie: Trie, top_k: int, width: int) -> list[Ranked]:
    """The top_k documents of each query. begin: the decoding of all queries, a row each. width: beginnings of ids that
    are followed for each query, at least top_k."""
    width = min(max(width, top_k), len(trie))
    decoding = begin()
    device, size = decoding.logits.device, decoding.logits.shape[-1]
    beams = [[(0.0, 0, row)] for row in range(queries)]  # log-probability, node and row of each
    done: list[list[tuple[float, int]]] = [[] for _ in range(queries)]
    lost = [-torch.inf] * queries  # the likeliest beginning that was dropped
    while any(beams):
        rows = [beam for of in beams for beam in of]
        owner = torch.tensor([query for query, of in enumerate(beams) for _ in of], device=device)
        order = torch.tensor([row for _, _, row in rows], device=device)
        scores = constrained(decoding.logits[order], trie.allowed([node for _, node, _ in rows], size))
        scores += torch.tensor([score for score, _, _ in rows], device=device)[:, None]
        parents, tokens = [], []
        following: list[list[tuple[float, int, int]]] = [[] for _ in range(queries)]
        for query in range(queries):
            mine = (owner == query).nonzero()[:, 0]
            if not len(mine):
                continue
            flat = scores[mine].flatten()
            best = flat.topk(min(width + 1, int((flat > -torch.inf).sum())))
            for at, (score, place) in enumerate(zip(best.values.tolist(), best.indices.tolist(), strict=True)):
                if at == width:
                    lost[query] = max(lost[query], score)
                    break
                parent, token = int(mine[place // size]), place % size
                node = trie.child(rows[parent][1], token)
                if node in trie.document_at:
                    done[query].append((score, trie.document_at[node]))
                else:
                    following[query].append((score, node, len(parents)))
                    parents.append(int(order[parent]))
                    tokens.append(token)
        beams = following
        if parents:
            decoding.advance(torch.tensor(parents, device=device), torch.tensor(tokens, device=device))
    ranked = []
    for query in range(queries):
        best = sorted(done[query], key=lambda found: (-found[0], found[1]))[:top_k]
        ranked.append(Ranked([d for _, d in best], [s for s, _ in best], not best or best[-1][0] >= lost[query]))
    return ranked


@torch.no_grad()
def sample(decoding: Decoding, trie: Trie, rows: int) -> list[int]:
    """A document for each row of a decoding, drawn by the model's probabilities."""
    nodes, found = [0] * rows, [-1] * rows
    going = list(range(rows))
    while going:
        probabilities = constrained(
            decoding.logits, trie.allowed([nodes[row] for row in going], decoding.logits.shape[-1])
        )
        tokens = probabilities.exp().multinomial(1)[:, 0]
        kept = []
        for at, (row, token) in enumerate(zip(going, tokens.tolist(), strict=True)):
            nodes[row] = trie.child(nodes[row], token)
            if nodes[row] in trie.document_at:
                found[row] = trie.document_at[nodes[row]]
            else:
                kept.append(at)
        going = [going[at] for at in kept]
        if kept:
            parents = torch.tensor(kept, device=tokens.device)
            decoding.advance(parents, tokens[parents])
    return found
