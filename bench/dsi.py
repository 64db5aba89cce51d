"""Search indexes on the passages of HotpotQA: what they are trained on, what documents are called, and new documents.

    NANOCHAT_DATA=folder python -m bench.dsi --home data/dsi --json

The passages around the sample's first 100 questions are pooled (about a thousand); the questions are asked, and none of
them is trained on. Each index is trained in home/<name>, which may be deleted.

    queries   beginnings of documents, spans, keywords with spans, and titles with these (the default), beside BM25;
              ids are atomic
    schemes   the other kinds of ids
    models    T5 and this project's own
    add       an index of all but 100 passages learns these

On other documents: --documents FILE --queries FILE --home FOLDER, such as those that bench.joint makes.
"""

from __future__ import annotations

import gzip
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.common import print_figures, run_script, start, table
from nanochat.checkpoint_manager import newest
from nanochat.common import UserError, run_main
from nanochat.config import load_config
from nanochat.dsi.docids import SCHEMES
from nanochat.dsi.index import SearchIndex
from nanochat.dsi.queries import DEFAULT_KINDS
from nanochat.dsi.training import evaluate_index, found_by_bm25, of_documents
from nanochat.retrieval.document import Document, read_documents, read_queries, write_jsonl
from tasks.hotpotqa import read_hotpotqa

PARTS = ("queries", "schemes", "models", "add")
KINDS = {"prefix": "prefix:1", "spans": "spans:1", "keywords": "keywords:2,spans:1", "pseudo": DEFAULT_KINDS}
NEW = 100


@dataclass(kw_only=True)
class Config:
    """Measure search indexes."""

    part: list[str] = field(default_factory=lambda: list(PARTS))
    """queries, schemes, models, add; separated by commas."""
    data: Path | None = None
    """Folder with hotpotqa_distractor.jsonl.gz; by default $NANOCHAT_DATA."""
    documents: Path | None = None
    """Other documents than HotpotQA's."""
    queries: Path | None = None
    """Questions with gold documents about them."""
    home: Path = Path("data/dsi")
    """Where data and indexes are kept."""
    questions: int = 100
    """Of HotpotQA, whose passages are pooled."""
    num_steps: int = 1200
    """Of each training."""
    seed: int = 0
    """Of training."""
    threads: int = 2
    """CPU threads."""
    json: bool = False
    """Print the figures as one JSON object in the last line."""


def prepare(config: Config) -> tuple[list[Document], list[dict[str, Any]]]:
    """Passages, and the questions about them."""
    sample, documents, queries = (config.home / f"{name}.jsonl" for name in ("sample", "documents", "queries"))
    if bool(config.documents) != bool(config.queries):
        raise UserError("--documents and --queries go together")
    if config.documents and config.queries:
        config.home.mkdir(parents=True, exist_ok=True)
        write_jsonl(documents, read_documents(config.documents))
        write_jsonl(queries, read_queries(config.queries))
    elif not queries.exists():
        path = (config.data or Path(os.environ.get("NANOCHAT_DATA", ""))) / "hotpotqa_distractor.jsonl.gz"
        if not path.exists():
            raise UserError(f"{path} is not there: set NANOCHAT_DATA to the folder that it is in")
        config.home.mkdir(parents=True, exist_ok=True)
        with gzip.open(path, "rt", encoding="utf-8") as file:
            lines = [line for line in file if json.loads(line)["setting"] == "distractor"][: config.questions]
        sample.write_text("".join(lines), encoding="utf-8")
        pooled, asked, _ = read_hotpotqa(sample)
        write_jsonl(documents, pooled)
        write_jsonl(queries, asked)
    return read_documents(documents), read_queries(queries)


def train(config: Config, name: str, *settings: object) -> SearchIndex:
    base = config.home / name
    root = base / "checkpoints/dsi/index"
    if not (base / "trained").exists():
        base.mkdir(parents=True, exist_ok=True)
        common = ["configs/dsi_tiny.py", "--model_tag", "index", "--seed", config.seed, "--eval_every", 0]
        common += ["--num_steps", config.num_steps]
        given = settings if "--documents" in settings else ("--documents", config.home / "documents.jsonl", *settings)
        run_script(base, "scripts.dsi_train", *common, *given)
        (base / "trained").touch()
    return SearchIndex.load(newest(root))


def valid_ids(index: SearchIndex, queries: list[dict[str, Any]], documents: list[Document]) -> float:
    """The share of all ids returned that are a document's, each once."""
    there = {document.id for document in documents}
    found = index.search([query["query"] for query in queries], 10)
    right = [len({id for id, _ in ranked} & there) for ranked in found]
    return sum(right) / (10 * len(found))


def add(config: Config, documents: list[Document], queries: list[dict[str, Any]]) -> dict[str, float]:
    old, new = documents[:-NEW], documents[-NEW:]
    files = {name: config.home / f"{name}.jsonl" for name in ("old", "new")}
    write_jsonl(files["old"], old)
    write_jsonl(files["new"], new)
    of_old, of_new = (of_documents(queries, {document.id for document in of}) for of in (old, new))
    before = train(config, "old", "--documents", files["old"])
    figures = {"add_old_hits1_before": evaluate_index(before, of_old)["hits1"]}
    base = config.home / "old"
    if not (base / "added").exists():
        settings = ["--documents", files["old"], "--add", files["new"], "--source_tag", "index", "--model_tag", "added"]
        run_script(base, "scripts.dsi_train", "configs/dsi_tiny.py", *settings, "--num_steps", 400, "--eval_every", 0)
        (base / "added").touch()
    after = SearchIndex.load(newest(base / "checkpoints/dsi/added"))
    figures["add_old_hits1_after"] = evaluate_index(after, of_old)["hits1"]
    return figures | {"add_new_hits1": evaluate_index(after, of_new)["hits1"], "add_new_questions": len(of_new)}


def main() -> None:
    config = load_config(Config)
    if unknown := [part for part in config.part if part not in PARTS]:
        raise UserError(f"--part {unknown[0]!r} is none of {', '.join(PARTS)}")
    start(config.threads)
    documents, queries = prepare(config)
    print(f"{len(documents):,} passages, {len(queries):,} questions", flush=True)
    runs: dict[str, tuple[object, ...]] = {}
    if "queries" in config.part:
        runs |= {name: ("--pseudo_queries", kinds) for name, kinds in KINDS.items()}
    if "schemes" in config.part:
        runs |= {scheme: ("--scheme", scheme) for scheme in SCHEMES if scheme != "atomic"}
    if "models" in config.part:
        runs["lm"] = ("--model", "lm")
    rows, figures = [("bm25", *found_by_bm25(documents, queries).values())], {}
    for name, settings in runs.items():
        index = train(config, name, *settings)
        found = evaluate_index(index, queries)
        valid = valid_ids(index, queries, documents)
        figures["valid_ids"] = min(valid, figures.get("valid_ids", 1.0))
        rows.append((name, *found.values()))
    names = ("hits1", "hits10", "mrr")
    figures |= {f"{key}_{row[0]}": value for row in rows for key, value in zip(names, row[1:], strict=True)}
    print("\n" + table(["trained on, ids or model", "Hits@1", "Hits@10", "MRR"], rows))
    if "add" in config.part:
        figures |= add(config, documents, queries)
    print_figures(figures, config.json)


if __name__ == "__main__":
    run_main(main)
