"""What an index is trained on: for each document, texts that it should be found by.

    prefix    its beginning. With this alone an index learns its documents by heart and finds few by questions
    spans     pieces of it, from anywhere
    keywords  some of its words, those that few documents have more often, in their order: like a search
    titles    its title, and before or behind it keywords: what is asked about is mostly called by its name
    questions written ones, where there are some (--queries)

Source: Zhuang et al., "Bridging the Gap Between Indexing and Retrieval for Differentiable Search Index with Query
Generation" (2022, arXiv 2206.10128), who write the queries with a model.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from nanochat.common import UserError
from nanochat.retrieval.analysis import Analyzer
from nanochat.retrieval.document import Document

DEFAULT_KINDS = "titles:3,keywords:2,spans:1,questions:4"
KINDS = ("prefix", "spans", "keywords", "titles", "questions")
PREFIX_WORDS, SPAN_WORDS, KEYWORDS, BESIDE_TITLE = 32, (6, 24), (2, 12), (0, 4)
NOISE_SHARE = 0.7  # of keywords, titles and spans
_WORD = re.compile(r"\w[\w'’-]*")


def parse_kinds(text: str) -> dict[str, float]:
    """Kinds with their weights, from "keywords:2,spans:1"; one without a weight has 1."""
    kinds = {}
    for part in filter(None, text.split(",")):
        kind, _, weight = part.partition(":")
        try:
            kinds[kind.strip()] = float(weight or 1)
        except ValueError:
            raise UserError(f"pseudo-queries {text!r}: {part!r} is not KIND:WEIGHT") from None
    return kinds


class PseudoQueries:
    """kinds: how often each is drawn, "spans:1,keywords:2"; questions are drawn only for documents that have some.
    noise: words from anywhere in the documents, at most so many, among most keywords, titles and spans: questions have
    words that their document lacks, and an index has to learn to look past them."""

    def __init__(
        self,
        documents: Sequence[Document],
        kinds: dict[str, float],
        questions: Sequence[dict[str, Any]] = (),
        noise: int = 8,
    ):
        if unknown := [kind for kind in kinds if kind not in KINDS]:
            raise UserError(f"no kind of pseudo-query {unknown[0]!r}; use {', '.join(KINDS)}")
        if not kinds or min(kinds.values()) < 0 or not sum(kinds.values()):
            raise UserError(f"pseudo-queries need kinds with weights, like {DEFAULT_KINDS}")
        self.documents, self.kinds, self.noise = list(documents), kinds, noise
        self.questions: dict[str, list[str]] = {}
        for query in questions:
            for id in query["doc_ids"][:1]:
                self.questions.setdefault(id, []).append(query["query"])
        self._titles = [_WORD.findall(document.title) for document in documents]
        self._words = [
            title + _WORD.findall(document.content) for title, document in zip(self._titles, documents, strict=True)
        ]
        self._all = [word for words in self._words for word in words]
        self._weights = self._rarity() if {"keywords", "titles"} & kinds.keys() else []

    def _rarity(self) -> list[np.ndarray]:
        """For each document the chance of its words as keywords: by their idf; stop words never, but where a document
        has no others."""
        analyzer = Analyzer("english", True, True)
        terms: dict[str, str] = {}
        for words in self._words:
            for word in words:
                if word not in terms:
                    terms[word] = " ".join(analyzer.terms(word))
        counts = Counter(term for words in self._words for term in {terms[word] for word in words})
        weights = []
        for words in self._words:
            idf = [np.log((1 + len(self._words)) / counts[terms[w]]) if terms[w] else 0.0 for w in words]
            weight = np.array(idf) + (0 if any(idf) else 1)
            weights.append(weight / max(weight.sum(), 1e-9))
        return weights

    def draw(self, document: int, rng: np.random.Generator) -> str:
        """A text for the document at this place."""
        asked = self.questions.get(self.documents[document].id, [])
        kinds = {kind: weight for kind, weight in self.kinds.items() if weight and (asked or kind != "questions")}
        chances = np.array(list(kinds.values()))
        # spans where there are questions alone, and none of this document
        kind = str(rng.choice(list(kinds), p=chances / chances.sum())) if kinds else "spans"
        words = self._words[document]
        if kind == "questions":
            return asked[int(rng.integers(len(asked)))]
        if not words:
            return self.documents[document].content[:200]
        if kind == "prefix":
            return " ".join(words[:PREFIX_WORDS])
        if kind == "spans":
            length = int(rng.integers(*SPAN_WORDS))
            start = int(rng.integers(max(1, len(words) - length + 1)))
            chosen = words[start : start + length]
        elif kind == "titles" and (title := self._titles[document]):
            keywords = self._keywords(document, rng, BESIDE_TITLE, len(title))
            chosen = title + keywords if rng.random() < 0.5 else keywords + title
        else:
            chosen = self._keywords(document, rng, KEYWORDS)
        if rng.random() < NOISE_SHARE:
            for _ in range(int(rng.integers(self.noise + 1))):
                chosen.insert(int(rng.integers(len(chosen) + 1)), self._all[int(rng.integers(len(self._all)))])
        return " ".join(chosen)

    def _keywords(
        self, document: int, rng: np.random.Generator, at_least_below: tuple[int, int], begin: int = 0
    ) -> list[str]:
        """Words of the document from this place on, rare ones more often, in their order; how many: at least, below."""
        words, weight = self._words[document][begin:], self._weights[document][begin:]
        count = min(int(rng.integers(*at_least_below)), int((weight > 0).sum()))
        if not count:
            return []
        return [words[at] for at in sorted(rng.choice(len(words), count, replace=False, p=weight / weight.sum()))]
