"""Train a search index on answers: which documents make the right answer likely.

    python -m scripts.joint_train configs/joint_tiny.py --documents data/documents.jsonl --queries data/questions.jsonl

Goes on from an index (scripts.dsi_train) and a model that answers from documents (--source rag). The questions need
answers and no gold documents: the index learns from what its documents do to the answer, by the likelihood marginalised
over its best documents and by policy gradient over documents it draws; --marginal, --policy and --anchor are their
weights, 0 leaves one out. The model that answers learns too with --reader_lr. See docs/deeprag.md.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from nanochat import adamw
from nanochat.checkpoint_manager import checkpoint_root, find_model_tag, load_checkpoint, newest, save_checkpoint
from nanochat.common import UserError, compute_cleanup, compute_init, print0, run_main
from nanochat.config import format_config, load_config
from nanochat.dsi.index import SearchIndex
from nanochat.dsi.joint import Asked, JointConfig, Reader, joint_losses
from nanochat.dsi.queries import DEFAULT_KINDS, PseudoQueries, parse_kinds
from nanochat.dsi.training import PseudoQueryBatches, evaluate_index, found_by_bm25, of_documents
from nanochat.packing import shuffled
from nanochat.retrieval.document import read_documents, read_queries
from nanochat.training import Phase, TrainConfig, autocast, resolve_dtype, rows_per_step
from scripts.dsi_train import show


@dataclass(kw_only=True)
class Config(TrainConfig):
    """Train a search index on answers."""

    documents: list[Path] = field(default_factory=list)
    """Files of the documents that the index knows, separated by commas."""
    queries: list[Path] = field(default_factory=list)
    """Questions with answers to learn from."""
    val_queries: list[Path] = field(default_factory=list)
    """Questions with gold documents, for validation."""
    num_val: int = 500
    """Of these, at most."""
    index_tag: str = ""
    """Tag of the index to start from; by default the one written last."""
    source: str = "rag"
    """Checkpoint of the model that answers."""
    source_tag: str = ""
    """Its tag; by default the one written last."""
    top_k: int = 4
    """marginal: documents that the likelihood is summed over."""
    draws: int = 4
    """policy: documents drawn for a question."""
    marginal: float = 1.0
    """Weight of the marginalised likelihood."""
    policy: float = 1.0
    """Weight of the policy gradient."""
    anchor: float = 1.0
    """Weight of the index's own loss, on pseudo-queries."""
    pseudo_queries: str = DEFAULT_KINDS
    """anchor: kinds with their weights."""
    lr: float = 1e-4
    """AdamW's learning rate of the index."""
    embed_lr: float = 0.01
    """The same of its tables of tokens' vectors (scripts/dsi_train.py)."""
    reader_lr: float = 0.0
    """AdamW's learning rate of the model that answers; 0: it stays as it is."""
    max_doc_length: int = 200
    """Longest document in tokens; the rest is cut."""
    cite: bool = True
    """The model that answers begins with the document's number, "[1] 1904"."""
    max_seq_len: int = 128
    """Tokens of a question with a document, about: total_batch_size / max_seq_len questions are a step."""
    device_batch_size: int = 32
    """Questions in one forward pass on one device."""
    total_batch_size: int = 4096
    """Tokens in one optimizer step."""
    num_steps: int = 300
    """Optimizer steps."""


class QuestionBatches:
    """Questions in an order of their own each epoch, with as many pseudo-queries for the anchor; fixed by the step."""

    def __init__(self, queries: list[dict[str, Any]], pseudo: PseudoQueryBatches, seed: int):
        self.queries, self.pseudo, self.seed = queries, pseudo, seed
        self.rows_per_step, self.max_seq_len = pseudo.rows_per_step, pseudo.max_seq_len

    def get(self, step: int, which: range | None = None) -> Asked:
        rows = which if which is not None else range(self.rows_per_step)
        chosen = [self._query(step * self.rows_per_step + row) for row in rows]
        return Asked([q["query"] for q in chosen], [q["answers"][0] for q in chosen], self.pseudo.get(step, rows))

    def _query(self, number: int) -> dict[str, Any]:
        epoch, at = divmod(number, len(self.queries))
        return self.queries[shuffled(len(self.queries), self.seed, epoch)[at]]


