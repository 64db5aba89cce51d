"""A knowledge base's whole life, from a JSONL file of documents.

    python -m nanochat.retrieval --documents data/my_documents.jsonl --output data/my_kb --type bm25
    python -m nanochat.retrieval search "return policy" --knowledge_base data/my_kb --top_k 5
    python -m nanochat.retrieval add --documents new.jsonl --knowledge_base data/my_kb
    python -m nanochat.retrieval delete --ids policy_001,policy_002 --knowledge_base data/my_kb
    python -m nanochat.retrieval index --type hybrid --model all-MiniLM-L6-v2 --knowledge_base data/my_kb
    torchrun --standalone --nproc_per_node=8 -m nanochat.retrieval index ...    (encoding on all GPUs)
    python -m nanochat.retrieval stats|verify|rollback --knowledge_base data/my_kb
    python -m nanochat.retrieval export --output documents.jsonl --knowledge_base data/my_kb
    python -m nanochat.retrieval export --to milvus --uri http://HOST:19530 --knowledge_base data/my_kb
    python -m nanochat.retrieval serve --knowledge_base data/my_kb --port 8090
    python -m nanochat.retrieval build --triples kb.txt --output data/my_graph --type kg --fact_retriever models/facts

A line of documents: {"id": "policy_001", "title": "Return Policy", "content": "Customers can ...", "source":
"optional", "metadata": {"lang": "en"}}. A line of triples: Titanic|directed_by|James Cameron; each becomes a document
(nanochat/kg/documents.py), which other retrievers can search too. Without a command: build, or with --search: search.

search, add, delete and stats also take a knowledge base that is elsewhere: --knowledge_base http://HOST:8090 (serve),
milvus:http://HOST:19530#documents or milvus:data/big.db#documents.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import shutil
import sys
import textwrap
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from nanochat.common import UserError, print0, run_main
from nanochat.config import load_config
from nanochat.retrieval import sharding
from nanochat.retrieval.create import RETRIEVER_TYPES, setting_names
from nanochat.retrieval.dense import DenseRetriever
from nanochat.retrieval.document import Document, iter_documents, write_jsonl
from nanochat.retrieval.filters import parse_filters
from nanochat.retrieval.knowledge_base import (
    KnowledgeBase,
    add_documents,
    add_embeddings,
    build_knowledge_base,
    delete_documents,
    open_knowledge_base,
    rollback,
)
from nanochat.retrieval.manager import RetrievalManager, elsewhere
from nanochat.retrieval.serve import Server


@dataclass
class Config:
    documents: Path | None = None
    """build, add: the JSONL file to read."""
    triples: list[Path] = field(default_factory=list)
    """build, add: in its place files of facts, with commas between them (nanochat/kg/triples.py)."""
    output: Path | None = None
    """build: the directory of the knowledge base; one that is there gets a new version. export: a JSONL file."""
    knowledge_base: str | None = None
    """All others: the knowledge base."""
    to: Literal["jsonl", "milvus"] = "jsonl"
    """export: where to."""
    uri: str | None = None
    """export --to milvus: a server's address (its token in MILVUS_TOKEN), or a file ending in .db."""
    collection: str = "documents"
    """export --to milvus: the name there."""
    replace: bool = False
    """export --to milvus: throw away what the collection has."""
    type: Literal["simple", "bm25", "dense", "hybrid", "kg", "dsi"] | None = None
    """The retriever (build: simple if not given; others: the one the base was built with)."""
    search: str | None = None
    """search: what to look for."""
    top_k: int = 5
    """search: how many documents to show."""
    where: list[str] = field(default_factory=list)
    """search: only documents with such metadata: lang=en, lang=en|de, year>=2020; several with commas."""
    explain: bool = False
    """search: where each part of the retriever had a document."""
    json: bool = False
    """search, stats: JSON lines instead of text."""
    ids: list[str] = field(default_factory=list)
    """delete: ids, with commas between them."""
    ids_file: Path | None = None
    """delete: a file with an id in each line."""
    host: str = "127.0.0.1"
    """serve: the address to listen on; 0.0.0.0 for all."""
    port: int = 8090
    """serve: the port."""
    allow_changes: bool = False
    """serve: let clients add and delete documents."""
    model: str | None = None
    """dense, hybrid: a sentence-transformers model, by name or folder (all-MiniLM-L6-v2), or self, self:SOURCE,
    self:SOURCE/TAG: one of our own (scripts.embed_finetune)."""
    device: str | None = None
    """dense, hybrid, kg: where the model runs (cpu, cuda; chosen if not given)."""
    batch_size: int | None = None
    """dense, hybrid: texts encoded at a time (64)."""
    dtype: Literal["auto", "float32", "bfloat16"] | None = None
    """dense, hybrid: the type in which documents are encoded (auto: what is faster here)."""
    faiss_index: Literal["auto", "flat", "hnsw", "ivf_sq8"] | None = None
    """dense, hybrid: how vectors are searched (auto: flat up to 50,000, hnsw up to a million, ivf_sq8 above)."""
    faiss_gpu: bool | None = None
    """dense, hybrid: train and compare vectors on the GPUs (needs faiss-gpu-cu12)."""
    alpha: float | None = None
    """hybrid: the weight of dense against bm25 (0.5)."""
    fusion: Literal["minmax", "rrf"] | None = None
    """hybrid: how the two are put together (minmax)."""
    candidates: int | None = None
    """hybrid: how many documents each of the two proposes (100)."""
    rerank: str | None = None
    """hybrid: a cross-encoder, by name or folder, that orders the best anew; or self, self:SOURCE: our own model."""
    rerank_candidates: int | None = None
    """hybrid: how many it reads (30)."""
    k1: float | None = None
    """bm25, hybrid: how fast repeats of a word stop counting (1.5)."""
    b: float | None = None
    """bm25, hybrid: how much long documents are held back (0.75)."""
    variant: Literal["lucene", "okapi"] | None = None
    """bm25, hybrid: the idf (lucene)."""
    bm25_backend: Literal["own", "rank_bm25"] | None = None
    """bm25, hybrid: our index, or the package rank-bm25, slow, to compare with (own)."""
    language: str | None = None
    """The language of the stemmer (english)."""
    stem: bool | None = None
    """Cut words to their stems (true)."""
    stop_words: bool | None = None
    """Leave function words out (true)."""
    title_weight: int | None = None
    """How often the words of a title count (1)."""
    sublinear: bool | None = None
    """simple: dampen repeats of a word by a logarithm (true)."""
    fact_retriever: Path | None = None
    """kg: the folder of a trained one, which the base keeps; without it facts are ranked by their words."""
    max_hops: int | None = None
    """kg: how far from what a question names (3)."""
    hub_degree: int | None = None
    """kg: entities of more facts are not gone through, if the question does not name them (100)."""
    max_facts: int | None = None
    """kg: facts looked at for a question (4,096)."""
    threshold: float | None = None
    """kg: facts of a smaller probability are not found (0.01)."""
    index: Path | None = None
    """dsi: the folder of a trained index (scripts.dsi_train), which the base keeps."""
    epochs: int | None = None
    """dsi: how often a document that is new to the index is seen when it is added (100)."""


