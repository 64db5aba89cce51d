"""An index that learns from answers: which documents make the right answer likely.

    marginal  -log sum_d p(d | q) p(a | q, d) over the top_k documents, p(d | q) renormalised over them. Lewis et al.,
              "Retrieval-Augmented Generation for Knowledge-Intensive NLP Tasks" (NeurIPS 2020), RAG-sequence
    policy    documents drawn from p(d | q), each rewarded by how likely it makes the answer, against the mean reward of
              the other draws of the question (leave-one-out; Kool, van Hoof and Welling, 2019)
    anchor    the supervised loss of the index, on pseudo-queries

The first tells the index of its best documents only, and exactly; the second of any document, by chance.

    B questions, K documents of each, S draws of each
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nanochat.conversation import render
from nanochat.dsi.index import SearchIndex
from nanochat.dsi.training import Pairs
from nanochat.kg.sampler import leave_one_out
from nanochat.model.lm import IGNORE, HybridLM
from nanochat.retrieval.document import Document
from nanochat.tokenizer import Tokenizer


class Reader:
    """The model that answers from a document. cite: answers begin with the document's number, as this project's RAG
    models write them."""

    def __init__(self, model: HybridLM, tokenizer: Tokenizer, cite: bool = True, max_doc_tokens: int = 200):
        self.model, self.tokenizer, self.cite, self.max_doc_tokens = model, tokenizer, cite, max_doc_tokens

    def log_likelihoods(
        self, documents: Sequence[Document], questions: Sequence[str], answers: Sequence[str]
    ) -> tuple[Tensor, Tensor]:
        """log p(answer | question, document) of each triple (N,), summed over its tokens, and how many these are."""
        rows = []
        for document, question, answer in zip(documents, questions, answers, strict=True):
            messages = [
                {"role": "retrieval", "documents": [document.to_dict(with_score=False)]},
                {"role": "user", "content": question},
                {"role": "assistant", "content": f"[1] {answer}" if self.cite else answer},
            ]
            rows.append(render({"messages": messages}, self.tokenizer, None, self.max_doc_tokens))
        longest = max(len(row.ids) for row in rows)
        tokens = torch.zeros(len(rows), longest, dtype=torch.long)
        targets = torch.full((len(rows), longest), IGNORE)
        for at, row in enumerate(rows):
            ids, learned = torch.tensor(row.ids), torch.tensor(row.mask, dtype=torch.bool)
            tokens[at, : len(ids)] = ids
            targets[at, : len(ids) - 1] = torch.where(learned[1:], ids[1:], IGNORE)
        tokens, targets = tokens.to(self.model.device), targets.to(self.model.device)
        losses = self.model(tokens, targets, reduction="none")
        counts = (targets != IGNORE).sum(1)
        owner = (targets != IGNORE).nonzero()[:, 0]
        sums = losses.new_zeros(len(rows)).index_add(0, owner, losses)
        return -sums, counts


@dataclass
class JointConfig:
    top_k: int = 4
    """marginal: documents of a question."""
    draws: int = 4
    """policy: of a question, at least 2."""
    marginal: float = 1.0
    """Weight of each loss; 0 leaves it out."""
    policy: float = 1.0
    anchor: float = 1.0


@dataclass
class Asked:
    """Questions with their answers, and pairs for the anchor."""

    questions: list[str]
    answers: list[str]
    pairs: Pairs

    @property
    def learned(self) -> int:
        return len(self.questions)

    def to(self, device: torch.device | str) -> Asked:
        return self


def joint_losses(
    index: SearchIndex, reader: Reader, documents: Callable[[str], Document], batch: Asked, config: JointConfig
) -> dict[str, Tensor]:
    """Each part, a sum over the questions, without its weight; parts of weight 0 are left out. documents: by id."""
    parts: dict[str, Tensor] = {}
    if config.marginal:
        found = [[id for id, _ in ranked] for ranked in index.search(batch.questions, config.top_k)]
        parts["marginal"] = marginal_loss(index, reader, documents, batch, found).sum()
    if config.policy:
        parts["policy"] = policy_loss(index, reader, documents, batch, config.draws)
    if config.anchor:
        parts["anchor"] = -index.log_probs(batch.pairs.queries, batch.pairs.documents).sum()
    return parts


def marginal_loss(
    index: SearchIndex,
    reader: Reader,
    documents: Callable[[str], Document],
    batch: Asked,
    found: Sequence[Sequence[str]],
) -> Tensor:
    """(B,), over the documents found for each question, as many for all."""
    K = len(found[0])
    ids, questions, answers = _triples(batch, found)
    of_index = index.log_probs(questions, ids).view(-1, K).log_softmax(1)
    of_reader = reader.log_likelihoods([documents(id) for id in ids], questions, answers)[0].view(-1, K)
    return -(of_index + of_reader).logsumexp(1)


def policy_loss(
    index: SearchIndex, reader: Reader, documents: Callable[[str], Document], batch: Asked, draws: int
) -> Tensor:
    """Its gradient is the policy gradient's of the mean reward; the reward is p(answer) per token, between 0 and 1."""
    drawn = index.sample(batch.questions, draws)
    ids, questions, answers = _triples(batch, drawn)
    with torch.no_grad():
        likelihood, tokens = reader.log_likelihoods([documents(id) for id in ids], questions, answers)
        rewards = (likelihood / tokens).exp().view(-1, draws).T
    return leave_one_out(-rewards, index.log_probs(questions, ids).view(-1, draws).T)


def _triples(batch: Asked, found: Sequence[Sequence[str]]) -> tuple[list[str], list[str], list[str]]:
    rows = [(id, at) for at, ids in enumerate(found) for id in ids]
    return [id for id, _ in rows], [batch.questions[at] for _, at in rows], [batch.answers[at] for _, at in rows]
