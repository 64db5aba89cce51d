"""Make our own model an encoder for dense retrieval: questions near their documents. Its checkpoints are of source
"embed", which --model self means.

    python -m scripts.embed_finetune --knowledge_base data/rag_examples/knowledge_base \
        --queries data/rag_examples/queries/train.jsonl --val_queries data/rag_examples/queries/val.jsonl
    python -m nanochat.retrieval index --type hybrid --model self --knowledge_base data/rag_examples/knowledge_base

Every query of a batch has the documents of all others as negatives, and documents that the knowledge base finds for it
and that are not its own (tasks/contrastive.py).
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from nanochat.checkpoint_manager import checkpoint_root, find_model_tag, load_checkpoint
from nanochat.common import UserError, compute_cleanup, compute_init, print0, run_main
from nanochat.config import format_config, load_config
from nanochat.model.lm import HybridLM
from nanochat.retrieval import RetrievalManager
from nanochat.retrieval.document import read_queries
from nanochat.retrieval.lm_encoder import encode_texts
from nanochat.retrieval.segment import dense_text
from nanochat.tokenizer import Tokenizer
from nanochat.training import Phase, TrainConfig, resolve_dtype, train
from tasks.contrastive import PairBatches, contrastive_loss


@dataclass(kw_only=True)
class Config(TrainConfig):
    """Fine-tune a model to embed questions near the documents that answer them."""

    knowledge_base: Path
    """Directory of the knowledge base that holds the questions' documents."""
    queries: list[Path] = field(default_factory=list)
    """Question files (queries/train.jsonl), separated by commas."""
    val_queries: Path | None = None
    """Questions for validation; by default a tenth of the queries, at most 500, is held out."""
    source: str = "mid"
    """Checkpoint to start from: base, mid, rag or embed."""
    retriever_type: str = "bm25"
    """What finds the hard negatives: simple, bm25, dense or hybrid."""
    hard_negatives: int = 1
    """Of each query; 0: only the documents of the other queries in the batch."""
    mined: int = 30
    """Hard negatives are drawn from so many of the best."""
    temperature: float = 0.05
    """Divides the cosines."""
    max_query_tokens: int = 64
    """A longer query is cut."""
    max_document_tokens: int = 256
    """A longer document is cut."""
    batch_queries: int = 64
    """Queries of one step, over all devices."""
    device_batch_size: int = 64
    """Queries in one forward pass on one device, which are each other's negatives."""
    matrix_lr: float = 0.005
    """Muon's learning rate for the matrices inside blocks."""
    warmup_steps: int = 20
    """Steps of rising learning rate."""


def recall(
    model: HybridLM, tokenizer: Tokenizer, queries: list[dict], manager: RetrievalManager, config: Config
) -> dict[str, float]:
    """recall@1 and @5 of the queries over their own gold documents and the hard negatives of all: fewer than in the
    whole base, so that it is for comparing steps; bench.retrieval measures the base."""
    model.eval()
    found = manager.search([query["query"] for query in queries], 5)
    ids = sorted({id for query in queries for id in query["doc_ids"]} | {d.id for hits in found for d in hits})
    dtype = resolve_dtype(config.dtype, model.device)
    texts = {
        "query": [query["query"] for query in queries],
        "document": [dense_text(document) for document in manager.documents(ids)],
    }
    limits = {"query": config.max_query_tokens, "document": config.max_document_tokens}
    vectors = {kind: encode_texts(model, tokenizer, texts[kind], kind, limits[kind], dtype) for kind in texts}
    model.train()
    best = np.argsort(-(vectors["query"] @ vectors["document"].T), axis=1, kind="stable")[:, :5]
    first = [
        next((rank for rank, at in enumerate(row) if ids[at] in query["doc_ids"]), 99)
        for row, query in zip(best.tolist(), queries, strict=True)
    ]
    return {f"recall@{k}": float(np.mean([rank < k for rank in first])) for k in (1, 5)}


def main() -> None:
    config = load_config(Config)
    print0(format_config(config))
    compute = compute_init(config.device, config.seed)
    tag = find_model_tag(config.source, config.model_tag)
    model, tokenizer, _, _ = load_checkpoint(checkpoint_root(config.source, tag), device=compute.device)
    queries = [query for path in config.queries for query in read_queries(path) if query["doc_ids"]]
    if not queries:
        raise UserError("nothing to train on: give --queries FILE, with doc_ids in it")
    random.Random(config.seed).shuffle(queries)
    if config.val_queries:
        val = [query for query in read_queries(config.val_queries) if query["doc_ids"]]
        random.Random(config.seed).shuffle(val)
    else:
        held_out = min(500, len(queries) // 10)
        val, queries = queries[:held_out], queries[held_out:]
    if config.batch_queries < compute.world_size:
        raise UserError(f"--batch_queries {config.batch_queries} are fewer than the {compute.world_size} devices")
    manager = RetrievalManager(config.retriever_type, config.knowledge_base)
    batches = PairBatches(
        queries,
        manager,
        tokenizer,
        config.batch_queries,
        config.hard_negatives,
        config.mined,
        config.max_query_tokens,
        config.max_document_tokens,
        config.seed,
    )
    print0(f"{len(batches.queries):,} queries to train on, {len(val):,} to validate")
    steps = config.num_steps if config.num_steps >= 0 else round(config.num_epochs * batches.steps_per_epoch())
    loss = partial(contrastive_loss, temperature=config.temperature)
    evaluate = partial(recall, model, tokenizer, val[:500], manager, config) if val else None
    phases = [Phase("embed", batches, max(1, steps), loss=loss)]
    train(model, tokenizer, phases, config, compute, checkpoint_root("embed", tag), evaluate)
    compute_cleanup()


if __name__ == "__main__":
    run_main(main)
