"""A retriever whose documents are facts: those around the entities that a question names, best first.

    retriever = KGRetriever(fact_retriever="models/facts")  # a trained nanochat.kg.gnn.FactRetriever
    retriever.add(fact_documents(read_facts([Path("kb.txt")])))
    retriever.search(["who directed [Titanic]?"], top_k=5)

The score is the probability that a fact is on a path to an answer. Without a trained FactRetriever it is a plain rule:
facts of the entities themselves, by the words that a relation shares with the question. A question that names no entity
finds nothing. The facts are documents of a knowledge base as any others (nanochat/kg/documents.py), so that bm25 can
search the same base; the graph is made of them, anew after each change.

    E facts, R relations
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nanochat.common import UserError, print0, save_array
from nanochat.kg.coverage import Grounded, ground
from nanochat.kg.documents import as_facts, fact_of
from nanochat.kg.gnn import FactRetriever
from nanochat.kg.graph import Graph
from nanochat.kg.linking import Linker
from nanochat.kg.questions import Question
from nanochat.kg.subgraphs import TOPIC, batches, find_subgraphs, make_batch, question_text
from nanochat.kg.triples import Facts
from nanochat.retrieval.collection import Collection, Masks, NewDirectory
from nanochat.retrieval.document import Document
from nanochat.retrieval.retriever import Retriever
from nanochat.retrieval.segment import Encode

QUERIES = 256  # whose subgraphs are held at a time
BATCH_FACTS = 65_536  # that the fact retriever reads at a time
LOGIT_DIGITS = 3
"""Two actors of one film are the same to the fact retriever, up to the last bits, which depend on what else is in the
batch; these must not decide who comes first. Of 150 3-hop rankings of MetaQA two did change with the batch."""

Found = tuple[np.ndarray, np.ndarray]  # facts of the graph, and the score of each


@dataclass
class FactIndex:
    """The graph of a collection's facts. Fact f is stated by the documents in rows[starts[f] : starts[f + 1]]."""

    documents: Collection
    graph: Graph
    rows: np.ndarray
    starts: np.ndarray  # (E + 1,)

    @classmethod
    def build(cls, documents: Collection) -> FactIndex:
        """The facts in the order of their names: the same graph whatever was added first."""
        stated: dict[tuple[str, str, str], list[int]] = {}
        for segment, first in zip(documents.segments, documents.first_rows.tolist(), strict=False):
            for row in segment.live_rows().tolist():
                document = segment.documents[row]
                if (triple := fact_of(document)) is None:
                    raise UserError(f"document {document.id!r} states no fact: this is no base for the retriever 'kg'")
                stated.setdefault(triple, []).append(first + row)
        triples = sorted(stated)
        entities = sorted({name for head, _, tail in triples for name in (head, tail)})
        relations = sorted({relation for _, relation, _ in triples})
        number = {name: at for at, name in enumerate(entities)}, {name: at for at, name in enumerate(relations)}
        columns = np.array([(number[0][h], number[1][r], number[0][t]) for h, r, t in triples], dtype=np.int32)
        graph = Graph.build(Facts(*columns.reshape(-1, 3).T.copy(), entities, relations))
        rows = np.array([row for triple in triples for row in stated[triple]], dtype=np.int64)
        return cls(documents, graph, rows, np.cumsum([0, *(len(stated[triple]) for triple in triples)]))

    @functools.cached_property
    def linker(self) -> Linker:
        return Linker(self.graph)

    def rows_of(self, facts: np.ndarray, scores: np.ndarray) -> Found:
        """The rows that state these facts, each with its fact's score."""
        counts = self.starts[facts + 1] - self.starts[facts]
        before = np.cumsum([0, *counts])[:-1]
        at = np.repeat(self.starts[facts] - before, counts) + np.arange(counts.sum())
        return self.rows[at], np.repeat(scores, counts)

    # --- on disk, beside the documents that it is of

    def save(self, directory: Path) -> None:
        self.graph.save(directory / "graph")
        save_array(directory / "fact_rows.npy", self.rows)
        save_array(directory / "fact_starts.npy", self.starts)

    @classmethod
    def load(cls, documents: Collection, directory: Path) -> FactIndex:
        rows, starts = (np.load(directory / f"fact_{name}.npy", mmap_mode="r") for name in ("rows", "starts"))
        return cls(documents, Graph.load(directory / "graph"), rows, starts)


