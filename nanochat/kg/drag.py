"""D-RAG: a retriever that learns from what its facts do to the generator's answers.

    drag = DRAG(retriever, Projector(64, generator.width), generator, graph, DRAGConfig())
    losses = drag.losses(batch, subgraphs, questions, answers)   # training
    answers = drag.answer(batch, questions)                      # inference

The retriever scores all facts around a question; the best of them, the pool, get gates that are drawn by chance, 0 or
1; each fact of the pool stands before the question as its projected vector and its text, as if it were not there where
its gate is 0; and the loss of the answer goes back through the gates into the retriever. Source: Gao et al., "D-RAG:
Differentiable Retrieval-Augmented Generation for Knowledge Graph Question Answering" (EMNLP 2025).

Shapes: B questions, P facts of a pool, L tokens, D model width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from nanochat.kg.generator import pad
from nanochat.kg.gnn import FactRetriever, Scored
from nanochat.kg.graph import Graph
from nanochat.kg.projector import Projector
from nanochat.kg.sampler import binary_gates, choose, top_k_gates
from nanochat.kg.sampler import pad as pad_facts
from nanochat.kg.subgraphs import Batch
from nanochat.model.lm import IGNORE

SEPARATOR = "|"  # between answers; in no name of the formats that graphs are read from
BEFORE, BEHIND = -2, -1  # text before the facts, and behind them


@dataclass
class DRAGConfig:
    sampler: Literal["binary", "top_k", "none"] = "binary"
    """binary: each fact for itself (D-RAG's); top_k: exactly k_facts; none: the k_facts best, and the retriever learns
    nothing from the generator (a cascade)."""
    pool: int = 24
    """Facts of a question that get gates: its best ones."""
    k_facts: int = 12
    """Facts shown when answering, at most."""
    min_probability: float = 0.01
    """Facts less likely than this are not shown."""
    temperature: float = 0.5
    """binary: of the relaxation."""
    neural: bool = True
    """A fact's projected vector stands before its text."""
    text: bool = True
    """A fact's text is shown."""
    max_answers: int = 8
    """Answers that are learned of a question with many."""
    max_tokens: int = 96
    """Of an answer."""


@dataclass
class Answer:
    """answers: as written, the likeliest first. facts: of the graph, the best first, with their probabilities."""

    answers: list[str]
    facts: list[int]
    probabilities: list[float]


@dataclass
class Pool:
    """The best facts of B questions: places (B, P) in the batch's facts, logits (B, P) and which there are (B, P)."""

    places: Tensor
    logits: Tensor
    mask: Tensor


def best_facts(scored: Scored, batch: Batch, size: int) -> Pool:
    logits, mask = pad_facts(scored.facts, batch.fact_starts)
    order = logits.detach().masked_fill(~mask, -torch.inf).topk(min(size, logits.shape[1]), dim=-1).indices
    mask = mask.gather(1, order)
    places = torch.where(mask, order + batch.fact_starts[:-1, None].to(order.device), 0)
    return Pool(places, logits.gather(1, order), mask)


class DRAG:
    """generator: a LMGenerator or HFGenerator."""

    def __init__(
        self, retriever: FactRetriever, projector: Projector, generator: Any, graph: Graph, config: DRAGConfig
    ):
        self.retriever, self.projector, self.generator = retriever, projector, generator
        self.graph, self.config = graph, config
        self._texts: dict[int, list[int]] = {}

    @property
    def beside(self) -> nn.Module:
        """What is trained beside the generator."""
        return nn.ModuleDict({"retriever": self.retriever, "projector": self.projector})

    # --- training

    def losses(
        self, batch: Batch, scored: Scored, questions: Sequence[str], answers: Sequence[Sequence[str]]
    ) -> tuple[Tensor, Tensor]:
        """The loss of each question's answer (B,), and the facts kept of each (B,), with a gradient. answers: all that
        are right; those that the pool knows are learned, in its order. A question without one has loss 0."""
        pool = best_facts(scored, batch, self.config.pool)
        if self.config.sampler == "binary":
            gates = binary_gates(pool.logits, pool.mask, self.config.temperature)
        elif self.config.sampler == "top_k":
            gates = top_k_gates(pool.logits, pool.mask, self.config.k_facts)
        else:
            gates = choose(pool.logits.detach(), pool.mask, self.config.k_facts, self.config.min_probability)
        targets = [self.known(answers[at], batch, pool.places[at][pool.mask[at]].tolist()) for at in range(len(batch))]
        embeds, fact, valid, goal = self.prompts(batch, scored, pool, questions, targets)
        kept = (pool.logits.sigmoid() * pool.mask).sum(1)
        return self.generator.losses(embeds, fact, gates, goal, valid), kept

    def known(self, answers: Sequence[str], batch: Batch, places: list[int]) -> list[str]:
        """The answers that these facts have at an end, those of the best facts first."""
        wanted, found = set(answers), {}
        for place in places:
            for end in (batch.tails[place], batch.heads[place]):
                name = self.graph.name(int(batch.nodes[end]))
                if name in wanted:
                    found[name] = None
        return list(found)[: self.config.max_answers]

    # --- answering

    @torch.no_grad()
    def answer(self, batch: Batch, questions: Sequence[str]) -> list[Answer]:
        scored = self.retriever(batch)
        pool = best_facts(scored, batch, self.config.k_facts)
        chosen = choose(pool.logits, pool.mask, self.config.k_facts, self.config.min_probability) > 0
        pool = Pool(pool.places, pool.logits, chosen)
        embeds, fact, valid, _ = self.prompts(batch, scored, pool, questions, None)
        found = []
        for at, ids in enumerate(self.generator.generate(embeds, fact, valid, self.config.max_tokens)):
            names = [name.strip() for name in self.generator.decode(ids).split(SEPARATOR)]
            facts = [int(batch.facts[place]) for place in pool.places[at][chosen[at]].tolist()]
            probabilities = pool.logits[at][chosen[at]].sigmoid().tolist()
            found.append(Answer(list(dict.fromkeys(name for name in names if name)), facts, probabilities))
        return found

    # --- prompts

    def fact_ids(self, fact: int) -> list[int]:
        """Of a fact of the graph: its text, as it stands behind its vector."""
        if fact not in self._texts:
            graph = self.graph
            relation = graph.relation_names[graph.relations[fact]].replace("_", " ")
            text = f"{graph.name(int(graph.heads[fact]))} {SEPARATOR} {relation} {SEPARATOR} "
            self._texts[fact] = self.generator.encode(text + graph.name(int(graph.tails[fact])))
        return self._texts[fact]

    def prompts(
        self,
        batch: Batch,
        scored: Scored,
        pool: Pool,
        questions: Sequence[str],
        answers: Sequence[Sequence[str]] | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """embeds (B, L, D), fact (B, L), valid (B,) and targets (B, L), padded on the right. The best fact stands last,
        next to the question."""
        config, generator, device = self.config, self.generator, self.generator.device
        ids: list[list[int]] = []
        numbers: list[list[int]] = []
        goals: list[list[int]] = []
        vectors: list[tuple[int, int, int]] = []  # row, place in the row, place in the batch's facts
        for row, question in enumerate(questions):
            before, behind = generator.frame(question)
            tokens, number = list(before), [BEFORE] * len(before)
            for at in reversed(range(pool.mask.shape[1])):
                if not pool.mask[row, at]:
                    continue
                place = int(pool.places[row, at])
                start, end = generator.fact_marks
                vector = [0] if config.neural else []
                if config.neural:
                    vectors.append((row, len(tokens) + len(start), place))
                words = self.fact_ids(int(batch.facts[place])) if config.text else []
                piece = [*start, *vector, *words, *end]
                tokens += piece
                number += [at] * len(piece)
            tokens += behind
            number += [BEHIND] * len(behind)
            goal = [IGNORE] * len(tokens)
            if answers is not None and answers[row]:
                written = [*generator.encode(SEPARATOR.join(answers[row])), generator.end]
                goal = [*goal[:-1], *written]
                tokens += written[:-1]
                number += [BEHIND] * (len(written) - 1)
            ids.append(tokens)
            numbers.append(number)
            goals.append(goal)
        embeds = generator.embed(pad(ids, 0, device))
        if vectors:
            rows, columns, places = (torch.tensor(list(of), device=device) for of in zip(*vectors, strict=True))
            projected = self.projector(scored.vectors[places]).to(embeds.dtype)
            embeds = embeds.index_put((rows, columns), projected)
        valid = torch.tensor([len(row) for row in ids], device=device)
        return embeds, pad(numbers, BEHIND, device), valid, pad(goals, IGNORE, device)
