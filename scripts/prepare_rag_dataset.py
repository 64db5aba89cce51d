"""Make documents, questions and a knowledge base: from an invented world, your own documents, SQuAD or HotpotQA.

    python -m scripts.prepare_rag_dataset --mode example --output data/rag_examples
    python -m scripts.prepare_rag_dataset --mode own --documents my_folder --output data/own
    python -m scripts.prepare_rag_dataset --mode build --documents my_documents.jsonl --output data/my_kb
    python -m scripts.prepare_rag_dataset --mode squad --input train.json --dev_input dev.json --output data/squad
    python -m scripts.prepare_rag_dataset --mode hotpotqa --input hotpot_dev_distractor_v1.json --output data/hotpotqa

All but build write documents.jsonl, queries/{train,val,test}.jsonl and knowledge_base/ under --output, and besides

    example   (see tasks/example_world.py) queries/multihop_{train,val,test}.jsonl; queries/unanswerable_*.jsonl, about
              people who do not exist; graph.txt, a line of subject|relation|object for each fact; text/train.jsonl, the
              training documents alone, for pretraining; conversations/train.jsonl, talks about a passage in the
              message, for chat fine-tuning
    own       text/train.jsonl. It reads .jsonl, .txt, .md, .html, .pdf and .docx, a file or a folder, cuts the texts
              into passages and leaves out near-duplicates; a --writer writes questions, of which those stay for which
              the base finds their passage again
    squad     text/train.jsonl; test_knowledge_base/, the test passages alone, on which retrieval is measured; and
              conversations/writing.jsonl, passages with questions to write about them, for a --writer of one's own

build writes the knowledge base itself to --output.

All input is read and checked before anything is written. The knowledge base is written first, and a new --output
appears when it is whole.
"""

from __future__ import annotations

import os
import random
import shlex
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from nanochat.common import UserError, atomic_write_text, print0, run_main
from nanochat.config import format_config, load_config
from nanochat.retrieval import RetrievalManager
from nanochat.retrieval.document import Document, read_documents, write_jsonl
from tasks import own_documents
from tasks.example_world import SPLITS, generate_world, reading_conversations
from tasks.hotpotqa import read_hotpotqa
from tasks.more_worlds import add_training_worlds
from tasks.own_files import read_files
from tasks.question_writers import make_writer, writing_example
from tasks.squad import Article, read_squad

SHOWN = 10  # files that could not be read, by name
WRITTEN = 3  # questions in an example of writing them
HELD_OUT = 0.1  # share of the articles (squad) or questions (hotpotqa) for each held-out split


@dataclass
class PrepareConfig:
    """Make documents, questions and a knowledge base."""

    output: Path
    """Directory to write to (for build: the knowledge base)."""
    mode: Literal["example", "own", "build", "squad", "hotpotqa"] = "example"
    """What to prepare: the example world, your own documents with questions about them, a knowledge base of documents
    as they are, or a public data set from its files."""
    num_documents: int = 1000
    """example: documents in the world, 10 or more."""
    seed: int = 0
    """example: which world; others: which part is held out."""
    more_worlds: int = 0
    """example: so many other worlds of this size give their training documents and questions too, for long training."""
    documents: Path | None = None
    """own: your file or folder; build: a JSONL file with a document a line: {"id", "title", "content"}."""
    chunk_tokens: int = 200
    """own: longest passage, in tokens of this base directory's tokenizer, or in words and signs if there is none."""
    chunk_overlap: int = 20
    """own: tokens at most by which a passage repeats the end of the one before it, in whole sentences."""
    writer: str = "rules"
    """own: who writes the questions: rules, self:SOURCE (a model of this project), hf:PATH (one of transformers), or an
    address that speaks OpenAI's API (https://HOST/v1; the key is read from OPENAI_API_KEY)."""
    writer_model: str | None = None
    """own: the model to ask for at that address; by default the first that it lists."""
    questions_per_passage: int = 3
    """own: written for each passage, at most."""
    round_trip_k: int = 3
    """own: a question stays if its passage is among so many that the base finds for it; 0: all stay."""
    input: Path | None = None
    """squad, hotpotqa: the data set's JSON file, also .gz; gives train and val, and test if there is no --dev_input."""
    dev_input: Path | None = None
    """squad, hotpotqa: a second file of the data set; all of it becomes test."""
    retriever_type: Literal["simple", "bm25", "dense", "hybrid"] = "bm25"
    """Retriever the knowledge base is built for."""
    model: str | None = None
    """dense, hybrid: sentence-transformers model, by name or folder."""


