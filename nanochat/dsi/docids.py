"""What a document is called inside an index: a sequence of tokens of the model's vocabulary.

    atomic    a token of its own for each document
    naive     its number, digit by digit: says nothing about the document
    semantic  its place in a tree of clusters: documents that are alike begin alike
    title     the words of its title

Tokens of ids other than titles are symbols behind the tokenizer's vocabulary, made as they are needed, so that new
documents can come. Every id but atomic ones ends with the end token. Semantic ids: Tay et al., "Transformer Memory as a
Differentiable Search Index" (NeurIPS 2022), section 3.2; a digit has a token of its own at each level, as in Wang et
al., "A Neural Corpus Indexer" (NeurIPS 2022).

    N documents, D width of embeddings, K branches of a node
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from nanochat.common import UserError
from nanochat.retrieval.analysis import Analyzer
from nanochat.retrieval.document import Document
from nanochat.retrieval.postings import hash64

SCHEMES = ("atomic", "naive", "semantic", "title")
DIGITS = 6  # of naive ids: a million documents


@dataclass
class DocIds:
    """first: of the symbols' tokens, the size of the text's vocabulary. sequences: of each document, by its own id."""

    scheme: str
    first: int
    end: int
    symbols: dict[str, int] = field(default_factory=dict)
    sequences: dict[str, list[int]] = field(default_factory=dict)
    branches: int = 10
    centroids: dict[str, np.ndarray] = field(default_factory=dict)
    """semantic: of each inner node, by its path "3.1", (K, D)."""

    def __post_init__(self) -> None:
        if self.scheme not in SCHEMES:
            raise UserError(f"no scheme of ids {self.scheme!r}; use one of {', '.join(SCHEMES)}")

    @property
    def size(self) -> int:
        """Of the vocabulary with all symbols."""
        return self.first + len(self.symbols)

    def add(
        self,
        documents: Sequence[Document],
        encode: Callable[[str], list[int]],
        embed: Callable[[Sequence[Document]], np.ndarray],
        seed: int = 0,
    ) -> None:
        """Ids for documents that have none. encode: a title's tokens. embed: (N, D), for semantic ids."""
        documents = [document for document in documents if document.id not in self.sequences]
        if not documents:
            return
        taken = {tuple(sequence) for sequence in self.sequences.values()}
        if self.scheme == "title":
            names = [_title(document) for document in documents]
        elif self.scheme == "semantic":
            names = self._places(embed(documents), seed)
        else:
            first = len(self.sequences)
            names = [str(first + row) for row in range(len(documents))]
        for document, name in zip(documents, names, strict=True):
            number = 1
            while tuple(sequence := self._spell(name, number, encode)) in taken:
                number += 1
            taken.add(tuple(sequence))
            self.sequences[document.id] = sequence

    def _spell(self, name: str, number: int, encode: Callable[[str], list[int]]) -> list[int]:
        """number: 2 for the second document of the same title, or in the same leaf, and so on."""
        if self.scheme == "title":
            return [*encode(name if number == 1 else f"{name} ({number})"), self.end]
        if self.scheme == "atomic":
            return [self._symbol(f"document {name}")]
        if self.scheme == "naive":
            return [*(self._symbol(digit) for digit in name.zfill(DIGITS)), self.end]
        path = [f"{level}:{digit}" for level, digit in enumerate(name.split("."))]
        return [*map(self._symbol, path), self._symbol(f"leaf:{number - 1}"), self.end]

    def _symbol(self, name: str) -> int:
        return self.symbols.setdefault(name, self.size)

    # --- semantic

    def _places(self, vectors: np.ndarray, seed: int) -> list[str]:
        """The leaf of each document: of a new tree, or of the one that is there."""
        if not self.centroids:
            rng = np.random.default_rng(seed)
            places: list[str] = [""] * len(vectors)
            self._grow(vectors, np.arange(len(vectors)), "", places, rng)
            return places
        return [self._descend(vector) for vector in vectors]

    def _grow(self, vectors: np.ndarray, rows: np.ndarray, path: str, places: list[str], rng) -> None:
        """Clusters of clusters, until no leaf has more than `branches` documents."""
        centroids, cluster = k_means(vectors[rows], min(self.branches, len(rows)), rng)
        self.centroids[path] = centroids
        for digit in range(len(centroids)):
            mine = rows[cluster == digit]
            below = f"{path}.{digit}" if path else str(digit)
            if len(mine) > self.branches and len(mine) < len(rows):
                self._grow(vectors, mine, below, places, rng)
            else:
                for row in mine.tolist():
                    places[row] = below

    def _descend(self, vector: np.ndarray) -> str:
        path = ""
        while path in self.centroids:
            digit = int(np.argmax(self.centroids[path] @ vector))
            path = f"{path}.{digit}" if path else str(digit)
        return path