class KGRetriever(Retriever):
    type = "kg"

    def __init__(
        self,
        fact_retriever: FactRetriever | str | Path | None = None,
        max_hops: int = 3,
        hub_degree: int = 100,
        max_facts: int = 4096,
        threshold: float = 0.01,
        device: str | None = None,
        **text: Any,
    ):
        """fact_retriever: a trained one, or its folder. max_hops, hub_degree, max_facts: which facts it looks at, see
        nanochat/kg/mining.py; those in its training are the best. threshold: facts of a smaller probability are not
        found. device: where it runs. text: how texts become words, see Retriever."""
        super().__init__(**text)
        self.max_hops, self.hub_degree, self.max_facts, self.threshold = max_hops, hub_degree, max_facts, threshold
        for name in ("max_hops", "hub_degree", "max_facts"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if not 0 <= threshold < 1:
            raise UserError(f"threshold is {threshold}; it is a probability, at least 0 and below 1")
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.fact_retriever: FactRetriever | None = None
        if fact_retriever is not None:
            given = isinstance(fact_retriever, FactRetriever)
            self._set(fact_retriever if given else FactRetriever.load(Path(fact_retriever)))
        self._index: FactIndex | None = None
        self._rule_told = False

    def _set(self, fact_retriever: FactRetriever) -> None:
        self.fact_retriever = fact_retriever.to(self.device).eval()

    def settings(self) -> dict[str, Any]:
        names = ("max_hops", "hub_degree", "max_facts", "threshold")
        own = {name: getattr(self, name) for name in names}
        if self.fact_retriever is not None:  # another one finds other facts
            own["fact_retriever_hash"] = self._hash()
        return {**super().settings(), **own}

    def _hash(self) -> str:
        about = [dataclasses.asdict(self.fact_retriever.config), self.fact_retriever.vocabulary]
        digest = hashlib.sha256(json.dumps(about).encode())
        for name, tensor in sorted(self.fact_retriever.state_dict().items()):
            digest.update(name.encode() + tensor.cpu().numpy().tobytes())
        return digest.hexdigest()[:16]

    # --- what is found

    def index(self, documents: Collection) -> FactIndex:
        index = self._index
        if index is None or index.documents is not documents:
            index = self._index = FactIndex.build(documents)
        return index

    def rank(self, documents: Collection, queries: list[str], top_k: int, masks: Masks) -> list[Found]:
        index, ranked = self.index(documents), []
        for facts, scores in self._found(index, queries):
            if self.fact_retriever is not None:
                facts, scores = facts[scores >= self.threshold], scores[scores >= self.threshold]
            rows, scores = index.rows_of(facts, scores)
            allowed = np.ones(len(rows), dtype=bool)
            for mask, first, places in zip(masks, documents.first_rows, documents.split(rows), strict=False):
                if len(mask):
                    allowed[places] = mask[rows[places] - first]
            ranked.append(documents.best(rows[allowed], scores[allowed], top_k))
        return ranked

    def score_rows(self, documents: Collection, queries: list[str], rows: list[np.ndarray]) -> list[np.ndarray]:
        """0 for what is not around the question's entities."""
        index, scored = self.index(documents), []
        for found, wanted in zip(self._found(index, queries), rows, strict=True):
            score_of = dict(zip(*(part.tolist() for part in index.rows_of(*found)), strict=True))
            scored.append(np.array([score_of.get(row, 0.0) for row in wanted.tolist()]))
        return scored

    def _found(self, index: FactIndex, queries: list[str]) -> list[Found]:
        """Scored facts around what each query names."""
        found: list[Found] = []
        for start in range(0, len(queries), QUERIES):
            questions = [Question("", query, []) for query in queries[start : start + QUERIES]]
            grounded = [ground(question, index.linker) for question in questions]
            texts = [question_text(one, index.linker) for one in grounded]
            if self.fact_retriever is not None:
                found += self._by_fact_retriever(index.graph, grounded, texts)
            else:
                self._tell_rule()
                found += [self._by_rule(index.graph, one, text) for one, text in zip(grounded, texts, strict=True)]
        return found

    def _by_fact_retriever(self, graph: Graph, grounded: list[Grounded], texts: list[str]) -> list[Found]:
        subgraphs = find_subgraphs(graph, texts, grounded, self.max_hops, self.hub_degree, self.max_facts)
        found: list[Found] = [_NOTHING] * len(grounded)
        asked = np.flatnonzero(np.diff(subgraphs.fact_starts))
        for chosen in batches(asked, subgraphs, BATCH_FACTS):
            batch = make_batch(graph, subgraphs, chosen)
            with torch.inference_mode():
                logits = self.fact_retriever(batch.to(self.device)).facts
            scores = logits.double().cpu().numpy().round(LOGIT_DIGITS)
            scores = 1 / (1 + np.exp(-scores))
            starts = batch.fact_starts.tolist()
            for at, question in enumerate(chosen):
                own = slice(starts[at], starts[at + 1])
                found[question] = (batch.facts[own].astype(np.int64), scores[own])
        return found

    def _by_rule(self, graph: Graph, grounded: Grounded, text: str) -> Found:
        """Facts of the topics, by the question's words that the relation has, one more if both ends are topics; of
        equal ones those first whose ends have few facts. Below 1."""
        topics = np.unique(np.array(grounded.topics, dtype=np.int64))
        edges = graph.edges[graph.edges_of(topics)]
        facts = np.unique(np.where(edges < 0, ~edges, edges)).astype(np.int64)
        if not len(facts):
            return _NOTHING
        wanted = set(self.analyzer.terms(text.replace(TOPIC, " ")))
        relations, relation = np.unique(graph.relations[facts], return_inverse=True)
        names = (graph.relation_names[number] for number in relations.tolist())
        shared = np.array([len(wanted.intersection(self.analyzer.terms(name))) for name in names])[relation]
        heads, tails = graph.heads[facts], graph.tails[facts]
        named = np.isin(heads, topics) & np.isin(tails, topics)
        scores = shared + named + 1 / (1 + np.maximum(graph.degrees[heads], graph.degrees[tails]))
        return facts, scores / (len(wanted) + 2)

    def _tell_rule(self) -> None:
        if not self._rule_told:
            self._rule_told = True
            said = "no trained fact retriever: facts are ranked by the words they share with the question"
            print0(said, file=sys.stderr)  # standard output has answers

    # --- the contract

    def add(
        self, documents: Iterable[Document], new_directory: NewDirectory | None = None, encode: Encode | None = None
    ) -> None:
        super().add(as_facts(documents), new_directory, encode)

    def save_beside(self, directory: Path) -> None:
        """The graph as graph/, and fact_retriever/ where there is one."""
        documents = Collection.load(directory)  # rows as they count when it is read again
        if len(documents):
            FactIndex.build(documents).save(directory)
        if self.fact_retriever is not None:
            folder = directory / "fact_retriever"
            self.fact_retriever.save(folder)
            # safetensors makes its file private; others may read a knowledge base
            (folder / "retriever.safetensors").chmod((folder / "retriever.json").stat().st_mode & 0o777)

    def load_beside(self, directory: Path) -> None:
        self._index = None
        if (directory / "graph").exists():
            self._index = FactIndex.load(self.documents, directory)
        if self.fact_retriever is None and (directory / "fact_retriever").exists():
            self._set(FactRetriever.load(directory / "fact_retriever"))


_NOTHING: Found = (np.zeros(0, dtype=np.int64), np.zeros(0))
