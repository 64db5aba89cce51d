"""Batches that an index learns from, and how well it finds documents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nanochat.dsi.index import SearchIndex
from nanochat.dsi.queries import DEFAULT_KINDS, PseudoQueries, parse_kinds
from nanochat.optim import adamw
from nanochat.packing import shuffled
from nanochat.retrieval.bm25 import BM25Retriever
from nanochat.retrieval.document import Document


@dataclass
class Pairs:
    queries: list[str]
    documents: list[str]

    @property
    def learned(self) -> int:
        return len(self.queries)

    def to(self, device: torch.device | str) -> Pairs:
        return self


class PseudoQueryBatches:
    """rows_per_step documents a step, every epoch in an order of its own, each with a query drawn anew; fixed by seed
    and step. rehearsed: documents that were learned before; of each step's rows this share is theirs."""

    def __init__(
        self,
        queries: PseudoQueries,
        documents: Sequence[int],
        rows_per_step: int,
        max_seq_len: int,
        seed: int = 0,
        rehearsed: Sequence[int] = (),
        rehearsal: float = 0.5,
    ):
        self.queries, self.rows_per_step, self.max_seq_len, self.seed = queries, rows_per_step, max_seq_len, seed
        old = round(rows_per_step * rehearsal) if len(rehearsed) else 0
        self._streams = [(list(documents), rows_per_step - old), (list(rehearsed), old)]

    def get(self, step: int, which: range | None = None) -> Pairs:
        rows = which if which is not None else range(self.rows_per_step)
        chosen = [(self._document(step, row), step * self.rows_per_step + row) for row in rows]
        texts = [self.queries.draw(document, np.random.default_rng((self.seed, number))) for document, number in chosen]
        return Pairs(texts, [self.queries.documents[document].id for document, _ in chosen])

    def _document(self, step: int, row: int) -> int:
        stream = int(row >= self._streams[0][1])
        documents, rows = self._streams[stream]
        number = step * rows + (row - self._streams[0][1] if stream else row)
        epoch, at = divmod(number, len(documents))
        return documents[shuffled(len(documents), self.seed + stream, epoch)[at]]


def index_loss(index: SearchIndex, batch: Pairs) -> Tensor:
    """The sum over the pairs of -log p(document | query)."""
    return -index.log_probs(batch.queries, batch.documents).sum()


def ranking_figures(found: Sequence[Sequence[str]], queries: Sequence[dict[str, Any]]) -> dict[str, float]:
    """hits1, hits10: a gold document is the first, is among ten; mrr: one over its place among ten. found: ids, the
    best first."""
    ranks = []
    for ids, query in zip(found, queries, strict=True):
        gold = set(query["doc_ids"])
        ranks.append(next((rank for rank, id in enumerate(ids[:10], 1) if id in gold), 0))
    return {
        "hits1": sum(rank == 1 for rank in ranks) / len(ranks),
        "hits10": sum(rank > 0 for rank in ranks) / len(ranks),
        "mrr": sum(1 / rank for rank in ranks if rank) / len(ranks),
    }


def evaluate_index(index: SearchIndex, queries: Sequence[dict[str, Any]]) -> dict[str, float]:
    found = index.search([query["query"] for query in queries], 10)
    return ranking_figures([[id for id, _ in ranked] for ranked in found], queries)


def found_by_bm25(documents: Sequence[Document], queries: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The same figures of BM25 over these documents."""
    bm25 = BM25Retriever()
    bm25.add(documents)
    found = bm25.search([query["query"] for query in queries], 10)
    return ranking_figures([[document.id for document in one] for one in found], queries)


def of_documents(queries: Sequence[dict[str, Any]], ids: set[str]) -> list[dict[str, Any]]:
    """The queries that have a gold document among these."""
    return [query for query in queries if ids & set(query["doc_ids"])]


def learn(
    index: SearchIndex,
    new: Sequence[Document],
    old: Sequence[Document],
    epochs: int,
    rows_per_step: int = 64,
    lr: float = 3e-4,
    embed_lr: float = 0.02,
    sample: int = 200,
) -> str:
    """Train new documents in, with as many rows of each step about old ones; what came of it, as a sentence. Old
    documents are those that the index knows and whose texts are at hand."""
    index.add(new)
    everything = [*new, *old]
    pseudo = PseudoQueries(everything, parse_kinds(DEFAULT_KINDS))
    at = range(len(everything))
    batches = PseudoQueryBatches(pseudo, at[: len(new)], rows_per_step, 0, 0, at[len(new) :])
    asked = [
        {"query": pseudo.draw(document, np.random.default_rng((1, document))), "doc_ids": [everything[document].id]}
        for document in [*at[: len(new)][:sample], *at[len(new) :][:sample]]
    ]
    of_new, of_old = asked[: min(sample, len(new))], asked[min(sample, len(new)) :]
    before = evaluate_index(index, of_old)["hits1"] if of_old else 0.0
    fresh = rows_per_step - (round(rows_per_step * 0.5) if old else 0)
    steps = max(1, epochs * len(new) // fresh)
    optimizers = adamw({"index": (index.model, lr)}, dict.fromkeys(index.model.tables, embed_lr))
    index.model.train()
    for step in range(steps):
        optimizers.set_lr_scale(min(1.0, 2 * (1 - step / steps)))
        loss = index_loss(index, batches.get(step)) / rows_per_step
        optimizers.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(index.model.parameters(), 1.0)
        optimizers.step()
    index.model.eval()
    said = f"learned {len(new):,} new documents in {steps:,} steps: Hits@1 {evaluate_index(index, of_new)['hits1']:.3f}"
    if of_old:
        said += f"; of the old ones {before:.3f} before, {evaluate_index(index, of_old)['hits1']:.3f} now"
    return f"{said} (by words of theirs)"
