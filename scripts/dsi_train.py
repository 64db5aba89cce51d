"""Train a search index: a model that answers a query with a document's id.

    python -m scripts.dsi_train configs/dsi_tiny.py --documents data/my_documents.jsonl
    python -m scripts.dsi_train configs/dsi_tiny.py --documents data/my_documents.jsonl --add data/new_documents.jsonl
    python -m nanochat.retrieval build --documents data/my_documents.jsonl --output data/my_kb --type dsi --index FOLDER

What it learns from are pseudo-queries: words and pieces of each document, and written questions where there are some.
Beginnings of documents alone (--pseudo_queries prefix:1) are learned by heart and find little. --add goes on from a
trained index with new documents, with some of the old ones in each step, and says what was forgotten. Tay et al.,
"Transformer Memory as a Differentiable Search Index" (NeurIPS 2022); see docs/deeprag.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from nanochat import adamw
from nanochat.checkpoint_manager import checkpoint_root, find_model_tag, load_checkpoint, newest
from nanochat.common import Compute, UserError, compute_cleanup, compute_init, print0, run_main
from nanochat.config import format_config, load_config
from nanochat.dsi.index import SearchIndex
from nanochat.dsi.model import LMIndex, T5Index
from nanochat.dsi.queries import DEFAULT_KINDS, PseudoQueries, parse_kinds
from nanochat.dsi.training import (
    Pairs,
    PseudoQueryBatches,
    evaluate_index,
    found_by_bm25,
    index_loss,
    of_documents,
)
from nanochat.optim import Optimizers
from nanochat.retrieval.document import Document, read_documents, read_queries
from nanochat.tokenizer import Tokenizer
from nanochat.training import Phase, TrainConfig, autocast, resolve_dtype, rows_per_step


@dataclass(kw_only=True)
class Config(TrainConfig):
    """Train a search index."""

    documents: list[Path] = field(default_factory=list)
    """Files of documents, separated by commas."""
    queries: list[Path] = field(default_factory=list)
    """Written questions with gold documents, as pseudo-queries of kind questions."""
    val_queries: list[Path] = field(default_factory=list)
    """Questions with gold documents, for validation."""
    num_val: int = 500
    """Of these, at most."""
    add: list[Path] = field(default_factory=list)
    """Files of new documents: go on from the trained index --source_tag."""
    source_tag: str = ""
    """Tag of that index; by default the one written last."""
    rehearsal: float = 0.5
    """add: share of each step that is about the documents before."""
    model: str = "t5"
    """t5: a small T5 of random weights; lm: the same of this project's kind; t5:PATH: a T5 of transformers, a folder or
    a name on the hub; lm:SOURCE: this project's checkpoint of that source (base, mid, rag)."""
    scheme: Literal["atomic", "naive", "semantic", "title"] = "atomic"
    """What documents are called: a token each, their number, their place in a tree of clusters, their title."""
    branches: int = 10
    """semantic: of the tree, and documents of a leaf."""
    width: int = 256
    """Of a new model."""
    layers: int = 1
    """Of a new T5's encoder, and of its decoder."""
    block_pattern: str = "MTMT"
    """Of a new lm."""
    vocab_size: int = 8192
    """Tokens of text of a new model; their tokenizer is trained on the documents."""
    pseudo_queries: str = DEFAULT_KINDS
    """Kinds with their weights: prefix, spans, keywords, titles, questions."""
    noise: int = 8
    """Words from anywhere among keywords, titles and spans, at most."""
    lr: float = 3e-4
    """t5: AdamW's learning rate."""
    embed_lr: float = 0.05
    """The same of the tables of tokens' vectors, which are about 1 where they are new: a rate that suits the other
    weights hardly moves them. For a trained model (t5:PATH, lm:SOURCE) it is high: --init_lr_frac .1 or less."""
    matrix_lr: float = 0.003
    """lm: Muon's; lm's other rates are embed_lr, head_lr and scalar_lr."""
    head_lr: float = 0.02
    """lm: of the output layer."""
    max_seq_len: int = 64
    """Tokens of a query, at most."""
    device_batch_size: int = 64
    """Queries in one forward pass on one device."""
    total_batch_size: int = 4096
    """Tokens in one optimizer step: total_batch_size / max_seq_len queries."""
    num_steps: int = 2000
    """Optimizer steps."""


