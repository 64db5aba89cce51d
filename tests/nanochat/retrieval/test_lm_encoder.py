"""Our own model as encoder and reranker, and encoding by several processes."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

from nanochat.checkpoint_manager import checkpoint_root, save_checkpoint
from nanochat.common import UserError
from nanochat.retrieval import Document, RetrievalManager
from nanochat.retrieval.create import create_retriever
from nanochat.retrieval.document import write_jsonl
from nanochat.retrieval.knowledge_base import build_knowledge_base, open_knowledge_base
from nanochat.retrieval.lm_encoder import LMEncoder, embed, pad, render_text
from nanochat.retrieval.lm_rerank import LMReranker
from tasks.contrastive import PairBatches, Pairs, contrastive_loss
from tests.nanochat.retrieval.samples import make, random_documents

TEXTS = ["The old bridge", "a", "Each town has a river, a bridge and a mountain; the mountain is old. " * 20, ""]


@pytest.fixture
def saved(tmp_path, monkeypatch, make_model, small_tokenizer):
    """Checkpoints of sources embed and rag."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    for source, settings in {
        "embed": {"max_query_tokens": 8, "max_document_tokens": 40},
        "rag": {"cite": True},
    }.items():
        model = make_model(small_tokenizer.vocab_size, seed=len(source))
        save_checkpoint(checkpoint_root(source, "tiny"), 1, model, small_tokenizer, {"training_config": settings})
    return tmp_path


def test_embeddings_are_means_of_states_whatever_they_are_batched_with(saved):
    encoder = LMEncoder("self", dtype="float32")
    vectors = encoder.encode_document(TEXTS)
    for text, vector in zip(TEXTS, vectors, strict=True):
        ids = render_text(encoder.tokenizer, text, "document", 40)
        assert len(ids) <= 40
        with torch.inference_mode():
            mean = encoder.model(torch.tensor([ids]), states=True)[0].mean(0)
        np.testing.assert_allclose(vector, (mean / mean.norm()).numpy(), atol=1e-6)
    encoder.tokens_at_once = 1
    np.testing.assert_allclose(encoder.encode_document(TEXTS), vectors, atol=1e-6)
    assert np.abs(encoder.encode_query(TEXTS) - vectors).max() > 1e-3  # its markers are others
    logits = encoder.model(torch.tensor([ids]))
    states = encoder.model(torch.tensor([ids]), states=True)
    torch.testing.assert_close(encoder.model.lm_head(states).float(), logits)


def test_a_base_knows_the_checkpoint_it_was_built_with(saved, make_model, small_tokenizer):
    built = build_knowledge_base(random_documents(12), saved / "kb", "dense", model="self")
    vectors = np.concatenate([segment.embeddings for segment in built.documents.segments])
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-5)
    manager = RetrievalManager(knowledge_base_path=saved / "kb")
    assert len(manager.retrieve("baun")) == 5 and manager.retriever.settings()["model"] == "self"
    other = make_model(small_tokenizer.vocab_size, seed=9)
    save_checkpoint(checkpoint_root("embed", "tiny"), 2, other, small_tokenizer, {})
    with pytest.raises(UserError, match="another embedding model"):
        RetrievalManager(knowledge_base_path=saved / "kb")
    with pytest.raises(UserError, match=r"scripts\.chat_sft"):
        create_retriever("dense", model="self:mid").encoder_hash  # noqa: B018


# --- the contrastive loss


def test_the_loss_against_its_formula_query_by_query(make_model, small_tokenizer):
    model = make_model(small_tokenizer.vocab_size)
    queries = [render_text(small_tokenizer, text, "query", 30) for text in ("bridge", "old town", "mountain")]
    documents = [render_text(small_tokenizer, text, "document", 30) for text in ("a", "b river", "c", "dd", "e e")]
    gold = torch.zeros(3, 5, dtype=torch.bool)
    gold[0, 1] = gold[1, 0] = gold[1, 3] = gold[2, 2] = True
    batch = Pairs(pad(queries), pad(documents), torch.tensor([1, 3, 2]), gold)
    with torch.no_grad():
        q, d = embed(model, *batch.queries), embed(model, *batch.documents)
    expected = 0.0
    for row, (wanted, negatives) in enumerate([(1, [0, 2, 3, 4]), (3, [1, 2, 4]), (2, [0, 1, 3, 4])]):
        scores = {at: float(q[row] @ d[at]) / 0.1 for at in [wanted, *negatives]}
        expected += np.log(sum(np.exp(score) for score in scores.values())) - scores[wanted]
    loss = contrastive_loss(model, batch, 0.1)
    assert loss.item() == pytest.approx(expected, rel=1e-5) and batch.learned == 3
    loss.backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if not name.startswith("lm_head"))


def test_batches_hold_each_document_once_and_no_gold_one_as_negative(small_tokenizer):
    documents = random_documents(40)
    manager = RetrievalManager("bm25", documents=documents)
    queries = [
        {"id": str(n), "query": f"{d.title} {d.content[:20]}", "answers": [], "doc_ids": [d.id, documents[n + 1].id]}
        for n, d in enumerate(documents[:20])
    ]
    batches = PairBatches(queries, manager, small_tokenizer, 8, hard_negatives=2, seed=3)
    assert batches.steps_per_epoch() == 2
    seen = []
    for step in range(2):
        batch = batches.get(step)
        tokens, lengths = batch.documents
        assert len({tuple(row[:n].tolist()) for row, n in zip(tokens, lengths, strict=True)}) == len(tokens)
        assert batch.gold[torch.arange(8), batch.wanted].all() and 8 < len(tokens) <= 24
        seen += [tuple(row.tolist()) for row in batch.queries[0]]
        again = PairBatches(queries, manager, small_tokenizer, 8, hard_negatives=2, seed=3).get(step)
        assert torch.equal(again.documents[0], tokens) and torch.equal(again.gold, batch.gold)
    halves = [batches.get(0, range(4)), batches.get(0, range(4, 8))]
    assert [half.learned for half in halves] == [4, 4]
    assert not torch.equal(batches.get(2).queries[0], batches.get(0).queries[0])  # another order in the next epoch
    with pytest.raises(UserError, match="'nobody'"):
        PairBatches([*queries, {**queries[0], "doc_ids": ["nobody"]}], manager, small_tokenizer, 8)
    with pytest.raises(UserError, match="at least two"):
        PairBatches(queries[:1], manager, small_tokenizer, 8)


