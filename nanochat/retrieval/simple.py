"""TF-IDF with cosine similarity: the plain retriever that needs nothing but NumPy.

A text is a vector over terms: (1 + ln f) * idf for a term that it has f times, idf = 1 + ln((1 + N) / (1 + n)) for a
term that n of N documents have. The score is the cosine of query and document. Salton and Buckley, "Term-weighting
approaches in automatic text retrieval" (1988); the smoothing is scikit-learn's TfidfVectorizer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from nanochat.retrieval.lexical import LexicalRetriever, Terms
from nanochat.retrieval.postings import Postings


class SimpleRetriever(LexicalRetriever):
    type = "simple"

    def __init__(self, sublinear: bool = True, **text: Any):
        """text: how texts become words, see Retriever."""
        self.sublinear = sublinear
        super().__init__(**text)

    def idf(self, n: int, N: int) -> float:
        return 1 + math.log((1 + N) / (1 + n))

    def query_weights(self, idf: Sequence[float], counts: Sequence[int]) -> list[float]:
        damped = [1 + math.log(count) if self.sublinear else count for count in counts]
        weights = [rarity * count for rarity, count in zip(idf, damped, strict=True)]
        length = math.sqrt(sum(weight * weight for weight in weights))
        # the second idf is the document's: the same for all its postings, so it is multiplied in once, here
        return [weight / length * rarity for weight, rarity in zip(weights, idf, strict=True)]

    def posting_weights(self, terms: Terms) -> list[tuple[np.ndarray, np.ndarray]]:
        """One pass over all postings: a document's length as a vector depends on how rare its terms are by now."""
        hashes = np.unique(np.concatenate([part.hashes for part in terms.parts]))
        n = np.zeros(len(hashes), dtype=np.int64)
        for part, (dead, counts) in zip(terms.parts, terms.dead, strict=True):
            place = np.searchsorted(hashes, part.hashes)
            n[place] += np.diff(part.starts)
            n[place[dead]] -= counts
        idf = 1 + np.log((1 + terms.N) / (1 + np.maximum(n, 1)))
        found = []
        for part in terms.parts:
            counts = part.pairs[:, 0]
            table = 1 + np.log(counts) if self.sublinear else counts.astype(np.float64)
            idf_of_posting = np.repeat(idf[np.searchsorted(hashes, part.hashes)], np.diff(part.starts))
            squares = np.bincount(part.rows(), (table[part.codes] * idf_of_posting) ** 2, minlength=len(part.lengths))
            found.append((table, 1 / np.sqrt(np.where(squares > 0, squares, 1))))
        return found

    def largest_weight(self, postings: Postings, term: int, terms: Terms) -> float:
        return math.inf  # it depends on the documents' other words

    def settings(self) -> dict:
        return {**super().settings(), "sublinear": self.sublinear}