def new_index(config: Config, documents: Sequence[Document], compute: Compute) -> SearchIndex:
    kind, _, path = config.model.partition(":")
    if kind not in ("t5", "lm"):
        raise UserError(f"--model {config.model!r}: write t5, lm, t5:PATH or lm:SOURCE")
    if kind == "lm" and path:
        lm, tokenizer, _, _ = load_checkpoint(checkpoint_root(path, find_model_tag(path, "")), None, compute.device)
        model: Any = LMIndex(lm)
    elif path:
        model, tokenizer = T5Index.load(path)
    else:
        texts = (f"{document.title}\n{document.content}" for document in documents)
        tokenizer = Tokenizer.train(texts, config.vocab_size)
        size, width = tokenizer.vocab_size, config.width
        lm = kind == "lm"
        model = LMIndex.new(size, config.block_pattern, width) if lm else T5Index.new(size, width, config.layers)
    index = SearchIndex.new(documents, tokenizer, model, config.scheme, config.branches, config.seed)
    index.text.max_tokens = config.max_seq_len
    index.model.to(compute.device)
    return index


def show(name: str, figures: dict[str, float]) -> None:
    print0(f"{name:24} " + ", ".join(f"{key} {value:.3f}" for key, value in figures.items()))


def main() -> None:
    config = load_config(Config)
    print0(format_config(config))
    compute = compute_init(config.device, config.seed)
    documents = [document for path in config.documents for document in read_documents(path)]
    if not documents:
        raise UserError("give --documents FILE" + " (those that the index has are rehearsed)" * bool(config.add))
    known = {document.id for document in documents}
    new = [document for path in config.add for document in read_documents(path) if document.id not in known]
    everything = [*documents, *new]
    val = [query for path in config.val_queries for query in read_queries(path)]
    ids = {document.id for document in everything}
    val = of_documents(val, ids)[: config.num_val]
    if config.add:
        tag = find_model_tag("dsi", config.source_tag)
        index = SearchIndex.load(newest(checkpoint_root("dsi", tag)), compute.device)
        before = evaluate_index(index, of_documents(val, known)) if of_documents(val, known) else {}
        added = index.add(new)
        print0(f"{len(added):,} new documents, {len(index):,} in all")
    else:
        index = new_index(config, documents, compute)
        tag = config.model_tag or f"{config.model.split(':')[0]}_{config.scheme}"
    questions = [query for path in config.queries for query in read_queries(path)]
    pseudo = PseudoQueries(everything, parse_kinds(config.pseudo_queries), questions, config.noise)
    rows = rows_per_step(config, compute.world_size)
    at = range(len(everything))
    learned, rehearsed = (list(at[len(documents) :]), list(at[: len(documents)])) if config.add else (list(at), [])
    if not learned:
        raise UserError("--add: the index has all of these documents")
    batches = PseudoQueryBatches(pseudo, learned, rows, config.max_seq_len, config.seed, rehearsed, config.rehearsal)
    dtype = resolve_dtype(config.dtype, compute.device)

    def loss(_: Any, batch: Pairs) -> torch.Tensor:
        with autocast(compute.device, dtype):
            return index_loss(index, batch)

    phase = Phase("index", batches, config.num_steps, loss=loss)
    run_dir = checkpoint_root("dsi", (config.model_tag or f"{tag}_added") if config.add else tag)

    def load(directory: Path) -> None:
        index.model.load_state_dict(SearchIndex.load(directory).model.state_dict())

    evaluate = (lambda: evaluate_index(index, val)) if val else None
    learner = adamw.Learner({"index": (index.model, config.lr)}, index.save, load, "queries")
    if isinstance(index.model, LMIndex):
        rates = (config.matrix_lr, config.embed_lr, config.head_lr, config.scalar_lr, config.weight_decay)
        learner.optimizers = Optimizers(index.model.lm, *rates)
    else:
        learner.rates = dict.fromkeys(index.model.tables, config.embed_lr)
    adamw.train(learner, [phase], config, compute, run_dir, evaluate, {"documents": len(index)})
    if val and not config.plan:  # every rank, or one would leave the others waiting
        show("bm25, all documents", found_by_bm25(everything, val))
        show("index, all documents", evaluate_index(index, val))
    if val and config.add and not config.plan:
        show("old documents, before", before)
        for name, which in (("old documents, now", known), ("new documents", ids - known)):
            if asked := of_documents(val, which):
                show(name, evaluate_index(index, asked))
    compute_cleanup()


if __name__ == "__main__":
    run_main(main)
