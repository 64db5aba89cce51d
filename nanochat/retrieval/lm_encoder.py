"""Our own model as the encoder of dense retrieval: a text's embedding is the mean of its states after the last norm.

Any checkpoint gives embeddings; useful ones come from scripts.embed_finetune. Queries and documents stand between the
markers that searches and documents have in conversations, by which the model tells them apart.

    B texts, L tokens, D model width
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat.checkpoint_manager import load_model
from nanochat.model.lm import HybridLM
from nanochat.tokenizer import Tokenizer
from nanochat.training import autocast, resolve_dtype

MARKERS = {"query": ("<|search_start|>", "<|search_end|>"), "document": ("<|doc_start|>", "<|doc_end|>")}


def load_own(model: str, default: str, device: str | None = None) -> tuple[HybridLM, Tokenizer, dict[str, Any]]:
    """The checkpoint that self, self:SOURCE or self:SOURCE/TAG means; self alone is the newest of source `default`."""
    source, _, tag = (model.partition(":")[2] or default).partition("/")
    return load_model(source, device or ("cuda" if torch.cuda.is_available() else "cpu"), model_tag=tag)


def render_text(tokenizer: Tokenizer, text: str, kind: str, max_tokens: int) -> list[int]:
    """The ids of a query or a document, cut to max_tokens."""
    start, end = map(tokenizer.special_id, MARKERS[kind])
    ids = tokenizer.encode(f" {text.strip()}")[: max(0, max_tokens - 3)]
    return [tokenizer.special_id("<|bos|>"), start, *ids, end]


def pad(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """(tokens (B, L), lengths (B,)), padded on the right, where a causal model does not look."""
    lengths = torch.tensor([len(row) for row in rows])
    tokens = torch.zeros(len(rows), int(lengths.max()), dtype=torch.long)
    for row, ids in zip(tokens, rows, strict=True):
        row[: len(ids)] = torch.tensor(ids)
    return tokens, lengths


def embed(model: HybridLM, tokens: Tensor, lengths: Tensor) -> Tensor:
    """(B, D) unit vectors: the means of the states of each row's tokens."""
    states = model(tokens, states=True).float()
    real = torch.arange(tokens.shape[1], device=tokens.device) < lengths.unsqueeze(1)
    return F.normalize((states * real.unsqueeze(-1)).sum(1) / lengths.unsqueeze(1), dim=-1)


@torch.inference_mode()
def encode_texts(
    model: HybridLM,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    kind: str,
    max_tokens: int,
    dtype: torch.dtype = torch.float32,
    tokens_at_once: int = 8192,
) -> np.ndarray:
    """(texts, D) unit vectors. tokens_at_once: of one forward pass, padding included."""
    rows = [render_text(tokenizer, text, kind, max_tokens) for text in texts]
    vectors = np.empty((len(rows), model.config.d_model), dtype=np.float32)
    order = sorted(range(len(rows)), key=lambda at: len(rows[at]))  # so that little is padding
    start = 0
    while start < len(order):
        end = start + 1
        while end < len(order) and (end + 1 - start) * len(rows[order[end]]) <= tokens_at_once:
            end += 1
        tokens, lengths = pad([rows[at] for at in order[start:end]])
        with autocast(model.device, dtype):
            of_some = embed(model, tokens.to(model.device), lengths.to(model.device))
        vectors[order[start:end]] = of_some.float().cpu().numpy()
        start = end
    return vectors


class LMEncoder:
    """What DenseRetriever wants of an encoder."""

    def __init__(self, model: str = "self", device: str | None = None, dtype: str = "auto", tokens_at_once: int = 8192):
        """model: self (the newest of source embed), self:SOURCE or self:SOURCE/TAG. tokens_at_once: see
        encode_texts."""
        self.name, self.tokens_at_once = model, tokens_at_once
        self.model, self.tokenizer, meta = load_own(model, "embed", device)
        self.dtype = resolve_dtype(dtype, self.model.device)
        trained = meta.get("training_config", {})
        self.max_tokens = {
            "query": trained.get("max_query_tokens", 128),
            "document": trained.get("max_document_tokens", trained.get("max_seq_len", 512)),
        }

    @property
    def fingerprint(self) -> str:
        """Of the weights and of how texts are cut."""
        digest = hashlib.sha256(f"{self.max_tokens} {self.tokenizer.fingerprint}".encode())
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(f"{name} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def encode_query(self, texts: list[str]) -> np.ndarray:
        return self._encode(texts, "query", torch.float32)

    def encode_document(self, texts: list[str]) -> np.ndarray:
        return self._encode(texts, "document", self.dtype)

    encode = encode_document

    def _encode(self, texts: list[str], kind: str, dtype: torch.dtype) -> np.ndarray:
        limit = self.max_tokens[kind]
        return encode_texts(self.model, self.tokenizer, texts, kind, limit, dtype, self.tokens_at_once)