@dataclass
class Dataset:
    """What a mode prepares, complete in memory before the first byte is written."""

    documents: list[Document]
    queries: dict[str, list[dict[str, Any]]]  # file name without .jsonl -> questions
    graph: list[tuple[str, str, str]] = field(default_factory=list)
    test_documents: list[Document] = field(default_factory=list)
    text: list[Document] = field(default_factory=list)  # what a model may be pretrained on
    conversations: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    writing: list[dict[str, Any]] = field(default_factory=list)  # conversations in which questions are written
    ask: Callable[[Dataset, RetrievalManager], None] | None = None  # adds what needs the knowledge base


def main() -> None:
    config = load_config(PrepareConfig)
    print0(format_config(config))
    _check(config)
    try:
        if config.mode == "build":
            documents = read_documents(config.documents)
            _build(documents, config.output, config)
            print0(f"{len(documents):,} documents -> {config.output} ({config.retriever_type})")
            print0(f'next: python -m nanochat.retrieval --search "..." --knowledge_base {config.output}')
            return
        prepare = {
            "example": prepare_example,
            "own": prepare_own,
            "squad": prepare_squad,
            "hotpotqa": prepare_hotpotqa,
        }[config.mode]
        dataset = prepare(config)
        _write(dataset, config)
    except OSError as error:
        place = f" ({error.filename})" if error.filename else ""
        raise UserError(f"{config.output}: cannot be written: {error.strerror}{place}") from None
    _summarise(dataset, config)


def _check(config: PrepareConfig) -> None:
    needs = {"build": "documents", "own": "documents", "squad": "input", "hotpotqa": "input"}.get(config.mode)
    if needs and getattr(config, needs) is None:
        raise UserError(f"--mode {config.mode} needs --{needs}, the file to read")
    belongs = {
        "documents": ("own", "build"),
        "writer_model": ("own",),
        "input": ("squad", "hotpotqa"),
        "dev_input": ("squad", "hotpotqa"),
    }
    for name, modes in belongs.items():
        if getattr(config, name) is not None and config.mode not in modes:
            raise UserError(f"--{name} is not used by --mode {config.mode}; did you mean --mode {' or '.join(modes)}?")
    if config.model is not None and config.retriever_type not in ("dense", "hybrid"):
        raise UserError(f"--model is not used by --retriever_type {config.retriever_type}; it is for dense and hybrid")
    if config.mode == "own":
        if not 0 <= config.chunk_overlap < config.chunk_tokens or config.chunk_tokens < 16:
            raise UserError("--chunk_tokens must be 16 or more, and --chunk_overlap less than it")
        if config.questions_per_passage < 1 or config.round_trip_k < 0:
            raise UserError("--questions_per_passage must be 1 or more, --round_trip_k 0 or more")
    if config.output.exists() and not config.output.is_dir():
        raise UserError(f"--output {config.output} is a file; give a directory")


# --- what each mode prepares


def prepare_example(config: PrepareConfig) -> Dataset:
    world = generate_world(config.num_documents, config.seed)
    seeds = [config.seed + 1000 * n for n in range(1, config.more_worlds + 1)]
    add_training_worlds(world, config.num_documents, seeds)
    queries = {
        **world.questions,
        **{f"multihop_{split}": world.multihop[split] for split in SPLITS},
        **{f"unanswerable_{split}": some for split, some in world.unanswerable.items() if some},
    }
    documents = [Document.from_dict(document) for document in world.documents]
    text = [document for document in documents if document.metadata["split"] == "train"]
    talks = reading_conversations(world, "train", config.seed)
    return Dataset(documents, queries, world.triples, text=text, conversations=talks)


