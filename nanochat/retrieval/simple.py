"""TF-IDF with cosine similarity: the plain retriever that needs nothing but NumPy.

A text is a vector over terms: (1 + ln f) * idf for a term that it has f times, idf = 1 + ln((1 + N) / (1 + n)) for a
term that n of N documents have. The score is the cosine of query and document. Salton and Buckley, "Term-weighting
approaches in automatic text retrieval" (1988); the smoothing is scikit-learn's TfidfVectorizer.
"""

from __future__ import annotations

import numpy as np

from nanochat.retrieval.postings import LexicalRetriever


class SimpleRetriever(LexicalRetriever):
    type = "simple"

    def __init__(self, language: str = "english", stem: bool = True, stop_words: bool = True, sublinear: bool = True):
        self.sublinear = sublinear
        self.norms = np.zeros(0)
        super().__init__(language, stem, stop_words)

    def collection_changed(self) -> None:
        postings = self.postings
        idf = np.repeat(self._idf(np.arange(len(postings.terms))), np.diff(postings.starts))
        squares = (self._damped(postings.counts) * idf) ** 2
        self.norms = np.sqrt(np.bincount(postings.docs, squares, minlength=len(postings.lengths)))

    def _idf(self, terms: np.ndarray) -> np.ndarray:
        starts = self.postings.starts
        n = starts[terms + 1] - starts[terms]
        return 1 + np.log((1 + len(self.postings.lengths)) / (1 + n))

    def _damped(self, counts: np.ndarray) -> np.ndarray:
        return 1 + np.log(counts, dtype=np.float64) if self.sublinear else counts.astype(np.float64)

    def query_weights(self, terms: np.ndarray, counts: np.ndarray) -> np.ndarray:
        idf = self._idf(terms)
        weights = self._damped(counts) * idf
        # the second idf is the document's: the same for all its postings, so it is multiplied in once, here
        return weights / np.sqrt(np.sum(weights**2)) * idf

    def posting_weights(self, docs: np.ndarray, counts: np.ndarray) -> np.ndarray:
        return self._damped(counts) / self.norms[docs]

    def settings(self) -> dict:
        return {**super().settings(), "sublinear": self.sublinear}