_SETTINGS = {name for kind in RETRIEVER_TYPES for name in setting_names(kind)}


def main() -> None:
    argv = sys.argv[1:]
    command = argv.pop(0) if argv and argv[0] in _COMMANDS else ""
    if command == "search" and argv and not argv[0].startswith("-"):
        argv.insert(0, "--search")
    config = load_config(Config, argv, prog="python -m nanochat.retrieval")
    settings = {
        f.name: value
        for f in dataclasses.fields(Config)
        if f.name in _SETTINGS and (value := getattr(config, f.name)) is not None
    }
    with sharding.group():
        if sharding.rank():  # the other processes of torchrun encode what rank 0 hands them
            sharding.help_encoding(lambda saved: DenseRetriever(**saved).encode_documents)
        else:
            _COMMANDS[command or ("search" if config.search is not None else "build")](config, settings)


def build(config: Config, settings: dict[str, Any]) -> None:
    if not (config.documents or config.triples) or config.output is None:
        raise UserError(
            "give --documents FILE.jsonl --output DIRECTORY (facts: --triples FILE) to build a knowledge base, "
            'or --search "text" --knowledge_base DIRECTORY to try one; --help lists all settings'
        )
    retriever_type = config.type or ("kg" if config.triples else "simple")
    started = time.perf_counter()
    documents = _given(config)
    knowledge_base = build_knowledge_base(documents, config.output, retriever_type, **settings)
    _say_written(knowledge_base, f"built {retriever_type}", documents.count, time.perf_counter() - started)
    print0(f'try it: python -m nanochat.retrieval --search "..." --knowledge_base {config.output}')