def main() -> None:
    config = load_config(Config)
    print0(format_config(config))
    compute = compute_init(config.device, config.seed)
    if config.policy and config.draws < 2:
        raise UserError(f"--draws {config.draws}: the policy gradient compares draws, it needs 2 or more")
    documents = {document.id: document for path in config.documents for document in read_documents(path)}
    index_tag = find_model_tag("dsi", config.index_tag)
    index = SearchIndex.load(newest(checkpoint_root("dsi", index_tag)), compute.device)
    if missing := [id for id in index.ids.sequences if id not in documents]:
        raise UserError(
            f"--documents lacks {len(missing):,} documents that the index knows, the first is {missing[0]!r}"
        )
    queries = [query for path in config.queries for query in read_queries(path) if query["answers"]]
    if not queries:
        raise UserError("give --queries FILE with questions that have answers")
    val = [query for path in config.val_queries for query in read_queries(path)]
    val = of_documents(val, set(documents))[: config.num_val]
    tag = find_model_tag(config.source, config.source_tag)
    lm, tokenizer, about, _ = load_checkpoint(checkpoint_root(config.source, tag), None, compute.device)
    kept = {"training_config": about["training_config"]} if "training_config" in about else {}
    lm.requires_grad_(config.reader_lr > 0)
    reader = Reader(lm, tokenizer, config.cite, config.max_doc_length)
    settings = JointConfig(config.top_k, config.draws, config.marginal, config.policy, config.anchor)
    dtype, seen = resolve_dtype(config.dtype, compute.device), {}

    def loss(_: Any, batch: Asked) -> torch.Tensor:
        with autocast(compute.device, dtype):
            parts = joint_losses(index, reader, documents.__getitem__, batch, settings)
        seen.update({f"{name}_loss": part.item() / batch.learned for name, part in parts.items()})
        return sum(getattr(config, name) * part for name, part in parts.items())

    rows = rows_per_step(config, compute.world_size)
    known = [documents[id] for id in index.ids.sequences]
    pseudo = PseudoQueries(known, parse_kinds(config.pseudo_queries))
    anchor = PseudoQueryBatches(pseudo, range(len(known)), rows, config.max_seq_len, config.seed)
    phase = Phase("joint", QuestionBatches(queries, anchor, config.seed), config.num_steps, loss=loss)
    phase.figures = lambda: dict(seen)
    run_dir = checkpoint_root("joint", config.model_tag or index_tag)

    def save(directory: Path) -> None:
        index.save(directory)
        save_checkpoint(directory / "reader", 0, lm, tokenizer, kept)  # what it was trained with: how much it can read

    def load(directory: Path) -> None:
        index.model.load_state_dict(SearchIndex.load(directory).model.state_dict())
        lm.load_state_dict(load_checkpoint(directory / "reader", None, compute.device)[0].state_dict())

    parts = {"index": (index.model, config.lr)} | ({"reader": (lm, config.reader_lr)} if config.reader_lr else {})
    evaluate = (lambda: evaluate_index(index, val)) if val else None
    before = evaluate_index(index, val) if val and not config.plan else {}
    learner = adamw.Learner(parts, save, load, rates=dict.fromkeys(index.model.tables, config.embed_lr))
    adamw.train(
        learner, [phase], config, compute, run_dir, evaluate, {"index": index_tag, "reader": f"{config.source}/{tag}"}
    )
    if val and not config.plan:
        show("bm25", found_by_bm25(known, val))
        show("index, before", before)
        show("index, now", evaluate_index(index, val))
    compute_cleanup()


if __name__ == "__main__":
    run_main(main)
