"""Dense retrieval: texts as vectors of a sentence-transformers model, nearest by cosine, exact search.

FAISS (Flat, inner product) finds the nearest vectors where it is installed, a NumPy matrix product where it is not.
Both give candidates only: these are scored again one by one, so that results do not depend on which of them ran, nor on
how a matrix product was cut into blocks. Reimers and Gurevych, "Sentence-BERT" (2019); Douze et al., "The Faiss
library" (2024).

    N documents, Q queries, D width of an embedding
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from nanochat.common import UserError
from nanochat.retrieval.document import Document
from nanochat.retrieval.retriever import Retriever, best_rows
from nanochat.retrieval.store import load_array

DEFAULT_MODEL = "all-MiniLM-L6-v2"
_SPARE = 16  # candidates beyond top_k, for those that rounding or a tie may have put just outside
_ROUNDING = 1e-5  # more than float32 inner products of unit vectors differ between two ways of summing


class DenseRetriever(Retriever):
    type = "dense"

    def __init__(
        self, model: str = DEFAULT_MODEL, encoder: Any = None, device: str | None = None, batch_size: int = 64
    ):
        """encoder: an object with encode(list of texts) -> array (texts, D), not a sentence-transformers model."""
        super().__init__()
        if encoder is not None:
            model = getattr(encoder, "name", type(encoder).__name__)
        elif Path(model).is_dir():
            model = str(Path(model).resolve())  # so that the knowledge base opens from any working directory
        self.model, self.device, self.batch_size = model, device, batch_size
        self._given_encoder = encoder
        self.embeddings = np.zeros((0, 0), dtype=np.float32)  # (N, D), unit length
        self._faiss_index: Any = None
        self._last_queries: tuple[list[str], np.ndarray] | None = None

    # --- the encoder

    @cached_property
    def encoder(self) -> Any:
        if self._given_encoder is not None:
            return self._given_encoder
        return _load_sentence_transformer(self.model, self.device)

    @cached_property
    def encoder_hash(self) -> str:
        """Tells embedding models apart by what they compute with, whatever they are called and wherever they lie."""
        if self._given_encoder is not None:
            return str(getattr(self.encoder, "fingerprint", self.model))
        digest = hashlib.sha256(f"max_seq_length={self.encoder.max_seq_length}".encode())
        for name, tensor in sorted(self.encoder.state_dict().items()):
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(tensor.detach().cpu().float().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def _encode(self, texts: list[str], kind: str) -> np.ndarray:
        # models that tell queries from documents (by a prompt) have a method for each
        encode = getattr(self.encoder, f"encode_{kind}", self.encoder.encode)
        options = {} if self._given_encoder is not None else {"batch_size": self.batch_size, "show_progress_bar": False}
        vectors = np.asarray(encode(texts, **options), dtype=np.float32)
        if vectors.ndim != 2 or len(vectors) != len(texts) or not np.isfinite(vectors).all():
            raise UserError(
                f"the embedding model {self.model!r} gave {vectors.shape} for {len(texts)} texts, or numbers that "
                "are not finite; try another --model"
            )
        lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
        return vectors / np.where(lengths > 0, lengths, 1)

    def _encode_queries(self, queries: list[str]) -> np.ndarray:
        last = self._last_queries  # hybrid asks twice for the same queries: to rank, then to score
        if last is None or last[0] != queries:
            last = self._last_queries = (list(queries), self._encode(queries, "query"))
        return last[1]

    # --- searching

    def rank(self, queries: list[str], top_k: int) -> list[tuple[np.ndarray, np.ndarray]]:
        vectors = self._encode_queries(queries)
        candidates = self._nearest(vectors, top_k + _SPARE)
        return [self._settle(vector, rows, top_k) for vector, rows in zip(vectors, candidates, strict=True)]

    def _settle(self, vector: np.ndarray, rows: np.ndarray, top_k: int) -> tuple[np.ndarray, np.ndarray]:
        """The best of the candidates, after making sure that no document left outside ties with the last of them."""
        while True:
            scores = self._exact(vector, rows)
            best = best_rows(rows, scores, top_k, self.documents.id_rank)
            if len(rows) == len(self.embeddings) or scores.min() < best[1][-1] - _ROUNDING:
                return best
            rows = self._nearest(vector[None], 4 * len(rows))[0]

    def _nearest(self, vectors: np.ndarray, n: int) -> np.ndarray:
        """(Q, n) rows of the n nearest documents, in no order."""
        n = min(n, len(self.embeddings))
        if n == len(self.embeddings):
            return np.broadcast_to(np.arange(n), (len(vectors), n))
        if self._index is not None:
            return self._index.search(vectors, n)[1]
        block = max(1, 32_000_000 // len(self.embeddings))  # queries at a time: scores for one block take 128 MB
        parts = [
            np.argpartition(vectors[start : start + block] @ self.embeddings.T, -n, axis=1)[:, -n:]
            for start in range(0, len(vectors), block)
        ]
        return np.concatenate(parts)

    def _exact(self, vector: np.ndarray, rows: np.ndarray) -> np.ndarray:
        # row by row: a matrix product may round two equal rows differently
        return np.einsum("nd,d->n", self.embeddings[rows].astype(np.float64), vector.astype(np.float64))

    def score_rows(self, queries: list[str], rows: list[np.ndarray]) -> list[np.ndarray]:
        return [
            self._exact(vector, of_query) for vector, of_query in zip(self._encode_queries(queries), rows, strict=True)
        ]

    @property
    def _index(self) -> Any:
        if self._faiss_index is None:
            try:
                import faiss
            except ImportError:
                return None
            index = faiss.IndexFlatIP(self.embeddings.shape[1])
            index.add(np.ascontiguousarray(self.embeddings))
            self._faiss_index = index
        return self._faiss_index

    # --- changing

    def prepare(self, documents: Iterable[Document]) -> np.ndarray:
        vectors = self._encode([f"{document.title}\n{document.content}".strip() for document in documents], "document")
        if len(self.embeddings) and vectors.shape[1] != self.embeddings.shape[1]:
            raise UserError(
                f"the embedding model {self.model!r} gives {vectors.shape[1]} numbers a text, the index has "
                f"{self.embeddings.shape[1]}; rebuild it"
            )
        return vectors

    def append_index(self, prepared: np.ndarray) -> None:
        self.embeddings = np.concatenate([self.embeddings, prepared]) if len(self.embeddings) else prepared
        self._faiss_index = None

    def keep_index(self, mask: np.ndarray) -> None:
        self.embeddings = self.embeddings[mask]
        self._faiss_index = None

    # --- files

    def embedding_info(self) -> dict[str, Any]:
        return {"model": self.model, "dimension": self.embeddings.shape[1], "hash": self.encoder_hash}

    def save_index(self, directory: Path) -> None:
        np.save(directory / "embeddings.npy", self.embeddings)
        (directory / "embedding_model.json").write_text(json.dumps(self.embedding_info(), indent=2) + "\n")
        if len(self.embeddings) and self._index is not None:
            import faiss

            faiss.write_index(self._index, str(directory / "index.faiss"))

    def load_index(self, directory: Path) -> None:
        built = json.loads((directory / "embedding_model.json").read_text())
        self.embeddings = load_array(directory / "embeddings.npy")
        if self.embeddings.shape != (len(self.documents), built["dimension"]):
            raise ValueError(f"{directory / 'embeddings.npy'} does not fit the documents")
        if len(self.embeddings) and self.encoder_hash != built["hash"]:
            raise UserError(
                f"{directory} was built with the embedding model {built['model']!r} ({built['hash'][:12]}), not with "
                f"{self.model!r} ({self.encoder_hash[:12]}), and their vectors do not compare; use that, or rebuild"
            )
        path = directory / "index.faiss"
        if path.exists():
            try:
                import faiss
            except ImportError:
                return
            try:
                self._faiss_index = faiss.read_index(str(path))
            except RuntimeError as error:
                raise ValueError(f"{path}: {error}") from None
            if (self._faiss_index.ntotal, self._faiss_index.d) != self.embeddings.shape:
                raise ValueError(f"{path} does not fit embeddings.npy")

    def settings(self) -> dict:
        return {"model": self.model, "batch_size": self.batch_size}


def _load_sentence_transformer(model: str, device: str | None) -> Any:
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError:
        raise UserError(
            'sentence-transformers is missing, which embeds texts; pip install "nanochat[dense]", or from a checkout '
            'pip install -e ".[dense]" (without it: the retriever types simple and bm25)'
        ) from None
    with contextlib.suppress(Exception):  # on this disk already: no network is asked, and none is waited for
        return SentenceTransformer(model, device=device, local_files_only=True)
    try:
        return SentenceTransformer(model, device=device)
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"the embedding model {model!r} cannot be loaded ({reason}); give a model's folder with --model, "
            "or use --type bm25, which needs none"
        ) from None
