"""From what the retriever knows of a fact to the language model's embeddings: the neural half of a fact's prompt.

Source: Gao et al., "D-RAG: Differentiable Retrieval-Augmented Generation for Knowledge Graph Question Answering" (EMNLP
2025), section 3.3.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class Projector(nn.Module):
    def __init__(self, width: int, model_width: int):
        """width: of the retriever's vectors; model_width: of the embeddings."""
        super().__init__()
        self.hidden = nn.Linear(width, 2 * width)
        self.out = nn.Linear(2 * width, model_width)

    def forward(self, vectors: Tensor) -> Tensor:
        """(..., width) -> (..., model_width), each of root mean square 1, as embeddings of this project are."""
        projected = self.out(F.silu(self.hidden(vectors)))
        return F.rms_norm(projected, projected.shape[-1:])