def _title(document: Document) -> str:
    return " ".join((document.title or document.content).split()[:12]) or document.id


def k_means(
    vectors: np.ndarray, k: int, rng: np.random.Generator, rounds: int = 25, begins: int = 4
) -> tuple[np.ndarray, np.ndarray]:
    """Spherical k-means of unit vectors (N, D), begun as k-means++ (Arthur and Vassilvitskii, SODA 2007), the best of
    some begins: centroids (K, D) of length 1 and each vector's cluster (N,)."""
    best: tuple[float, np.ndarray, np.ndarray] | None = None
    for _ in range(begins):
        centroids, cluster = _k_means(vectors, k, rng, rounds)
        fit = float((vectors * centroids[cluster]).sum())
        if best is None or fit > best[0]:
            best = fit, centroids, cluster
    return best[1:]


def _k_means(vectors: np.ndarray, k: int, rng: np.random.Generator, rounds: int) -> tuple[np.ndarray, np.ndarray]:
    """An empty cluster takes the vector that fits its own worst."""
    chosen = [int(rng.integers(len(vectors)))]
    nearest = vectors @ vectors[chosen[0]]
    for _ in range(k - 1):
        distance = np.maximum(1 - nearest, 0)
        total = distance.sum()
        chances = distance / total if total > 1e-9 else None  # all the same
        chosen.append(int(rng.choice(len(vectors), p=chances)))
        nearest = np.maximum(nearest, vectors @ vectors[chosen[-1]])
    centroids = vectors[chosen].copy()
    cluster = np.full(len(vectors), -1)
    for _ in range(rounds):
        fit = vectors @ centroids.T
        new = fit.argmax(1)
        for empty in set(range(k)) - set(new.tolist()):
            worst = int(fit[np.arange(len(new)), new].argmin())
            new[worst] = empty
            fit[worst] = np.inf  # not taken twice
        if np.array_equal(new, cluster):
            break
        cluster = new
        for at in range(k):
            mean = vectors[cluster == at].sum(0)
            centroids[at] = mean / max(np.linalg.norm(mean), 1e-9)
    return centroids, cluster


class TermVectors:
    """Embeddings without a model: TF-IDF over hashed terms, projected at random, which keeps cosines (Johnson and
    Lindenstrauss); good enough to tell what documents are about."""

    def __init__(self, idf: np.ndarray, width: int = 256, seed: int = 0):
        self.idf, self.analyzer = idf, Analyzer("english", True, True)
        self.projection = np.random.default_rng(seed).standard_normal((len(idf), width), dtype=np.float32)

    @classmethod
    def fit(cls, documents: Sequence[Document], buckets: int = 1 << 15) -> TermVectors:
        made = cls(np.zeros(buckets, np.float32))
        seen = np.zeros(buckets, np.float32)
        for document in documents:
            seen[list({bucket for bucket, _ in made._counts(document)})] += 1
        made.idf = np.log((1 + len(documents)) / (1 + seen)).astype(np.float32)
        return made

    def _counts(self, document: Document) -> list[tuple[int, int]]:
        counts: dict[int, int] = {}
        for term in self.analyzer.terms(f"{document.title}\n{document.content}"):
            bucket = hash64(term) % len(self.idf)
            counts[bucket] = counts.get(bucket, 0) + 1
        return list(counts.items())

    def __call__(self, documents: Sequence[Document]) -> np.ndarray:
        """(N, D) of length 1."""
        vectors = np.zeros((len(documents), self.projection.shape[1]), np.float32)
        for row, document in enumerate(documents):
            counts = self._counts(document)
            if counts:
                buckets, often = (np.array(of) for of in zip(*counts, strict=True))
                vectors[row] = ((1 + np.log(often)) * self.idf[buckets]) @ self.projection[buckets]
        return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-9)
