"""Our own model as a reranker: it has learned to say from which document an answer comes, so it is asked just that.

A model trained to cite (source "rag") is shown two documents and the question; the likelihoods that its answer begins
with "[1]" or "[2]" say which is better. From the last candidate up, the better of two neighbours goes up; each pass
brings one more to its place: pairwise ranking with sliding passes (Qin et al. 2023, arXiv 2306.17563). For any other
model a document's score is the likelihood of the question after it (Sachan et al. 2022, arXiv 2204.07496).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from nanochat.common import UserError
from nanochat.conversation import render_prompt
from nanochat.retrieval.document import Document
from nanochat.retrieval.lm_encoder import load_own, pad
from nanochat.training import autocast, resolve_dtype


class LMReranker:
    def __init__(self, model: str = "self", device: str | None = None, passes: int = 3, by: str = "auto"):
        """model: self (the newest of source rag), self:SOURCE or self:SOURCE/TAG. passes: over the candidates, each of
        as many forward passes as there are candidates. by: citation, question, or auto: citation if the model was
        trained to cite."""
        if by not in ("auto", "citation", "question"):
            raise UserError(f"by is {by!r}; it must be auto, citation or question")
        self.passes = passes
        self.model, self.tokenizer, meta = load_own(model, "rag", device)
        trained = meta.get("training_config", {})
        cites = bool(trained.get("cite"))
        self.by = by if by != "auto" else "citation" if cites else "question"
        self.max_tokens, self.max_doc_length = trained.get("max_seq_len", 2048), trained.get("max_doc_length", 500)
        ids = [self.tokenizer.encode(f" [{number}]") for number in (1, 2)]
        self._differ = next(at for at, (a, b) in enumerate(zip(*ids, strict=False)) if a != b)
        self._numbers = [of_number[self._differ] for of_number in ids]
        self._before = ids[0][: self._differ]

    @torch.inference_mode()
    def score(self, query: str, documents: Sequence[Document]) -> np.ndarray:
        """(documents,): by question, mean log-likelihoods; by citation, places: as many as there are for the best, 1
        for the last. The documents come in the order in which they were found."""
        with autocast(self.model.device, resolve_dtype("auto", self.model.device)):
            return self._by_question(query, documents) if self.by == "question" else self._by_citation(query, documents)

    def _by_citation(self, query: str, documents: Sequence[Document]) -> np.ndarray:
        order = list(range(len(documents)))
        for done in range(min(self.passes, len(order) - 1)):
            for at in range(len(order) - 1, done, -1):
                if self._second_is_better(query, documents[order[at - 1]], documents[order[at]]):
                    order[at - 1], order[at] = order[at], order[at - 1]
        scores = np.empty(len(order))
        scores[order] = np.arange(len(order), 0, -1)
        return scores

    def _second_is_better(self, query: str, first: Document, second: Document) -> bool:
        prompt = self._prompt(query, [first, second]) + self._before
        logits = self.model(torch.tensor([prompt], device=self.model.device), last_only=True)[0]
        return bool(logits[self._numbers[1]] > logits[self._numbers[0]])

    def _by_question(self, query: str, documents: Sequence[Document]) -> np.ndarray:
        start, end = (self.tokenizer.special_id(f"<|user_{side}|>") for side in ("start", "end"))
        scores = []
        for document in documents:
            ids = self._prompt(query, [document])
            asked = range(ids.index(start) + 1, ids.index(end) + 1)
            tokens, _ = pad([ids[: asked.stop]])
            targets = torch.full_like(tokens, -1)
            targets[0, asked.start - 1 : asked.stop - 1] = tokens[0, asked.start : asked.stop]
            tokens, targets = tokens[:, :-1].to(self.model.device), targets[:, :-1].to(self.model.device)
            scores.append(-float(self.model(tokens, targets)))
        return np.array(scores)

    def _prompt(self, query: str, documents: Sequence[Document]) -> list[int]:
        shown = [document.to_dict(with_score=False) for document in documents]
        messages = [{"role": "retrieval", "documents": shown}, {"role": "user", "content": query}]
        return render_prompt({"messages": messages}, self.tokenizer, self.max_tokens, self.max_doc_length)
