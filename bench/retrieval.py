"""Retrieval: how good, how fast, how large, how cheap to change. Beside other programs in the same run.

    NANOCHAT_DATA=~/data python -m bench.retrieval --part quality --model PATH_OR_NAME --json
    python -m bench.retrieval --part speed,scale,update --json

quality: nDCG@10 and recall on a collection in the layout of BEIR's SciFact (corpus.jsonl.gz {id, title, content},
queries.jsonl.gz {id, text}, qrels.tsv), and recall of the gold passage on SQuAD 1.1. encode: documents a second, in
float32 and in bfloat16. speed: single queries over 100,000 synthetic documents. scale: a million of them, built from a
file, opened, asked. update: a thousand added and deleted.

Synthetic documents have 20 to 60 words, a query 4 different ones of a document. Words follow Zipf's law over a
vocabulary of 200,000; the 100 most frequent, which a list of stop words would take out, are not asked for. All programs
get the same words and return the 10 best.
"""

from __future__ import annotations

import gzip
import importlib.util
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from bench.common import print_figures, table
from nanochat.common import UserError, run_main
from nanochat.config import load_config
from nanochat.metrics import ndcg_at_k, recall_at_k, reciprocal_rank
from nanochat.retrieval.create import create_retriever
from nanochat.retrieval.document import Document
from nanochat.retrieval.knowledge_base import add_documents, delete_documents, open_knowledge_base
from tasks.squad import read_squad

VOCABULARY, FREQUENT, LENGTH = 200_000, 100, 40
FIRST_SYLLABLES = [c + v for c in "bcdfghjklmnprstvz" for v in "aiou"]


@dataclass(kw_only=True)
class Config:
    """Measure retrieval."""

    part: list[str] = field(default_factory=lambda: ["quality", "speed", "scale", "update"])
    """quality, encode, speed, scale, update; several with commas."""
    collection: Path | None = None
    """quality: a collection's folder; $NANOCHAT_DATA/scifact if not given."""
    squad: Path | None = None
    """quality: SQuAD's dev file; $NANOCHAT_DATA/squad11_dev.json.gz if not given."""
    squad_train: Path | None = None
    """quality: SQuAD's training file, whose passages are then searched too."""
    model: str | None = None
    """quality: an embedding model, by name or folder; without it dense and hybrid are left out."""
    documents: int = 100_000
    """speed: documents."""
    many_documents: int = 1_000_000
    """scale, update: documents."""
    queries: int = 2000
    """speed, scale: queries."""
    rounds: int = 3
    """Times that all programs take their turn; the best time of each counts."""
    peers: bool = True
    """Set other programs beside, those that are installed."""
    json: bool = False
    """Print the figures as one JSON object in the last line."""


# --- quality


def read_collection(folder: Path) -> tuple[list[Document], dict[str, str], dict[str, dict[str, float]]]:
    def rows(name: str) -> Iterator[dict]:
        with gzip.open(folder / f"{name}.jsonl.gz", "rt", encoding="utf-8", newline="\n") as file:
            yield from map(json.loads, file)

    documents = [Document(row["id"], row["title"], row["content"]) for row in rows("corpus")]
    judged: dict[str, dict[str, float]] = {}
    for line in (folder / "qrels.tsv").read_text().splitlines():
        query, document, relevance = line.split("\t")
        judged.setdefault(query, {})[document] = float(relevance)
    return documents, {row["id"]: row["text"] for row in rows("queries") if row["id"] in judged}, judged


def our_rankings(kinds: Sequence[str], documents: list[Document], queries: list[str], config: Config) -> dict:
    """The 100 best ids of each query, for each kind; documents are encoded once."""
    found, embedded = {}, None
    for kind in kinds:
        retriever = create_retriever(kind, **({"model": config.model} if kind in ("dense", "hybrid") else {}))
        if embedded is not None:
            retriever.use(embedded)
        else:
            retriever.add(documents)
        if kind == "dense":
            embedded = retriever.documents
        found[kind] = [[document.id for document in hits] for hits in retriever.search(queries, 100)]
    return found


