"""Dense retrieval: texts as vectors of a sentence-transformers model or of our own, nearest by cosine.

Candidates come from nanochat.retrieval.ann; they are scored again one by one, so that results do not depend on which
index ran, nor on how a matrix product was cut into blocks. Reimers and Gurevych, "Sentence-BERT" (2019).

    N documents, Q queries, D width of an embedding
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import logging
import time
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from nanochat.common import UserError
from nanochat.retrieval import ann
from nanochat.retrieval.collection import Collection, Masks
from nanochat.retrieval.retriever import Retriever
from nanochat.retrieval.segment import Encode, Segment
from nanochat.retrieval.sharding import local_device, sharded

DEFAULT_MODEL = "all-MiniLM-L6-v2"
_SPARE = 16  # candidates beyond top_k, for those that rounding or a tie may have put just outside
_PROBED = 32  # documents that are encoded to see which type is faster
_HALF_BATCH = 16  # texts at a time in bfloat16: what one layer hands to the next should fit a CPU's cache
_ROUNDING = 1e-5  # more than float32 inner products of unit vectors differ between two ways of summing


class DenseRetriever(Retriever):
    type = "dense"

    def __init__(
        self,
        model: str = DEFAULT_MODEL,
        encoder: Any = None,
        device: str | None = None,
        batch_size: int = 64,
        dtype: str = "auto",
        faiss_index: str = "auto",
        faiss_gpu: bool = False,
        **text: Any,
    ):
        """model: of sentence-transformers, by name or folder; or our own, self (the newest that scripts.embed_finetune
        has trained), self:SOURCE or self:SOURCE/TAG. encoder: an object with encode(list of texts) -> array (texts, D),
        in place of it. dtype: float32, bfloat16 or auto, for encoding documents: auto tries which is faster here.
        faiss_gpu: clusters are trained and vectors compared one by one on the GPUs, by faiss-gpu.
        text: see Retriever; every base keeps the words of its documents too."""
        super().__init__(**text)
        if dtype not in ("auto", "float32", "bfloat16"):
            raise UserError(f"dtype is {dtype!r}; it must be auto, float32 or bfloat16")
        if faiss_index not in ann.KINDS:
            raise UserError(f"faiss_index is {faiss_index!r}; it must be one of {', '.join(ann.KINDS)}")
        if encoder is not None:
            model = getattr(encoder, "name", type(encoder).__name__)
        elif Path(model).is_dir():
            model = str(Path(model).resolve())  # so that the knowledge base opens from any working directory
        self.model, self.device, self.batch_size, self.faiss_index = model, device, batch_size, faiss_index
        self.dtype, self.faiss_gpu = dtype, faiss_gpu
        self._given_encoder = encoder
        self._documents_encoder: tuple[Any, int] | None = None  # and how many texts it takes at a time
        self._last_queries: tuple[list[str], np.ndarray] | None = None

    # --- the encoder

    @cached_property
    def encoder(self) -> Any:
        if self._given_encoder is not None:
            return self._given_encoder
        if self.model.partition(":")[0] == "self":
            from nanochat.retrieval.lm_encoder import LMEncoder  # has torch with it

            return LMEncoder(self.model, local_device(self.device), self.dtype)
        advice = "--type bm25, which needs no model"
        return load_model("SentenceTransformer", self.model, local_device(self.device), "embeds texts", advice)

    @property
    def _of_sentence_transformers(self) -> bool:
        return self._given_encoder is None and self.model.partition(":")[0] != "self"

    @cached_property
    def encoder_hash(self) -> str:
        """Tells embedding models apart by what they compute with, whatever they are called and wherever they lie."""
        if not self._of_sentence_transformers:
            return str(getattr(self.encoder, "fingerprint", self.model))
        digest = hashlib.sha256(f"max_seq_length={self.encoder.max_seq_length}".encode())
        for name, tensor in sorted(self.encoder.state_dict().items()):
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(tensor.detach().cpu().float().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def _encode(self, texts: list[str], kind: str, encoder: Any, batch_size: int) -> np.ndarray:
        # models that tell queries from documents (by a prompt) have a method for each
        encode = getattr(encoder, f"encode_{kind}", encoder.encode)
        sizes = {"batch_size": batch_size, "show_progress_bar": False}
        options = sizes if self._of_sentence_transformers else {}
        vectors = np.asarray(encode(texts, **options), dtype=np.float32)
        if vectors.ndim != 2 or len(vectors) != len(texts) or not np.isfinite(vectors).all():
            raise UserError(
                f"the embedding model {self.model!r} gave {vectors.shape} for {len(texts)} texts, or numbers that "
                "are not finite; try another --model"
            )
        lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
        return vectors / np.where(lengths > 0, lengths, 1)

    def encode_queries(self, queries: list[str]) -> np.ndarray:
        last = self._last_queries  # hybrid asks twice for the same queries: to rank, then to score
        if last is None or last[0] != queries:
            last = self._last_queries = (list(queries), self._encode(queries, "query", self.encoder, self.batch_size))
        return last[1]

    def encoding(self) -> Encode:
        if self._given_encoder is not None:
            return self.encode_documents
        return sharded(
            self.encode_documents, {**self.settings(), "device": self.device}
        )  # with what other processes there are

    def encode_documents(self, texts: list[str]) -> np.ndarray:
        if self._of_sentence_transformers and self._documents_encoder is None and len(texts) >= _PROBED:
            self._documents_encoder = _faster(self.encoder, texts[:_PROBED], self.batch_size, self.dtype)
        vectors = self._encode(texts, "document", *(self._documents_encoder or (self.encoder, self.batch_size)))
        for segment in self.documents.segments[:1]:
            if vectors.shape[1] != segment.embeddings.shape[1]:
                raise UserError(
                    f"the embedding model {self.model!r} gives {vectors.shape[1]} numbers a text, the index has "
                    f"{segment.embeddings.shape[1]}; rebuild it"
                )
        return vectors

    # --- searching

    def rank(
        self, documents: Collection, queries: list[str], top_k: int, masks: Masks
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        vectors = self.encode_queries(queries)
        pairs = list(zip(documents.segments, masks, strict=True))
        found = [self._nearest(segment, vectors, top_k + _SPARE, mask) for segment, mask in pairs]
        return [
            self._settle(documents, masks, vector, [of_segment[q] for of_segment in found], top_k)
            for q, vector in enumerate(vectors)
        ]

    def _settle(
        self, documents: Collection, masks: Masks, vector: np.ndarray, found: list[np.ndarray], top_k: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """The best of the candidates, after making sure that no document left outside ties with the last of them."""
        n = top_k + _SPARE
        while True:
            scores = [_exact(s.embeddings, vector, rows) for s, rows in zip(documents.segments, found, strict=True)]
            rows = [first + rows for first, rows in zip(documents.first_rows, found, strict=False)]
            best = documents.best(np.concatenate(rows), np.concatenate(scores), top_k)
            limit = best[1][-1] - _ROUNDING if len(best[1]) == top_k else -np.inf
            short = [at for at, of_part in enumerate(scores) if len(of_part) >= n and of_part.min() >= limit]
            if not short:
                return best
            n *= 4
            for at in short:
                found[at] = self._nearest(documents.segments[at], vector[None], n, masks[at])[0]

    def _nearest(self, segment: Segment, vectors: np.ndarray, n: int, mask: np.ndarray) -> list[np.ndarray]:
        return ann.nearest(self.index_of(segment), segment.embeddings, vectors, n, mask, self.faiss_gpu)

    def score_rows(self, documents: Collection, queries: list[str], rows: list[np.ndarray]) -> list[np.ndarray]:
        found = []
        for vector, of_query in zip(self.encode_queries(queries), rows, strict=True):
            scores = np.zeros(len(of_query))
            for segment, first, places in zip(
                documents.segments, documents.first_rows, documents.split(of_query), strict=False
            ):
                scores[places] = _exact(segment.embeddings, vector, of_query[places] - first)
            found.append(scores)
        return found

    def index_of(self, segment: Segment) -> Any:
        """The segment's FAISS index, read or built when it is first asked for; None: its vectors are few."""
        if ann.kind_for(len(segment), self.faiss_index) == "flat":
            return None
        if segment.faiss is None:
            path = segment.directory / "index.faiss" if segment.directory else None
            if path is not None and path.exists():
                segment.faiss = ann.read(path, segment.embeddings.shape)
            if segment.faiss is None:
                segment.faiss = ann.build(segment.embeddings, self.faiss_index, self.faiss_gpu)
        return segment.faiss

    # --- files

    def embedding_info(self) -> dict[str, Any]:
        segments = self.documents.segments
        dimension = segments[0].embeddings.shape[1] if segments else 0
        return {"model": self.model, "dimension": dimension, "hash": self.encoder_hash}

    def save(self, directory: str | Path) -> None:
        super().save(directory)
        (Path(directory) / "embedding_model.json").write_text(json.dumps(self.embedding_info(), indent=2) + "\n")

    def load(self, directory: str | Path) -> DenseRetriever:
        directory = Path(directory)
        super().load(directory)
        built = json.loads((directory / "embedding_model.json").read_text())
        if len(self.documents) and self.encoder_hash != built["hash"]:
            raise UserError(
                f"{directory} was built with the embedding model {built['model']!r} ({built['hash'][:12]}), not with "
                f"{self.model!r} ({self.encoder_hash[:12]}), and their vectors do not compare; use that, or rebuild"
            )
        return self

    def settings(self) -> dict:
        names = ("model", "batch_size", "dtype", "faiss_index")
        return {**{name: getattr(self, name) for name in names}, **super().settings()}


