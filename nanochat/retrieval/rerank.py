"""A second look at the best candidates: a cross-encoder reads query and document together (Nogueira and Cho 2019).

Far slower than any index (milliseconds a document), so it sees some dozens of candidates, and decides their order.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from nanochat.common import UserError
from nanochat.retrieval.dense import load_model
from nanochat.retrieval.document import Document


class CrossEncoderReranker:
    def __init__(self, model: str, device: str | None = None, batch_size: int = 32):
        """model: a sentence-transformers cross-encoder, by name or folder."""
        self.model, self.batch_size = model, batch_size
        self._encoder = load_model("CrossEncoder", model, device, "orders documents anew", "leave --rerank out")

    def score(self, query: str, documents: Sequence[Document]) -> np.ndarray:
        """(documents,) how well each answers the query; the scale is the model's own."""
        pairs = [(query, f"{document.title}\n{document.content}".strip()) for document in documents]
        scores = np.asarray(self._encoder.predict(pairs, batch_size=self.batch_size, show_progress_bar=False))
        scores = scores.astype(np.float64)
        if scores.shape != (len(pairs),) or not np.isfinite(scores).all():
            raise UserError(
                f"the reranker {self.model!r} gave {scores.shape} for {len(pairs)} pairs; it must be a cross-encoder "
                "with one finite score for a pair"
            )
        return scores
