"""Questions, the documents that answer them and others that look as if, for contrastive training of an encoder.

For query q with its document d+, and all documents of the batch (its own hard negatives and whatever the other queries
brought), temperature t:

    loss = -log( exp(q.d+ / t) / sum over d of exp(q.d / t) )

InfoNCE (van den Oord et al. 2018), with mined negatives as in DPR (Karpukhin et al. 2020). Another gold document of the
same query is no negative.

    B queries, M documents, D width
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat.common import UserError
from nanochat.model.lm import HybridLM
from nanochat.packing import shuffled
from nanochat.retrieval import RetrievalManager
from nanochat.retrieval.lm_encoder import embed, pad, render_text
from nanochat.retrieval.segment import dense_text
from nanochat.tokenizer import Tokenizer
from tasks.rag import require_documents, retrieve_all


@dataclass
class Pairs:
    """queries, documents: (tokens, lengths). wanted (B,): which document is each query's; gold (B, M): which are."""

    queries: tuple[Tensor, Tensor]
    documents: tuple[Tensor, Tensor]
    wanted: Tensor
    gold: Tensor

    @property
    def learned(self) -> int:
        return len(self.wanted)

    def to(self, device: torch.device) -> Pairs:
        queries, documents = (tuple(t.to(device) for t in part) for part in (self.queries, self.documents))
        return Pairs(queries, documents, self.wanted.to(device), self.gold.to(device))


def contrastive_loss(model: HybridLM, batch: Pairs, temperature: float) -> Tensor:
    """Summed over the queries."""
    queries, documents = embed(model, *batch.queries), embed(model, *batch.documents)
    similar = queries @ documents.T / temperature
    rows = torch.arange(len(similar), device=similar.device)
    others = batch.gold.clone()
    others[rows, batch.wanted] = False
    return F.cross_entropy(similar.masked_fill(others, -torch.inf), batch.wanted, reduction="sum")


class PairBatches:
    """rows_per_step queries a step, in a new order each epoch; a pure function of seed and step."""

    def __init__(
        self,
        queries: Sequence[dict[str, Any]],
        manager: RetrievalManager,
        tokenizer: Tokenizer,
        rows_per_step: int,
        hard_negatives: int = 1,
        mined: int = 30,
        max_query_tokens: int = 128,
        max_document_tokens: int = 512,
        seed: int = 0,
    ):
        """hard_negatives: of each query, drawn anew each epoch from the best `mined` that the manager finds for it."""
        self.queries = [query for query in queries if query["doc_ids"]]
        if len(self.queries) < 2:
            raise UserError("at least two queries with a gold document are needed")
        require_documents(manager, (id for query in self.queries for id in query["doc_ids"]))
        self.manager, self.tokenizer, self.rows_per_step, self.seed = manager, tokenizer, rows_per_step, seed
        self.hard_negatives, self.limits = hard_negatives, (max_query_tokens, max_document_tokens)
        found = retrieve_all(manager, [query["query"] for query in self.queries], mined) if hard_negatives else None
        self.mined = [
            [id for id in found[at] if id not in query["doc_ids"]] if found else []
            for at, query in enumerate(self.queries)
        ]
        self._rendered: dict[str, list[int]] = {}
        first = self.get(0)  # tokens of a row, as the log counts them: about what they are in any other batch
        self.max_seq_len = int(first.queries[1].sum() + first.documents[1].sum()) // rows_per_step

    def steps_per_epoch(self) -> int:
        return max(1, len(self.queries) // self.rows_per_step)

    def get(self, step: int, which: range | None = None) -> Pairs:
        epoch, place = divmod(step, self.steps_per_epoch())
        order = shuffled(len(self.queries), self.seed, epoch)
        which = which or range(self.rows_per_step)
        rows = [order[(place * self.rows_per_step + row) % len(order)] for row in which]
        wanted: list[str] = []
        negatives: list[str] = []
        for at in rows:
            rng = random.Random(f"{self.seed}/{epoch}/{at}")
            wanted.append(rng.choice(self.queries[at]["doc_ids"]))
            negatives += rng.sample(self.mined[at], min(self.hard_negatives, len(self.mined[at])))
        ids = list(dict.fromkeys([*wanted, *negatives]))  # one that two queries share stands there once
        place_of = {id: at for at, id in enumerate(ids)}
        gold = torch.zeros(len(rows), len(ids), dtype=torch.bool)
        for row, at in enumerate(rows):
            for id in self.queries[at]["doc_ids"]:
                if id in place_of:
                    gold[row, place_of[id]] = True
        asked = [render_text(self.tokenizer, self.queries[at]["query"], "query", self.limits[0]) for at in rows]
        target = torch.tensor([place_of[id] for id in wanted])
        return Pairs(pad(asked), pad(self._documents(ids)), target, gold)

    def _documents(self, ids: list[str]) -> list[list[int]]:
        new = [id for id in ids if id not in self._rendered]
        for id, document in zip(new, self.manager.documents(new), strict=True):
            self._rendered[id] = render_text(self.tokenizer, dense_text(document), "document", self.limits[1])
        return [self._rendered[id] for id in ids]