def prepare_own(config: PrepareConfig) -> Dataset:
    texts, unread = read_files([config.documents])
    count, unit = own_documents.token_counter()
    documents, repeats = own_documents.passages(texts, config.chunk_tokens, config.chunk_overlap, count)
    print0(f"{len(texts):,} texts in {len(documents):,} passages of at most {config.chunk_tokens} {unit}")
    writer = make_writer(config.writer, config.writer_model)
    dataset = Dataset(documents, {})
    if repeats:
        dataset.notes.append(f"{repeats:,} passages left out: they repeat others nearly word for word")
    dataset.notes += [f"not read: {file.path}: {file.reason}" for file in unread[:SHOWN]]
    if len(unread) > SHOWN:
        dataset.notes.append(f"not read: {len(unread) - SHOWN:,} more")

    def ask(dataset: Dataset, manager: RetrievalManager) -> None:
        written = own_documents.write_questions(documents, writer, config.questions_per_passage)
        kept = own_documents.round_trip(written, manager, config.round_trip_k) if config.round_trip_k else written
        print0(f"{len(written):,} questions written, {len(kept):,} find their passage again")
        dataset.queries = own_documents.split(kept, documents, config.seed)
        if not dataset.queries:
            dataset.notes.append("too few questions to train on: more documents, or another --writer")
        text_of = {document.id: document.metadata["text"] for document in documents}
        queries = dataset.queries
        trained = {text_of[query["doc_ids"][0]] for query in queries.get("train", [])}
        held_out = {text_of[q["doc_ids"][0]] for name in queries if name != "train" for q in queries[name]} - trained
        dataset.text = [Document(t.id, t.title, t.content, t.source) for t in texts if t.id not in held_out]

    dataset.ask = ask
    return dataset


def prepare_squad(config: PrepareConfig) -> Dataset:
    """Whole articles are held out, so that no val or test passage was seen in training."""
    splits = _split(read_squad(config.input), config, "articles")
    if config.dev_input:
        splits["test"] = read_squad(config.dev_input)
    documents: dict[str, Document] = {}
    for split, articles in splits.items():
        for document in _passages(articles):
            document.metadata["split"] = split
            documents.setdefault(document.id, document)  # a passage may be in both files
    queries = {
        split: [query for article in articles for query in article.queries] for split, articles in splits.items()
    }
    writing = []
    for article in splits["train"]:
        asked: dict[str, list[tuple[str, str]]] = {}
        for query in article.queries:
            if query["doc_ids"]:
                asked.setdefault(query["doc_ids"][0], []).append((query["query"], query["answers"][0]))
        writing += [writing_example(documents[id], pairs[:WRITTEN]) for id, pairs in asked.items()]
    text = list(_passages(splits["train"]))
    test = list(_passages(splits["test"]))
    return Dataset(list(documents.values()), queries, test_documents=test, text=text, writing=writing)


def prepare_hotpotqa(config: PrepareConfig) -> Dataset:
    documents, questions, skipped = read_hotpotqa(config.input)
    queries = _split(questions, config, "questions")
    if config.dev_input:
        more, queries["test"], also_skipped = read_hotpotqa(config.dev_input)
        known = {document.id for document in documents}
        documents += [document for document in more if document.id not in known]
        skipped += also_skipped
    notes = [f"{skipped:,} questions skipped: not all of their gold paragraphs are in the file"] if skipped else []
    return Dataset(documents, queries, notes=notes)


def _passages(articles: Iterable[Article]) -> Iterable[Document]:
    return (document for article in articles for document in article.documents)