def _exact(embeddings: np.ndarray, vector: np.ndarray, rows: np.ndarray) -> np.ndarray:
    # row by row: a matrix product may round two equal rows differently
    return np.einsum("nd,d->n", embeddings[rows].astype(np.float64), vector.astype(np.float64))


def _faster(model: Any, texts: list[str], batch_size: int, dtype: str) -> tuple[Any, int]:
    """The model as it is, or a copy in bfloat16, and how many texts it takes at a time."""
    as_it_is = (model, batch_size)
    on_cpu = model.device.type == "cpu"
    if dtype == "float32" or (dtype == "auto" and not on_cpu):
        return as_it_is
    import torch

    half = (copy.deepcopy(model).to(torch.bfloat16), min(batch_size, _HALF_BATCH) if on_cpu else batch_size)
    if dtype == "bfloat16":
        return half
    seconds = {as_it_is: float("inf"), half: float("inf")}
    for _ in range(2):  # the first time does what is done once
        for tried in seconds:
            began = time.perf_counter()
            tried[0].encode(texts, batch_size=tried[1], show_progress_bar=False)
            seconds[tried] = time.perf_counter() - began
    return half if seconds[half] < 0.8 * seconds[as_it_is] else as_it_is


@contextlib.contextmanager
def quiet_imports() -> Iterator[None]:
    """sentence-transformers imports half of what is installed, which has warnings about kernels and deprecations of its
    own, and shows a bar for reading weights from the disk; none of it is about the user's documents."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.suppress(ImportError):
            from transformers.utils.logging import disable_progress_bar

            disable_progress_bar()
        yield
    finally:
        logging.disable(before)


def load_model(class_name: str, model: str, device: str | None, what: str, advice: str) -> Any:
    """A model of sentence-transformers, from this disk if it is there: no network is asked then, and none is waited
    for. UserError says what is missing and, with `advice`, what works without it."""
    with quiet_imports():
        try:
            import sentence_transformers
        except ImportError:
            raise UserError(
                f'sentence-transformers is missing, which {what}; pip install "nanochat[dense]", or from a checkout '
                f'pip install -e ".[dense]" (without it: {advice})'
            ) from None
        load = getattr(sentence_transformers, class_name)
        with contextlib.suppress(Exception):
            return load(model, device=device, local_files_only=True)
        try:
            return load(model, device=device)
        except (OSError, ValueError, RuntimeError) as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise UserError(
                f"the model {model!r}, which {what}, cannot be loaded ({reason}); give the folder of one, or without "
                f"it: {advice}"
            ) from None
