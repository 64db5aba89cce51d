"""BM25 as Lucene computes it, over our own inverted index.

For a term that n of N documents have, in a document of length L that has it f times:

    idf = ln(1 + (N - n + 1/2) / (n + 1/2))
    score = idf * f / (f + k1 * (1 - b + b * L / mean length))

summed over the query's terms. Robertson and Zaragoza, "The Probabilistic Relevance Framework: BM25 and Beyond" (2009);
Lucene's variant as in Kamphuis et al., "Which BM25 Do You Mean?" (2020). The idf is positive always, so a document
scores above zero exactly when it has a term of the query.
"""

from __future__ import annotations

import numpy as np

from nanochat.common import UserError
from nanochat.retrieval.postings import LexicalRetriever


class BM25Retriever(LexicalRetriever):
    type = "bm25"

    def __init__(
        self, k1: float = 1.5, b: float = 0.75, language: str = "english", stem: bool = True, stop_words: bool = True
    ):
        if k1 < 0 or not 0 <= b <= 1:
            raise UserError(f"bm25 with k1={k1}, b={b}; k1 must be at least 0 and b between 0 and 1")
        self.k1, self.b = k1, b
        self.length_norm = np.zeros(0)
        super().__init__(language, stem, stop_words)

    def collection_changed(self) -> None:
        lengths = self.postings.lengths
        total = int(lengths.sum(dtype=np.int64))
        mean_length = total / len(lengths) if total else 1.0
        self.length_norm = self.k1 * (1 - self.b + self.b * lengths / mean_length)

    def query_weights(self, terms: np.ndarray, counts: np.ndarray) -> np.ndarray:
        starts = self.postings.starts
        n = starts[terms + 1] - starts[terms]
        return counts * np.log1p((len(self.postings.lengths) - n + 0.5) / (n + 0.5))

    def posting_weights(self, docs: np.ndarray, counts: np.ndarray) -> np.ndarray:
        return counts / (counts + self.length_norm[docs])

    def settings(self) -> dict:
        return {"k1": self.k1, "b": self.b, **super().settings()}