def peer_rankings(documents: list[Document], queries: list[str]) -> dict[str, list[list[str]]]:
    """With our terms (stemmed, without stop words), so that only the scoring differs."""
    terms = create_retriever("bm25").analyzer.terms
    corpus = [terms(f"{document.title}\n{document.content}") for document in documents]
    asked = [terms(query) for query in queries]
    ids = [document.id for document in documents]
    found: dict[str, list[list[str]]] = {}

    def best(scores: np.ndarray) -> list[str]:
        return [ids[row] for row in np.argsort(-scores, kind="stable")[:100]]

    if installed("rank_bm25"):
        from rank_bm25 import BM25Okapi

        peer = BM25Okapi(corpus)
        found["rank-bm25"] = [best(peer.get_scores(query)) for query in asked]
    if installed("bm25s"):
        import bm25s

        peer = bm25s.BM25(method="lucene", k1=1.5, b=0.75)
        peer.index(corpus, show_progress=False)
        found["bm25s"] = [best(peer.get_scores(query)) if query else [] for query in asked]
    if installed("sklearn"):
        from sklearn.feature_extraction.text import TfidfVectorizer

        vectorizer = TfidfVectorizer(analyzer=lambda words: words, sublinear_tf=True)
        matrix = vectorizer.fit_transform(corpus)
        scores = (vectorizer.transform(asked) @ matrix.T).toarray()
        found["scikit-learn TF-IDF"] = [best(of_query) for of_query in scores]
    return found


def data_file(given: Path | None, name: str) -> Path | None:
    path = given or (Path(os.environ["NANOCHAT_DATA"]) / name if "NANOCHAT_DATA" in os.environ else None)
    if given is not None and not given.exists():
        raise UserError(f"{given} is not there")
    return path if path is not None and path.exists() else None


def quality(config: Config) -> dict[str, float]:
    kinds = ["simple", "bm25", *(["dense", "hybrid"] if config.model else [])]
    figures: dict[str, float] = {}
    folder = data_file(config.collection, "scifact")
    if folder is not None:
        documents, asked, judged = read_collection(folder)
        rankings = our_rankings(kinds, documents, list(asked.values()), config)
        if config.peers:
            rankings |= peer_rankings(documents, list(asked.values()))
        rows = []
        for name, ranked in rankings.items():
            pairs = [(ids, judged[query]) for ids, query in zip(ranked, asked, strict=True)]
            ndcg = statistics.mean(ndcg_at_k(ids, gold, 10) for ids, gold in pairs)
            recalls = {k: statistics.mean(recall_at_k(ids, gold, k) for ids, gold in pairs) for k in (5, 10, 100)}
            rows.append([name, ndcg, *recalls.values()])
            if name in kinds:
                figures |= {f"ndcg10_{name}": ndcg}
        title = f"{folder.name}: {len(documents):,} documents, {len(asked)} queries"
        print(f"\n{title}\n\n{table(['', 'nDCG@10', 'recall@5', 'recall@10', 'recall@100'], rows)}", flush=True)
        scores = {row[0]: row[1] for row in rows}
        if "scikit-learn TF-IDF" in scores:
            figures["simple_over_sklearn"] = scores["simple"] / scores["scikit-learn TF-IDF"]
        if "bm25s" in scores:
            figures["bm25_minus_bm25s"] = scores["bm25"] - scores["bm25s"]
    squad = data_file(config.squad, "squad11_dev.json.gz")
    if squad is not None:
        articles = read_squad(squad)
        documents = [document for article in articles for document in article.documents]
        queries = [query for article in articles for query in article.queries]
        figures |= passages("", kinds, documents, queries, config)
        if config.squad_train is not None:
            more = {d.id: d for article in read_squad(config.squad_train) for d in article.documents}
            more |= {document.id: document for document in documents}
            figures |= passages("_all", kinds, list(more.values()), queries, config)
    if not figures:
        raise UserError("nothing to measure quality on: set NANOCHAT_DATA, or give --collection or --squad")
    return figures