# --- the reranker


class Favourite(LMReranker):
    """Judges by a table instead of a model."""

    def __init__(self, passes: int):
        self.passes, self.by = passes, "citation"
        self.asked = 0

    def _second_is_better(self, query, first, second):
        self.asked += 1
        return int(second.id) > int(first.id)


@pytest.mark.parametrize("passes", [1, 2, 30])
def test_each_pass_brings_one_more_to_its_place(passes):
    documents = [Document(str(n), "", "") for n in (3, 1, 4, 0, 5, 9, 2, 6)]
    reranker = Favourite(passes)
    scores = reranker._by_citation("q", documents)
    ranked = [int(documents[at].id) for at in np.argsort(-scores)]
    done = min(passes, len(documents))
    assert ranked[:done] == sorted(ranked, reverse=True)[:done] and sorted(ranked) == [0, 1, 2, 3, 4, 5, 6, 9]
    assert reranker.asked == sum(range(len(documents) - 1, max(0, len(documents) - 1 - passes), -1))


def test_scores_are_the_models_likelihoods(saved, small_tokenizer):
    documents = [Document(str(n), f"Title {n}", text) for n, text in enumerate(TEXTS[:3])]
    by_question = LMReranker("self:embed")
    assert by_question.by == "question" and LMReranker().by == "citation"  # what the checkpoint was trained for
    by_question.model.float()
    scores = by_question._by_question("Which bridge?", documents)
    for score, document in zip(scores, documents, strict=True):
        ids = by_question._prompt("Which bridge?", [document])
        start, end = (ids.index(small_tokenizer.special_id(f"<|user_{side}|>")) for side in ("start", "end"))
        with torch.inference_mode():
            likelihood = by_question.model(torch.tensor([ids]))[0].log_softmax(-1)
        expected = np.mean([float(likelihood[at - 1, ids[at]]) for at in range(start + 1, end + 1)])
        assert score == pytest.approx(expected, rel=1e-4)
    by_citation = LMReranker()
    pairs = [by_citation._second_is_better("Which?", *pair) for pair in (documents[:2], documents[1:])]
    assert all(type(better) is bool for better in pairs)
    hybrid = make("hybrid", rerank="self")
    hybrid.add(random_documents(20))
    found = hybrid.search(["baun beun"], 5)[0]
    assert len(found) == 5 and found[0].score > found[-1].score
    with pytest.raises(UserError, match="citation"):
        LMReranker(by="feeling")


# --- more processes


def test_two_processes_encode_what_one_does(saved):
    write_jsonl(saved / "documents.jsonl", random_documents(70))
    command = ["-m", "nanochat.retrieval", "--documents", str(saved / "documents.jsonl"), "--type", "dense"]
    command += ["--model", "self", "--dtype", "float32", "--output"]
    build_knowledge_base(random_documents(70), saved / "one", "dense", model="self", dtype="float32")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run([*torchrun, *command, str(saved / "two")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("wrote") == 1  # one of them speaks
    one, two = (open_knowledge_base(saved / name, verify=True).documents.segments for name in ("one", "two"))
    np.testing.assert_allclose(one[0].embeddings, two[0].embeddings, atol=1e-6)
    meta = saved / "checkpoints/embed/tiny/step_000001/meta.json"
    meta.write_text(meta.read_text().replace("tokenizer_fingerprint", "x"))
    broken = subprocess.run([*torchrun, *command, str(saved / "three")], capture_output=True, text=True)
    assert broken.returncode != 0 and "error: " in broken.stderr and not (saved / "three").exists()


# --- GPUs, with a double: what is asked of faiss-gpu, done by faiss


def test_faiss_on_gpus(monkeypatch):
    faiss = pytest.importorskip("faiss")
    dense = create_retriever("dense", encoder=make("dense").encoder, faiss_gpu=True)
    dense.add(random_documents(60))
    with pytest.raises(UserError, match="faiss-gpu"):
        dense.search(["baun"])
    asked = []
    monkeypatch.setattr(faiss, "StandardGpuResources", lambda: asked.append("resources"), raising=False)
    monkeypatch.setattr(
        faiss, "knn_gpu", lambda res, *rest, **kw: asked.append("knn") or faiss.knn(*rest, **kw), raising=False
    )
    monkeypatch.setattr(faiss, "index_cpu_to_all_gpus", lambda index: asked.append("to") or index, raising=False)
    monkeypatch.setattr(faiss, "index_gpu_to_cpu", lambda index: asked.append("back") or index, raising=False)
    plain = make("dense")
    plain.add(random_documents(60))
    assert dense.search(["baun caun"], 5) == plain.search(["baun caun"], 5) and "knn" in asked
    clustered = create_retriever("dense", encoder=make("dense").encoder, faiss_gpu=True, faiss_index="ivf_sq8")
    clustered.add(random_documents(60))
    assert clustered.search(["baun caun"], 5) and asked[-2:] == ["to", "back"]
