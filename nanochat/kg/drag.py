"""D-RAG: a retriever that learns from what its facts do to the generator's answers.

    drag = DRAG(retriever, Projector(64, generator.width), generator, graph, DRAGConfig())
    losses, kept = drag.losses(batch, drag.score(batch), questions)  # training
    answers = drag.answer(batch, questions)  # inference

The retriever scores all facts around a question; the best of them, the pool, get gates that are drawn by chance, 0 or
1; each fact of the pool stands before the question as its projected vector and its text, as if it were not there where
its gate is 0; and the loss of the answer goes back through the gates into the retriever. Source: Gao et al., "D-RAG:
Differentiable Retrieval-Augmented Generation for Knowledge Graph Question Answering" (EMNLP 2025).

Shapes: B questions, P facts of a pool, L tokens, D model width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from nanochat.checkpoint_manager import load_beside, load_checkpoint, newest, read_meta
from nanochat.common import UserError
from nanochat.kg.closed_answers import ClosedAnswer
from nanochat.kg.generator import LMGenerator, pad
from nanochat.kg.gnn import FactRetriever, RetrieverConfig, Scored
from nanochat.kg.graph import Graph
from nanochat.kg.hf_generator import load as load_hf
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
    closed: bool = True
    """An answer can only be names of the facts that are shown."""
    max_answers: int = 8
    """Answers that are learned of a question with many."""
    max_tokens: int = 192
    """Of an answer."""


def load_drag(
    root: Path, graph: Graph, step: int | None = None, device: torch.device | str = "cpu"
) -> tuple[DRAG, dict[str, Any]]:
    """DRAG as scripts.drag_finetune left it in a folder of checkpoints, and the checkpoint's meta."""
    directory = newest(root, step)
    meta = read_meta(directory) | {"directory": str(directory)}
    try:
        shape, config = RetrieverConfig(**meta["fact_retriever"]), DRAGConfig(**meta["drag"])
        retriever = FactRetriever(shape, meta["vocabulary"])
    except (KeyError, TypeError) as error:
        raise UserError(f"{directory} is no checkpoint of D-RAG ({error})") from None
    if meta.get("generator"):
        generator: Any = load_hf(directory, device=device)
    else:
        model, tokenizer, _, _ = load_checkpoint(root, step, device, with_optimizer=False)
        generator = LMGenerator(model.eval(), tokenizer)
    drag = DRAG(retriever, Projector(shape.width, generator.width), generator, graph, config)
    beside = drag.beside.to(device)
    load_beside(directory, beside)
    beside.eval()
    return drag, meta


@dataclass
class Answer:
    """answers: as written, the likeliest first. facts: of the graph, the best first, with their probabilities."""

    answers: list[str]
    facts: list[int]
    probabilities: list[float]
    prompt_tokens: int


@dataclass
class Pool:
    """The best facts of B questions: places (B, P) in the batch's facts, logits (B, P) and which there are (B, P)."""

    places: Tensor
    logits: Tensor
    mask: Tensor