def _split(items: list[Any], config: PrepareConfig, what: str) -> dict[str, list[Any]]:
    """The items of --input as train, val and, unless --dev_input gives it, test; each in the order of the file."""
    held_out = SPLITS[1:] if config.dev_input is None else SPLITS[1:2]
    if len(items) <= len(held_out):
        raise UserError(
            f"{config.input}: {len(items)} {what} cannot be divided into train, {' and '.join(held_out)}; "
            "give a larger file" + ("" if config.dev_input else ", or the test part with --dev_input")
        )
    size = max(1, round(HELD_OUT * len(items)))
    order = random.Random(config.seed).sample(range(len(items)), len(items))
    chosen = {split: set(order[i * size : (i + 1) * size]) for i, split in enumerate(held_out)}
    chosen["train"] = set(order[len(held_out) * size :])
    return {split: [items[i] for i in sorted(chosen[split])] for split in SPLITS if split in chosen}


# --- writing


def _write(dataset: Dataset, config: PrepareConfig) -> None:
    output = config.output
    fresh = not output.exists()
    root = output.with_name(f".{output.name}.building") if fresh else output
    if fresh and root.exists():
        shutil.rmtree(root)  # a killed run left it
    try:
        # the knowledge base first: it is what can still fail, and it keeps its old version if it does
        _build(dataset.documents, root / "knowledge_base", config)
        if dataset.ask:
            dataset.ask(dataset, RetrievalManager(knowledge_base_path=root / "knowledge_base"))
        if dataset.test_documents:
            _build(dataset.test_documents, root / "test_knowledge_base", config)
        if dataset.graph:
            atomic_write_text(root / "graph.txt", "".join("|".join(triple) + "\n" for triple in dataset.graph))
        for name, queries in dataset.queries.items():
            write_jsonl(root / "queries" / f"{name}.jsonl", queries)
        if dataset.text:
            write_jsonl(root / "text" / "train.jsonl", dataset.text)
        if dataset.conversations:
            write_jsonl(root / "conversations" / "train.jsonl", dataset.conversations)
        if dataset.writing:
            write_jsonl(root / "conversations" / "writing.jsonl", dataset.writing)
        write_jsonl(root / "documents.jsonl", dataset.documents)
        if fresh:
            os.rename(root, output)
    except BaseException:
        if fresh:
            shutil.rmtree(root, ignore_errors=True)
        raise


def _build(documents: list[Document], output: Path, config: PrepareConfig) -> None:
    from nanochat.retrieval.knowledge_base import build_knowledge_base

    settings = {"model": config.model} if config.model else {}
    build_knowledge_base(documents, output, config.retriever_type, **settings)


def _summarise(dataset: Dataset, config: PrepareConfig) -> None:
    output = config.output
    lines = [("documents.jsonl", f"{len(dataset.documents):,} documents")]
    for name, queries in dataset.queries.items():
        unanswerable = sum(not query["answers"] for query in queries)
        note = f", {unanswerable:,} without an answer" if unanswerable else ""
        lines.append((f"queries/{name}.jsonl", f"{len(queries):,} questions{note}"))
    if dataset.graph:
        lines.append(("graph.txt", f"{len(dataset.graph):,} facts"))
    if dataset.text:
        lines.append(("text/train.jsonl", f"{len(dataset.text):,} documents"))
    if dataset.conversations:
        lines.append(("conversations/train.jsonl", f"{len(dataset.conversations):,} conversations"))
    if dataset.writing:
        lines.append(("conversations/writing.jsonl", f"{len(dataset.writing):,} passages with questions to write"))
    lines.append(("knowledge_base", config.retriever_type))
    if dataset.test_documents:
        text = f"{config.retriever_type}, the {len(dataset.test_documents):,} test passages alone"
        lines.append(("test_knowledge_base", text))
    width = max(len(name) for name, _ in lines)
    print0(f"wrote to {output}:")
    for name, text in lines:
        print0(f"  {name:<{width}}  {text}")
    for note in dataset.notes:
        print0(note)
    question = shlex.quote(dataset.queries["test"][0]["query"]) if dataset.queries else '"..."'
    print0(f"next: python -m nanochat.retrieval --search {question} --knowledge_base {output / 'knowledge_base'}")
    print0(f"then: python -m scripts.rag_finetune --knowledge_base {output / 'knowledge_base'} ...")


if __name__ == "__main__":
    run_main(main)