def passages(suffix: str, kinds: Sequence[str], documents: list[Document], queries: list[dict], config: Config) -> dict:
    figures, rows = {}, []
    for name, ranked in our_rankings(kinds, documents, [query["query"] for query in queries], config).items():
        pairs = [(ids, query["doc_ids"]) for ids, query in zip(ranked, queries, strict=True)]
        recalls = {k: statistics.mean(recall_at_k(ids, gold, k) for ids, gold in pairs) for k in (1, 5, 10)}
        rows.append([name, *recalls.values(), statistics.mean(reciprocal_rank(*pair) for pair in pairs)])
        figures |= {f"recall_at_{k}_{name}{suffix}": value for k, value in recalls.items()}
    title = f"SQuAD: {len(documents):,} passages, {len(queries):,} questions"
    print(f"\n{title}\n\n{table(['', 'recall@1', 'recall@5', 'recall@10', 'MRR'], rows)}", flush=True)
    return figures


def encode(config: Config) -> dict[str, float]:
    folder = data_file(config.collection, "scifact")
    if folder is None or not config.model:
        raise UserError("--part encode needs --model, and a collection: NANOCHAT_DATA or --collection")
    documents = read_collection(folder)[0][:256]
    rates: dict[str, float] = {}
    for _ in range(2):
        for dtype in ("float32", "bfloat16"):
            retriever = create_retriever("dense", model=config.model, dtype=dtype, device="cpu")
            retriever.add(documents[:32])  # loads the model
            began = time.perf_counter()
            retriever.add(documents[32:])
            rates[dtype] = max(rates.get(dtype, 0.0), 224 / (time.perf_counter() - began))
    print(f"\nencoding, documents/s\n\n{table(list(rates), [list(rates.values())])}", flush=True)
    return {"encode_bf16_over_fp32": rates["bfloat16"] / rates["float32"]}


# --- synthetic documents