def best_facts(scored: Scored, batch: Batch, size: int) -> Pool:
    logits, mask = pad_facts(scored.facts, batch.fact_starts)
    # stable: facts of one score are many, and which of them are shown must not hang on the rest of the batch
    order = logits.detach().masked_fill(~mask, -torch.inf).argsort(dim=-1, descending=True, stable=True)[:, :size]
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
        self._names: dict[int, list[int]] = {}
        self._facts: dict[int, list[int]] = {}
        self._separator = generator.encode(SEPARATOR)

    @property
    def beside(self) -> nn.Module:
        """What is trained beside the generator."""
        return nn.ModuleDict({"retriever": self.retriever, "projector": self.projector})

    def score(self, batch: Batch) -> Scored:
        """Of all facts, in fp32 also under autocast: sums over edges are long, and small."""
        with torch.autocast(batch.heads.device.type, enabled=False):
            return self.retriever(batch)

    # --- training

    def losses(
        self, batch: Batch, scored: Scored, questions: Sequence[str], sampler: str = ""
    ) -> tuple[Tensor, Tensor]:
        """The loss of each question's answers (B,), and how many facts are kept of each (B,), with a gradient. Those
        answers are learned that the pool's facts have, the best facts' first; a question without one has loss 0.
        sampler: in place of the configured one."""
        config = self.config
        gates, sampler = None, sampler or config.sampler
        if sampler == "none":
            pool = self.chosen(scored, batch)
        else:
            pool = best_facts(scored, batch, config.pool)
            if sampler == "binary":
                gates = binary_gates(pool.logits, pool.mask, config.temperature)
            else:
                gates = top_k_gates(pool.logits, pool.mask, config.k_facts)
        answers = [self.known(batch, pool.places[at][pool.mask[at]].tolist()) for at in range(len(batch))]
        embeds, fact, valid, goal = self.prompts(batch, scored, pool, questions, answers)
        kept = (pool.logits.sigmoid() * pool.mask).sum(1)
        return self.generator.losses(embeds, fact, gates, goal, valid), kept

    def known(self, batch: Batch, places: Sequence[int]) -> list[int]:
        """The answers that these facts have at an end, entities of the graph, in their order."""
        found: dict[int, None] = {}
        for place in places:
            for end in (batch.tails[place], batch.heads[place]):
                if batch.is_answer[end]:
                    found[int(batch.nodes[end])] = None
        return list(found)[: self.config.max_answers]

    def chosen(self, scored: Scored, batch: Batch) -> Pool:
        """The facts that are shown when nothing is left to chance."""
        pool = best_facts(scored, batch, self.config.k_facts)
        gates = choose(pool.logits.detach(), pool.mask, self.config.k_facts, self.config.min_probability)
        return Pool(pool.places, pool.logits, gates > 0)

    # --- answering

    @torch.no_grad()
    def answer(self, batch: Batch, questions: Sequence[str]) -> list[Answer]:
        scored = self.score(batch)
        pool = self.chosen(scored, batch)
        embeds, fact, valid, _ = self.prompts(batch, scored, pool, questions, None)
        facts = [batch.facts[pool.places[at][pool.mask[at]].numpy(force=True)].tolist() for at in range(len(batch))]
        closed = [self.closed(shown) for shown in facts] if self.config.closed else None
        found = []
        for at, ids in enumerate(self.generator.generate(embeds, fact, valid, self.config.max_tokens, closed)):
            names = [name.strip() for name in self.generator.decode(ids).split(SEPARATOR)]
            probabilities = pool.logits[at][pool.mask[at]].sigmoid().tolist()
            names = list(dict.fromkeys(name for name in names if name))
            found.append(Answer(names, facts[at], probabilities, int(valid[at])))
        return found

    def closed(self, facts: Sequence[int]) -> ClosedAnswer:
        """What an answer from these facts may be."""
        ends = dict.fromkeys(int(end) for fact in facts for end in (self.graph.heads[fact], self.graph.tails[fact]))
        return ClosedAnswer(map(self.name_ids, ends), self._separator, self.generator.end)

    # --- prompts

    def name_ids(self, entity: int) -> list[int]:
        """Of a name, the same wherever it stands, so that an answer is a copy of what is read."""
        if entity not in self._names:
            self._names[entity] = self.generator.encode(" " + self.graph.name(entity))
        return self._names[entity]

    def fact_ids(self, fact: int) -> list[int]:
        """Of a fact of the graph: its text, as it stands behind its vector."""
        if fact not in self._facts:
            head, relation, tail = map(self.generator.encode, self.graph.spoken(fact))
            self._facts[fact] = [*head, *self._separator, *relation, *self._separator, *tail]
        return self._facts[fact]

    def answer_ids(self, entities: Sequence[int]) -> list[int]:
        ids = [token for entity in entities for token in (*self._separator, *self.name_ids(entity))]
        return [*ids[len(self._separator) :], self.generator.end]

    def prompts(
        self,
        batch: Batch,
        scored: Scored,
        pool: Pool,
        questions: Sequence[str],
        answers: Sequence[Sequence[int]] | None,
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
                written = self.answer_ids(answers[row])
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