def add(config: Config, settings: dict[str, Any]) -> None:
    if not (config.documents or config.triples):
        raise UserError("give the documents to add: --documents FILE.jsonl, or --triples FILE")
    started = time.perf_counter()
    documents = _given(config)
    if far := _elsewhere(config, settings):
        far.add(documents)
        print0(f"added {documents.count:,} documents in {time.perf_counter() - started:.1f} s; {len(far):,} are there")
        return
    knowledge_base = add_documents(_base(config), documents, **settings)
    _say_written(knowledge_base, "added", documents.count, time.perf_counter() - started)


def delete(config: Config, settings: dict[str, Any]) -> None:
    ids = list(config.ids)
    if config.ids_file is not None:
        try:
            ids += [line for line in config.ids_file.read_text(encoding="utf-8").split("\n") if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{config.ids_file}: cannot be read ({error}); give a text file of ids") from None
    if not ids:
        raise UserError("give the ids to delete: --ids ID,ID or --ids_file FILE")
    if far := _elsewhere(config, settings):
        far.delete(ids)
        print0(f"deleted {len(ids):,} documents; {len(far):,} are there")
        return
    started = time.perf_counter()
    knowledge_base = delete_documents(_base(config), ids, **settings)
    _say_written(knowledge_base, "deleted", len(ids), time.perf_counter() - started)


def index(config: Config, settings: dict[str, Any]) -> None:
    started = time.perf_counter()
    knowledge_base = add_embeddings(_base(config), config.type or "hybrid", **settings)
    _say_written(knowledge_base, "embedded", len(knowledge_base), time.perf_counter() - started)


def search(config: Config, settings: dict[str, Any]) -> None:
    if config.search is None:
        raise UserError('search for what? python -m nanochat.retrieval search "text" --knowledge_base DIRECTORY')
    path = config.knowledge_base or config.output
    if path is None:
        raise UserError("--search needs the knowledge base to look in: --knowledge_base DIRECTORY")
    if elsewhere(str(path)):
        config.type, settings = None, _for_elsewhere(config, settings)
    manager = RetrievalManager(config.type, path, **settings)
    start = time.perf_counter()
    where = parse_filters(config.where)
    documents = manager.retriever.search([config.search], config.top_k, where, config.explain)[0]
    milliseconds = 1000 * (time.perf_counter() - start)
    if config.json:
        for document in documents:
            print0(json.dumps(document.to_dict(), ensure_ascii=False))
        return
    marked = _marker(manager, config.search)
    for rank, document in enumerate(documents, 1):
        print0(marked(format_hit(rank, document)))
    found = f"{len(documents)} of {len(manager):,} documents" if documents else "nothing found"
    print0(f"{found} ({manager.retriever_type}, {milliseconds:.1f} ms)")


def stats(config: Config, settings: dict[str, Any]) -> None:
    if far := _elsewhere(config, settings):
        _show_figures(config, far.stats())
        return
    knowledge_base = open_knowledge_base(_base(config))
    manifest = knowledge_base.manifest
    figures: dict[str, Any] = {
        "version": knowledge_base.version,
        "created": manifest["created"],
        "documents": len(knowledge_base),
        "deleted, not yet cleared away": sum(s["deleted"] for s in manifest["segments"].values()),
        "segments": len(manifest["segments"]),
        "terms": sum(len(segment.postings.hashes) for segment in knowledge_base.documents.segments),
        "megabytes": round(sum(entry["size"] for entry in manifest["files"].values()) / 1e6, 2),
        "retriever": manifest["retriever"],
        **manifest["settings"],
    }
    if manifest["embedding"]:
        figures |= {f"embedding {name}": value for name, value in manifest["embedding"].items()}
    _show_figures(config, figures)


def _show_figures(config: Config, figures: dict[str, Any]) -> None:
    if config.json:
        print0(json.dumps(figures))
        return
    for name, value in figures.items():
        print0(f"{name:<30} {value:,}" if type(value) is int else f"{name:<30} {value}")


def verify(config: Config, settings: dict[str, Any]) -> None:
    knowledge_base = open_knowledge_base(_base(config), verify=True)
    files = knowledge_base.manifest["files"]
    print0(f"{knowledge_base.directory}: {len(files)} files have their checksums, {len(knowledge_base):,} documents")


def export(config: Config, settings: dict[str, Any]) -> None:
    if config.to == "milvus":
        _export_to_milvus(config, settings)
        return
    if config.output is None:
        raise UserError("give the file to write: --output FILE.jsonl")
    count = write_jsonl(config.output, open_knowledge_base(_base(config)).documents)
    print0(f"wrote {count:,} documents to {config.output}")


def _export_to_milvus(config: Config, settings: dict[str, Any]) -> None:
    from nanochat.retrieval.milvus_export import export_knowledge_base

    if config.uri is None:
        raise UserError("export to which Milvus? --uri http://HOST:19530, or --uri FILE.db")
    knowledge_base = open_knowledge_base(_base(config))
    started, watched = time.perf_counter(), sys.stderr.isatty()

    def show(done: int) -> None:
        if watched:
            line = f"{done:,} of {len(knowledge_base):,} documents, {time.perf_counter() - started:.0f} s"
            print(f"\r{line}\033[K", end="\n" if done == len(knowledge_base) else "", file=sys.stderr, flush=True)

    settings = {**settings, **_token()}
    made = export_knowledge_base(
        knowledge_base, config.uri, config.collection, config.type, config.replace, show, **settings
    )
    print0(f"{made} has the {len(made):,} documents of {knowledge_base.directory}")
    print0(f'try it: python -m nanochat.retrieval search "..." --knowledge_base "{made}"')


def roll_back(config: Config, settings: dict[str, Any]) -> None:
    knowledge_base = rollback(_base(config))
    print0(f"{knowledge_base.directory} is as the version before was: {len(knowledge_base):,} documents")


def serve(config: Config, settings: dict[str, Any]) -> None:
    manager = RetrievalManager(config.type, _base(config), **settings)
    server = Server(manager, config.host, config.port, config.allow_changes)
    print0(f"{len(manager):,} documents ({manager.retriever_type}) at http://{config.host}:{server.server_port}")
    with contextlib.suppress(KeyboardInterrupt):
        server.serve_forever()


_COMMANDS = {
    "build": build,
    "prepare_kb": build,
    "add": add,
    "delete": delete,
    "index": index,
    "search": search,
    "stats": stats,
    "verify": verify,
    "export": export,
    "rollback": roll_back,
    "serve": serve,
}


def _base(config: Config) -> Path:
    if config.knowledge_base is None:
        raise UserError("give the knowledge base: --knowledge_base DIRECTORY")
    if elsewhere(config.knowledge_base):
        raise UserError(f"{config.knowledge_base} is elsewhere: there are search, add, delete and stats for it")
    return Path(config.knowledge_base)


def _elsewhere(config: Config, settings: dict[str, Any]) -> Any:
    """The retriever of a knowledge base that is elsewhere, or None."""
    if config.knowledge_base is None or not elsewhere(config.knowledge_base):
        return None
    return RetrievalManager(None, config.knowledge_base, **_for_elsewhere(config, settings)).retriever


def _for_elsewhere(config: Config, settings: dict[str, Any]) -> dict[str, Any]:
    if not config.knowledge_base.startswith("milvus:"):
        if settings or config.type:
            raise UserError(f"{config.knowledge_base} has its own settings; leave {next(iter(settings), 'type')} out")
        return {}
    return {**settings, **_token(), **({"search": config.type} if config.type else {})}


def _token() -> dict[str, str]:
    return {"token": os.environ["MILVUS_TOKEN"]} if os.environ.get("MILVUS_TOKEN") else {}


def _given(config: Config) -> _Progress:
    """The documents of --documents, or the facts of --triples."""
    if not config.triples:
        return _Progress(config.documents)
    if config.documents:
        raise UserError("give --documents or --triples, not both")
    from nanochat.kg.documents import fact_documents
    from nanochat.kg.triples import read_facts

    facts = read_facts(config.triples)
    print0(facts.report)
    return _Progress(None, fact_documents(facts), len(facts.heads))


class _Progress:
    """The documents of a file, or these; on a terminal with a line of progress."""

    def __init__(self, path: Path | None, documents: Iterable[Document] = (), total: int = 0):
        """total: how many they are."""
        self.path, self.documents, self.total = path, documents, total
        self.count = self.bytes = 0

    def __iter__(self) -> Iterator[Document]:
        started = shown = time.perf_counter()
        watched = sys.stderr.isatty()
        for document in iter_documents(self.path, self._read) if self.path else self.documents:
            yield document
            self.count += 1
            if watched and (now := time.perf_counter()) - shown > 1:
                shown, seconds = now, now - started
                done, all = (self.bytes, os.path.getsize(self.path)) if self.path else (self.count, self.total)
                left = seconds / done * max(0, all - done)
                line = f"{self.count:,} documents, {self.count / seconds:,.0f} a second, {left:.0f} s left"
                print(f"\r{line}\033[K", end="", file=sys.stderr, flush=True)
        if shown > started:
            print("\r\033[K", end="", file=sys.stderr, flush=True)

    def _read(self, size: int) -> None:
        self.bytes += size


def _say_written(knowledge_base: KnowledgeBase, what: str, count: int, seconds: float) -> None:
    rate = count / seconds
    print0(f"{what}: {count:,} documents in {seconds:.1f} s ({rate:,.{0 if rate >= 10 else 1}f} a second)")
    sizes = {name: entry["size"] for name, entry in knowledge_base.manifest["files"].items()}
    total, text = sum(sizes.values()), sum(size for name, size in sizes.items() if name.endswith("documents.jsonl"))
    shown = [f"{size / 1e6:.1f} MB" if size >= 1e6 else f"{size / 1e3:.1f} kB" for size in (total, text, total - text)]
    print0(f"{len(knowledge_base):,} documents, {shown[0]}: documents {shown[1]}, index {shown[2]}")
    print0(f"wrote {knowledge_base.directory}")


def _marker(manager: RetrievalManager, query: str) -> Callable[[str], str]:
    """Shows the words of a text that match the query's in bold, on a terminal."""
    if not sys.stdout.isatty():
        return lambda text: text
    analyzer = manager.retriever.analyzer
    wanted = set(analyzer.terms(query))

    def marked(word: re.Match[str]) -> str:
        return f"\033[1m{word[0]}\033[0m" if wanted.intersection(analyzer.terms(word[0])) else word[0]

    return lambda text: re.sub(r"\w+", marked, text)


def format_hit(rank: int, document: Document) -> str:
    width = min(shutil.get_terminal_size().columns, 120)
    snippet = textwrap.shorten(document.content, 2 * (width - 6), placeholder=" ...")
    lines = textwrap.wrap(snippet, width, initial_indent="      ", subsequent_indent="      ")
    parts = [
        f"{part} {found['score']:.4f}" + (f" (rank {found['rank']})" if "rank" in found else "")
        for part, found in document.explanation.items()
    ]
    if parts:
        lines.append(f"      {', '.join(parts)}")
    return "\n".join([f"{rank:>4}. {document.score:.4f}  {document.id}  {_one_line(document.title)}", *lines])


def _one_line(text: str) -> str:
    return " ".join(text.split())


if __name__ == "__main__":
    run_main(main)