def words_of(rank: np.ndarray) -> list[str]:
    """A word for each rank, of syllables; no stemmer changes it, and no two are alike."""
    n = len(FIRST_SYLLABLES)
    return [
        FIRST_SYLLABLES[r // n // n % n] + FIRST_SYLLABLES[r // n % n] + FIRST_SYLLABLES[r % n] + "k"
        for r in rank.tolist()
    ]


class Synthetic:
    def __init__(self, documents: int, seed: int = 0):
        rng = np.random.default_rng(seed)
        cumulative = np.cumsum(1 / np.arange(1, VOCABULARY + 1))
        self.lengths = rng.integers(LENGTH // 2, LENGTH + LENGTH // 2 + 1, documents)
        draws = rng.random(self.lengths.sum()) * cumulative[-1]
        ranks = np.minimum(np.searchsorted(cumulative, draws), VOCABULARY - 1).astype(np.int32)
        self.ranks = np.split(ranks, np.cumsum(self.lengths)[:-1])
        self.words = np.array(words_of(np.arange(VOCABULARY)), dtype=object)

    def texts(self) -> Iterator[str]:
        return (" ".join(self.words[ranks].tolist()) for ranks in self.ranks)

    def queries(self, count: int, seed: int = 1) -> list[str]:
        rng = np.random.default_rng(seed)
        found = []
        while len(found) < count:
            asked = np.unique(self.ranks[rng.integers(len(self.ranks))])
            asked = asked[asked >= FREQUENT]
            if len(asked) >= 4:
                found.append(" ".join(self.words[rng.permutation(asked)[:4]].tolist()))
        return found


def documents_of(synthetic: Synthetic) -> Iterator[Document]:
    return (Document(f"d{number:07d}", "", text) for number, text in enumerate(synthetic.texts()))


def installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def single_query_rates(runs: dict[str, tuple[Callable[[str], object], list[str]]], rounds: int) -> dict[str, float]:
    """Queries a second, one at a time; the programs take turns, and the best round of each counts."""
    rates = dict.fromkeys(runs, 0.0)
    for search, queries in runs.values():
        search(queries[0])
    for _ in range(rounds):
        for name, (search, queries) in runs.items():
            began = time.perf_counter()
            for query in queries:
                search(query)
            rates[name] = max(rates[name], len(queries) / (time.perf_counter() - began))
    return rates


def searchers(retriever, texts: Iterator[str] | None, queries: list[str], slow: bool) -> dict:
    """Ours, and the peers built over the texts."""

    def ours(compiled: bool) -> Callable[[str], object]:
        def search(query: str) -> object:
            retriever.compiled = compiled
            return retriever.rank(retriever.documents, [query], 10, masks)

        return search

    masks = retriever.documents.masks()
    runs: dict = {"ours, NumPy": (ours(False), queries)}
    if installed("numba"):
        runs["ours, numba"] = (ours(True), queries)
    if texts is None:
        return runs
    texts = list(texts)
    if slow and installed("rank_bm25"):
        from rank_bm25 import BM25Okapi

        okapi = BM25Okapi([text.split() for text in texts])
        # its own get_top_n sorts all scores; taking the best ten is its fastest use
        runs["rank-bm25"] = (lambda q: np.argpartition(okapi.get_scores(q.split()), -10)[-10:], queries[:10])
    if installed("bm25s"):
        import bm25s

        tokens = bm25s.tokenize(texts, stopwords=None, show_progress=False)
        for backend in ("numpy", "numba") if installed("numba") else ("numpy",):
            peer = bm25s.BM25(method="lucene", k1=1.5, b=0.75, backend=backend)
            peer.index(tokens, show_progress=False)
            if backend == "numba":
                peer.activate_numba_scorer()

            def search(query: str, peer=peer) -> object:
                return peer.retrieve([query.split()], k=10, show_progress=False, n_threads=1)

            runs[f"bm25s, {backend}"] = (search, queries if backend == "numba" else queries[:100])
        del tokens
    if installed("tantivy"):
        runs["tantivy"] = (tantivy_search(texts), queries)
    return runs


def tantivy_search(texts: list[str]) -> Callable[[str], object]:
    import tantivy

    builder = tantivy.SchemaBuilder()
    builder.add_text_field("body", stored=False, tokenizer_name="default")
    index = tantivy.Index(builder.build())
    writer = index.writer(512_000_000, 2)
    for text in texts:
        writer.add_document(tantivy.Document(body=text))
    writer.commit()
    writer.wait_merging_threads()
    index.reload()
    searcher = index.searcher()
    return lambda query: searcher.search(index.parse_query(query, ["body"]), 10)


def speed(config: Config) -> dict[str, float]:
    synthetic = Synthetic(config.documents)
    retriever = create_retriever("bm25")
    retriever.add(documents_of(synthetic))
    queries = synthetic.queries(config.queries)
    runs = searchers(retriever, synthetic.texts() if config.peers else None, queries, slow=True)
    rates = single_query_rates(runs, config.rounds)
    print(f"\n{config.documents:,} documents, one query at a time\n\n{table(['', 'queries/s'], list(rates.items()))}")
    figures = {}
    if "rank-bm25" in rates:
        figures["bm25_numpy_over_rank_100k"] = rates["ours, NumPy"] / rates["rank-bm25"]
        if "ours, numba" in rates:
            figures["bm25_over_rank_100k"] = rates["ours, numba"] / rates["rank-bm25"]
    return figures | {f"per_s_100k_{name}": rate for name, rate in rates.items()}


# --- a million


CHILD = """
import json, resource, sys, time
import numpy
from nanochat.retrieval.knowledge_base import open_knowledge_base
from nanochat.retrieval import create, lexical
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize() / 1e6
queries = json.load(open(sys.argv[2]))
before = resident()
began = time.perf_counter()
retriever = open_knowledge_base(sys.argv[1]).retriever()
opened = time.perf_counter()
retriever.search([queries[0]], 10)
first = time.perf_counter()
for query in queries:
    retriever.search([query], 10)
print(json.dumps([1e3 * (opened - began), 1e3 * (first - opened), resident() - before]))
"""


def write_documents(path: Path, synthetic: Synthetic, first: int = 0) -> None:
    with open(path, "w", encoding="utf-8") as file:
        for number, text in enumerate(synthetic.texts(), first):
            file.write(json.dumps({"id": f"d{number:07d}", "title": "", "content": text}) + "\n")


def built_base(folder: Path, config: Config) -> tuple[Synthetic, Path, dict[str, float]]:
    """A base of many documents, built by the command in a process of its own."""
    synthetic = Synthetic(config.many_documents)
    write_documents(folder / "documents.jsonl", synthetic)
    command = ["nanochat.retrieval", "--documents", folder / "documents.jsonl", "--output", folder / "kb"]
    began = time.perf_counter()
    subprocess.run([sys.executable, "-m", *map(str, command), "--type", "bm25"], check=True)
    seconds = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e3
    figures = {"build_docs_per_s_1m": config.many_documents / seconds, "build_peak_mb_1m": peak}
    return synthetic, folder / "kb", figures


def scale(config: Config, folder: Path, base: tuple[Synthetic, Path, dict[str, float]]) -> dict[str, float]:
    synthetic, path, figures = base
    queries = synthetic.queries(config.queries)
    (folder / "queries.json").write_text(json.dumps(queries))
    tried = []
    for _ in range(3):
        command = [sys.executable, "-c", CHILD, str(path), str(folder / "queries.json")]
        tried.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    figures |= dict(zip(("load_ms_1m", "first_query_ms", "resident_mb_1m"), np.median(tried, axis=0), strict=True))
    retriever = open_knowledge_base(path).retriever()
    runs = searchers(retriever, synthetic.texts() if config.peers else None, queries, slow=False)
    rates = single_query_rates(runs, config.rounds)
    title = f"{config.many_documents:,} documents, one query at a time"
    print(f"\n{title}\n\n{table(['', 'queries/s'], list(rates.items()))}")
    ours = rates.get("ours, numba", rates["ours, NumPy"])
    for peer, name in (("bm25s, numba", "bm25_over_bm25s_1m"), ("tantivy", "bm25_over_tantivy_1m")):
        if peer in rates:
            figures[name] = ours / rates[peer]
    return figures | {f"per_s_1m_{name}": rate for name, rate in rates.items()}


def update(config: Config, base: tuple[Synthetic, Path, dict[str, float]]) -> dict[str, float]:
    """A thousand documents more, then a thousand fewer, each saved; the results are those of a rebuild (which the tests
    hold to the last bit; here a sample)."""
    _, path, figures = base
    more = Synthetic(1000, seed=7)
    new = [Document(f"n{number:04d}", "", text) for number, text in enumerate(more.texts())]
    began = time.perf_counter()
    add_documents(path, new)
    added = time.perf_counter()
    delete_documents(path, [f"d{number:07d}" for number in range(0, 1000)])
    deleted = time.perf_counter()
    rebuild = config.many_documents / figures["build_docs_per_s_1m"]
    found = {"add_s_1m": added - began, "delete_s_1m": deleted - added}
    return found | {
        "add_over_rebuild": rebuild / found["add_s_1m"],
        "delete_over_rebuild": rebuild / found["delete_s_1m"],
    }


def main() -> None:
    config = load_config(Config)
    unknown = set(config.part) - {"quality", "encode", "speed", "scale", "update"}
    if unknown:
        raise UserError(
            f"--part {','.join(config.part)}: {sorted(unknown)[0]!r} is none of quality, encode, speed, scale, update"
        )
    figures: dict[str, float] = {}
    if "quality" in config.part:
        figures |= quality(config)
    if "encode" in config.part:
        figures |= encode(config)
    if "speed" in config.part:
        figures |= speed(config)
    if "scale" in config.part or "update" in config.part:
        with tempfile.TemporaryDirectory() as folder:
            base = built_base(Path(folder), config)
            figures |= base[2]
            if "scale" in config.part:
                figures |= scale(config, Path(folder), base)
            if "update" in config.part:
                figures |= update(config, base)
    print_figures(figures, config.json)


if __name__ == "__main__":
    run_main(main)
