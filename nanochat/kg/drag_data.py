"""Questions with their subgraphs, in batches for nanochat/training.py, and what answers to them are worth."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from nanochat.common import UserError
from nanochat.kg.coverage import Grounded, ground
from nanochat.kg.drag import DRAG, Answer
from nanochat.kg.graph import Graph
from nanochat.kg.linking import Linker
from nanochat.kg.questions import Question, read_questions
from nanochat.kg.subgraphs import Batch, Subgraphs, batches, find_subgraphs, make_batch, question_text
from nanochat.metrics import normalize_answer
from nanochat.packing import shuffled


@dataclass
class Asked:
    """Questions of a graph, those that name an entity. texts: as the generator reads them."""

    graph: Graph
    grounded: list[Grounded]
    texts: list[str]
    subgraphs: Subgraphs

    def __len__(self) -> int:
        return len(self.grounded)

    def batch(self, questions: Sequence[int]) -> Batch:
        return make_batch(self.graph, self.subgraphs, questions)


def ask(
    graph: Graph, linker: Linker, questions: Iterable[Question], max_hops: int, hub_degree: int, max_facts: int
) -> tuple[Asked, int]:
    """Asked, and how many questions were left out because they name no entity."""
    grounded = [ground(question, linker) for question in questions]
    kept = [one for one in grounded if one.topics]
    texts = [question_text(one, linker) for one in kept]
    subgraphs = find_subgraphs(graph, texts, kept, max_hops, hub_degree, max_facts) if kept else None
    plain = [one.question.text.replace("[", "").replace("]", "") for one in kept]
    return Asked(graph, kept, plain, subgraphs), len(grounded) - len(kept)


def read_all(paths: Sequence[Path], num_questions: int = -1, seed: int = 0) -> list[Question]:
    """Of several files; num_questions of them by chance."""
    if not paths:
        raise UserError("give --questions FILE")
    questions = [question for path in paths for question in read_questions(path)]
    if 0 <= num_questions < len(questions):
        questions = random.Random(seed).sample(questions, num_questions)
    return questions


# --- batches for training


@dataclass
class Step:
    """Some questions of a step, with their part of the graph."""

    batch: Batch
    texts: list[str]

    @property
    def learned(self) -> int:
        return len(self.texts)

    def to(self, device: torch.device | str) -> Step:
        return Step(self.batch.to(device), self.texts)


class QuestionBatches:
    """rows_per_step questions a step, every epoch in an order of its own; a step's questions depend on its number
    alone. max_seq_len: tokens of a question, for the plan and the rate that is shown."""

    def __init__(self, asked: Asked, questions: Sequence[int], rows_per_step: int, max_seq_len: int, seed: int):
        self.asked, self.questions = asked, list(questions)
        self.rows_per_step, self.max_seq_len, self.seed = rows_per_step, max_seq_len, seed

    def __len__(self) -> int:
        return len(self.questions)

    def get(self, step: int, which: range | None = None) -> Step:
        rows = which if which is not None else range(self.rows_per_step)
        chosen = [self._question(step * self.rows_per_step + row) for row in rows]
        return Step(self.asked.batch(chosen), [self.asked.texts[question] for question in chosen])

    def _question(self, number: int) -> int:
        epoch, at = divmod(number, len(self.questions))
        return self.questions[shuffled(len(self.questions), self.seed, epoch)[at]]


# --- what answers are worth


def score_answers(written: Sequence[str], right: Sequence[str]) -> dict[str, float]:
    """hits1: the first is one of those that are right; hit: any is; f1 and em: of the two as sets. Compared as whole
    names, normalised as SQuAD's answers are: never as a part of a text."""
    found = dict.fromkeys(normalize_answer(name) for name in written)
    wanted = {normalize_answer(name) for name in right}
    both = len(wanted & found.keys())
    precision, recall = both / max(1, len(found)), both / max(1, len(wanted))
    return {
        "hits1": float(next(iter(found), None) in wanted),
        "hit": float(both > 0),
        "f1": 2 * precision * recall / (precision + recall) if both else 0.0,
        "em": float(found.keys() == wanted),
    }


def answer_all(drag: DRAG, asked: Asked, questions: Sequence[int], max_facts: int = 16_384) -> Iterator[Answer]:
    """Answers to these questions, in their order."""
    drag.retriever.eval()
    drag.generator.train(False)
    for chosen in batches(questions, asked.subgraphs, max_facts, 32):
        batch = asked.batch(chosen).to(drag.generator.device)
        yield from drag.answer(batch, [asked.texts[question] for question in chosen])


def evaluate_drag(drag: DRAG, asked: Asked, questions: Sequence[int]) -> dict[str, float]:
    """Means over these questions: those of score_answers; facts_kept, shown of a question; recall: whether an answer is
    an end of a fact that is shown."""
    rows = []
    for question, answer in zip(questions, answer_all(drag, asked, questions), strict=True):
        one = asked.grounded[question]
        ends = {int(end) for fact in answer.facts for end in (asked.graph.heads[fact], asked.graph.tails[fact])}
        figures = score_answers(answer.answers, one.question.answers)
        rows.append(figures | {"facts_kept": len(answer.facts), "recall": float(bool(ends & set(one.answers)))})
    return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}


class ScaleGradient(torch.autograd.Function):
    """x, whose gradient gets this norm on its way back."""

    @staticmethod
    def forward(ctx, x: Tensor, norm: Tensor) -> Tensor:
        ctx.save_for_backward(norm)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, dx: Tensor):
        (norm,) = ctx.saved_tensors
        return dx * (norm / dx.norm().clamp(min=1e-12)), None
