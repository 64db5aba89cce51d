"""The knowledge base's life: built, changed, killed, damaged, and what a user is told each time."""

from __future__ import annotations

import gc
import itertools
import json
import os
from pathlib import Path

import numpy as np
import pytest

from nanochat.common import UserError
from nanochat.retrieval import Document, RetrievalManager, knowledge_base
from nanochat.retrieval.knowledge_base import (
    add_documents,
    add_embeddings,
    build_knowledge_base,
    delete_documents,
    open_knowledge_base,
    rollback,
)

TYPES = ["simple", "bm25", "dense", "hybrid"]


class Encoder:
    name = "letters"

    def __init__(self, fingerprint: str = "letters-1"):
        self.fingerprint = fingerprint

    def encode(self, texts: list[str]) -> np.ndarray:
        letters = "abcdefghijklmnopqrstuvwxyz"
        return np.array([[text.lower().count(letter) + 0.01 for letter in letters] for text in texts])


def documents(count: int = 8, first: int = 0) -> list[Document]:
    return [Document(f"d{n}", f"Title {n}", f"common word{n} text") for n in range(first, first + count)]


def encoder_for(retriever_type: str) -> dict:
    return {"encoder": Encoder()} if retriever_type in ("dense", "hybrid") else {}


def build(path, retriever_type="bm25", count=8, **settings):
    return build_knowledge_base(documents(count), path, retriever_type, **encoder_for(retriever_type), **settings)


def ids(path, query="common", top_k=100, **settings):
    retriever = open_knowledge_base(path, verify=True).retriever(**settings)
    return sorted(document.id for document in retriever.search([query], top_k)[0])


# --- building and changing


@pytest.mark.parametrize("retriever_type", TYPES)
def test_a_built_base_answers_as_the_retriever_in_memory(tmp_path, retriever_type):
    build(tmp_path / "kb", retriever_type)
    settings = encoder_for(retriever_type)
    loaded = RetrievalManager(knowledge_base_path=tmp_path / "kb", **settings)
    memory = RetrievalManager(retriever_type, documents=documents(), **settings)
    assert loaded.retriever_type == retriever_type and len(loaded) == len(memory) == 8
    queries = ["word3", "common text", "title 5"]
    assert loaded.search(queries, 8) == memory.search(queries, 8)


@pytest.mark.parametrize("retriever_type", TYPES)
def test_adds_and_deletes_make_new_versions(tmp_path, retriever_type):
    settings = encoder_for(retriever_type)
    build(tmp_path, retriever_type)
    added = add_documents(tmp_path, [*documents(2, first=8), Document("d0", "", "common replaced")], **settings)
    assert (added.version, len(added)) == ("v0002", 10)
    assert ids(tmp_path, **settings) == sorted(f"d{n}" for n in range(10))
    deleted = delete_documents(tmp_path, ["d1", "d9"], **settings)
    assert (deleted.version, len(deleted)) == ("v0003", 8)
    assert ids(tmp_path, **settings) == ["d0", *(f"d{n}" for n in range(2, 9))]
    # the last two versions are in the directory
    assert {document.id for document in deleted.documents} == {"d0"} | {f"d{n}" for n in range(2, 9)}
    assert sorted(name for name in os.listdir(tmp_path) if name[0] != ".") == ["CURRENT", "v0002", "v0003"]


def test_a_change_that_fails_leaves_the_base_as_it_was(tmp_path):
    build(tmp_path)
    with pytest.raises(UserError, match="'nobody'"):
        delete_documents(tmp_path, ["nobody"])
    with pytest.raises(UserError, match="twice"):
        add_documents(tmp_path, [Document("x", "", "y"), Document("x", "", "y")])
    assert open_knowledge_base(tmp_path, verify=True).version == "v0001" and len(ids(tmp_path)) == 8
    assert sorted(os.listdir(tmp_path)) == [".lock", "CURRENT", "v0001"]


def test_an_old_reader_goes_on_reading_its_version(tmp_path):
    old = build(tmp_path).retriever()
    delete_documents(tmp_path, ["d1"])
    delete_documents(tmp_path, ["d2"])  # by now the files that the reader has open are removed
    assert len(old.search(["common"], 100)[0]) == 8 and len(ids(tmp_path)) == 6


def test_segments_are_shared_between_versions(tmp_path):
    first = build(tmp_path, "hybrid")
    second = add_documents(tmp_path, documents(1, first=8), **encoder_for("hybrid"))
    third = delete_documents(tmp_path, ["d3"], **encoder_for("hybrid"))
    assert list(third.manifest["segments"]) == ["s0001", "s0002"]
    for name, entry in first.manifest["files"].items():
        if name.startswith("s0001"):
            assert second.manifest["files"][name] == third.manifest["files"][name] == entry
            assert (second.directory / name).samefile(third.directory / name)
    assert third.manifest["segments"]["s0001"] == {"documents": 7, "deleted": 1, "recall_at_10": 1.0}
    assert "s0001/dead.npy" in third.manifest["files"] and "s0001/dead.npy" not in second.manifest["files"]
    assert len(ids(tmp_path, **encoder_for("hybrid"))) == 8


def test_deleting_needs_no_embedding_model(tmp_path):
    build(tmp_path, "hybrid")
    knowledge_base = delete_documents(tmp_path, ["d1"])  # the encoder is not given, and "letters" is no model
    assert knowledge_base.manifest["embedding"] == {"model": "letters", "dimension": 26, "hash": "letters-1"}
    delete_documents(tmp_path, [f"d{n}" for n in range(2, 7)])  # so many that the segment is written anew
    assert ids(tmp_path, encoder=Encoder()) == ["d0", "d7"]


def test_a_large_build_has_several_segments(tmp_path, monkeypatch):
    monkeypatch.setattr("nanochat.retrieval.retriever.SEGMENT_DOCUMENTS", 10)
    knowledge_base = build(tmp_path / "kb", count=35)
    assert [s["documents"] for s in knowledge_base.manifest["segments"].values()] == [10, 10, 10, 5]
    replaced = [Document(f"d{n}", "", "common replaced") for n in (3, 12, 34, 99)]
    add_documents(tmp_path / "kb", replaced)
    memory = RetrievalManager("bm25", documents=documents(35))
    memory.retriever.add(replaced)
    manager = RetrievalManager(knowledge_base_path=tmp_path / "kb")
    queries = ["common", "word12", "replaced", "title 5"]
    assert len(manager) == 36 and manager.search(queries, 50) == memory.search(queries, 50)


def test_segments_are_merged_on_the_way(tmp_path):
    build(tmp_path)
    for n in range(8, 20):
        knowledge_base = add_documents(tmp_path, documents(1, first=n))
        assert len(ids(tmp_path)) == n + 1 and len(knowledge_base.manifest["segments"]) < 8
        names = {name for name in os.listdir(knowledge_base.directory) if name[0] == "s"}
        assert names == set(knowledge_base.manifest["segments"])
    knowledge_base = delete_documents(tmp_path, [f"d{n}" for n in range(0, 15)])
    assert ids(tmp_path) == sorted(f"d{n}" for n in range(15, 20))
    assert sum(segment["deleted"] for segment in knowledge_base.manifest["segments"].values()) <= 2


def test_a_version_before_comes_back(tmp_path):
    build(tmp_path)
    with pytest.raises(UserError, match="no whole version before"):
        rollback(tmp_path)
    deleted = delete_documents(tmp_path, ["d1"])
    assert len(ids(tmp_path)) == 7
    assert rollback(tmp_path).version == "v0003" and len(ids(tmp_path)) == 8
    assert len(deleted) == 7
    (open_knowledge_base(tmp_path).directory / "s0001" / "offsets.npy").unlink()
    with pytest.raises(UserError, match=r"damaged .*go back to v0002: .* rollback --knowledge_base"):
        open_knowledge_base(tmp_path)
    assert rollback(tmp_path).version == "v0004" and len(ids(tmp_path)) == 7
    for version in ("v0003", "v0004"):
        (tmp_path / version / "manifest.json").write_text("{")
    with pytest.raises(UserError, match=r"damaged .*; build it again"):
        open_knowledge_base(tmp_path)
    with pytest.raises(UserError, match="no whole version before"):
        rollback(tmp_path)


def test_the_manifest_says_what_the_base_is(tmp_path):
    knowledge_base = build(tmp_path, "hybrid", k1=1.2, alpha=0.7)
    manifest = json.loads((knowledge_base.directory / "manifest.json").read_text())
    assert manifest["format_version"] == 3 and manifest["retriever"] == "hybrid"
    assert manifest["settings"]["k1"] == 1.2 and manifest["settings"]["alpha"] == 0.7
    assert manifest["embedding"] == {"model": "letters", "dimension": 26, "hash": "letters-1"}
    assert manifest["counts"] == {"documents": 8}
    on_disk = {
        file.relative_to(knowledge_base.directory).as_posix()
        for file in knowledge_base.directory.rglob("*")
        if file.is_file()
    }
    assert on_disk - {"manifest.json"} == set(manifest["files"])
    assert {"s0001/postings/docs.npy", "s0001/embeddings.npy", "s0001/documents.jsonl"} <= on_disk


def test_saved_settings_come_back_and_given_ones_win(tmp_path):
    build(tmp_path, "bm25", k1=0.5)
    knowledge_base = open_knowledge_base(tmp_path)
    assert knowledge_base.retriever().k1 == 0.5
    assert knowledge_base.retriever(k1=2.0).k1 == 2.0
    with pytest.raises(UserError, match=r"built with stem=True.*--type bm25"):
        knowledge_base.retriever(stem=False)


def test_an_empty_base_opens_and_grows(tmp_path):
    for retriever_type in TYPES:
        path, settings = tmp_path / retriever_type, encoder_for(retriever_type)
        build(path, retriever_type, count=0)
        assert ids(path, **settings) == []
        add_documents(path, documents(2), **settings)
        assert ids(path, **settings) == ["d0", "d1"]


def test_nothing_is_pickled(tmp_path):
    class Trap:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "trapped"),))

    knowledge_base = build(tmp_path / "kb")
    file = knowledge_base.directory / "s0001" / "postings" / "docs.npy"
    np.save(file, np.array([Trap()], dtype=object))  # what an attacker would leave there
    manifest_file = knowledge_base.directory / "manifest.json"
    manifest = json.loads(manifest_file.read_text())
    manifest["files"]["s0001/postings/docs.npy"]["size"] = file.stat().st_size
    manifest_file.write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="damaged"):
        open_knowledge_base(tmp_path / "kb").retriever()
    assert not (tmp_path / "trapped").exists()


# --- other retrievers than the one that was built


@pytest.mark.parametrize("built", TYPES)
def test_every_base_serves_words_and_one_with_embeddings_serves_all(tmp_path, built):
    build(tmp_path, built)
    queries = ["word3", "common text"]
    for wanted in TYPES:
        settings = encoder_for(wanted)
        if wanted in ("dense", "hybrid") and built in ("simple", "bm25"):
            with pytest.raises(UserError, match=rf"index --knowledge_base {tmp_path} --type {wanted}"):
                RetrievalManager(wanted, tmp_path, **settings)
        else:
            found = RetrievalManager(wanted, tmp_path, **settings).search(queries, 8)
            assert found == RetrievalManager(wanted, documents=documents(), **settings).search(queries, 8)


def test_embeddings_are_added_to_a_base_that_is_there(tmp_path):
    build(tmp_path, "bm25", k1=0.7)
    delete_documents(tmp_path, ["d1"])
    knowledge_base = add_embeddings(tmp_path, "hybrid", encoder=Encoder())
    assert knowledge_base.manifest["settings"]["k1"] == 0.7 and len(ids(tmp_path, encoder=Encoder())) == 7
    with pytest.raises(UserError, match="dense or --type hybrid"):
        add_embeddings(tmp_path, "simple")
    add_embeddings(tmp_path, "hybrid", encoder=Encoder("letters-2"))
    assert len(ids(tmp_path, encoder=Encoder("letters-2"))) == 7


@pytest.mark.parametrize("retriever_type", ["dense", "hybrid"])
def test_another_embedding_model_is_refused(tmp_path, retriever_type):
    build(tmp_path, retriever_type)
    with pytest.raises(UserError, match=f"another embedding model.*index .*--type {retriever_type} --model letters"):
        RetrievalManager(knowledge_base_path=tmp_path, encoder=Encoder("letters-2"))


# --- what is wrong with a base


def test_a_missing_base_is_told(tmp_path):
    with pytest.raises(UserError, match=rf"no knowledge base at {tmp_path}/none; .*--output {tmp_path}/none"):
        open_knowledge_base(tmp_path / "none")


def test_another_directory_or_file_is_told_and_not_touched(tmp_path):
    (tmp_path / "precious.txt").write_text("x")
    with pytest.raises(UserError, match="not a knowledge base"):
        open_knowledge_base(tmp_path)
    with pytest.raises(UserError, match="not a knowledge base"):
        open_knowledge_base(tmp_path / "precious.txt")
    with pytest.raises(UserError, match="is not a knowledge base"):
        build(tmp_path)
    with pytest.raises(UserError, match="is a file"):
        build(tmp_path / "precious.txt")
    assert os.listdir(tmp_path) == ["precious.txt"]


def test_a_version_given_for_the_base_is_told(tmp_path):
    with pytest.raises(UserError, match=f"give the base itself: {tmp_path}"):
        open_knowledge_base(build(tmp_path).directory)


def test_a_half_built_base_is_told_and_can_be_built_again(tmp_path):
    build(tmp_path)
    (tmp_path / "CURRENT").unlink()
    with pytest.raises(UserError, match=f"not finished.*--output {tmp_path}"):
        open_knowledge_base(tmp_path)
    build(tmp_path)
    assert len(ids(tmp_path)) == 8


def test_another_format_version_is_told(tmp_path):
    file = build(tmp_path).directory / "manifest.json"
    file.write_text(file.read_text().replace('"format_version": 3', '"format_version": 99'))
    with pytest.raises(UserError, match=r"format version 99.*DOCUMENTS.jsonl --output"):
        open_knowledge_base(tmp_path)


@pytest.mark.parametrize("damage", ["missing", "cut", "grown", "manifest", "manifest is no object", "CURRENT"])
def test_damage_is_told_at_once(tmp_path, damage):
    directory = build(tmp_path).directory
    file = directory / "s0001" / "postings" / "codes.npy"
    if damage == "missing":
        file.unlink()
    elif damage == "cut":
        file.write_bytes(file.read_bytes()[:-1])
    elif damage == "grown":
        file.write_bytes(file.read_bytes() + b"x")
    elif damage == "manifest":
        (directory / "manifest.json").write_text("{")
    elif damage == "manifest is no object":
        (directory / "manifest.json").write_text("[]")
    else:
        (tmp_path / "CURRENT").write_text("../../etc\n")
    with pytest.raises(UserError, match=rf"build it again: python -m nanochat.retrieval .*--output {tmp_path}"):
        open_knowledge_base(tmp_path)


def test_a_flipped_bit_is_found_by_verify(tmp_path):
    knowledge_base = build(tmp_path)
    for name in knowledge_base.manifest["files"]:
        file = knowledge_base.directory / name
        content = file.read_bytes()
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(UserError, match=f"{name} does not have its checksum"):
            open_knowledge_base(tmp_path, verify=True)
        file.write_bytes(content)
    open_knowledge_base(tmp_path, verify=True)


def test_one_writer_at_a_time(tmp_path):
    fcntl = pytest.importorskip("fcntl")
    build(tmp_path)
    with open(tmp_path / ".lock", "ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another process is writing"):
            delete_documents(tmp_path, ["d1"])
    assert len(ids(tmp_path)) == 8


def test_a_failed_first_build_leaves_nothing(tmp_path):
    class Broken(Encoder):
        def encode(self, texts):
            raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match="No space left"):
        build_knowledge_base(documents(), tmp_path / "kb", "dense", encoder=Broken())
    assert not (tmp_path / "kb").exists()


# --- readers beside writers


def test_a_base_that_is_replaced_while_it_is_opened_is_opened_anew(tmp_path, monkeypatch):
    """A slow reader: between its first look and its reading, two changes remove what it looked at."""
    build(tmp_path)
    look, changes = knowledge_base._open, iter([["d1"], ["d2"], ["d3"], ["d4"]])

    def slowly(path):
        found = look(path)
        for ids in itertools.islice(changes, 2):
            with monkeypatch.context() as at_once:
                at_once.setattr(knowledge_base, "_open", look)
                delete_documents(path, ids)
        return found

    monkeypatch.setattr(knowledge_base, "_open", slowly)
    manager = RetrievalManager(knowledge_base_path=tmp_path)
    assert (len(manager), manager.version) == (4, "v0005")
    monkeypatch.setattr(knowledge_base, "_open", look)
    delete_documents(tmp_path, ["d5"])
    changes = iter([["d6"], ["d7"]])
    monkeypatch.setattr(knowledge_base, "_open", slowly)
    assert manager.refresh(now=True) and (len(manager), manager.version) == (1, "v0008")
    assert [document.id for document in manager.retrieve("common")] == ["d0"]


def test_a_file_that_is_removed_while_it_is_looked_at_is_missing(tmp_path, monkeypatch):
    build(tmp_path)
    look, gone = Path.stat, []

    def stat(path, **settings):
        if path.name == "codes.npy":
            gone.append(path)
            if len(gone) == 2:  # there at the first look
                path.unlink()
        return look(path, **settings)

    monkeypatch.setattr(Path, "stat", stat)
    open_knowledge_base(tmp_path)
    with pytest.raises(UserError, match=r"codes\.npy is missing"):
        open_knowledge_base(tmp_path)


def test_an_old_reader_can_begin_to_filter(tmp_path):
    new = [Document(f"d{n}", "", "common", metadata={"even": n % 2 == 0}) for n in range(8)]
    old = build_knowledge_base(new, tmp_path, "bm25").retriever()
    for id in ("d0", "d1"):
        delete_documents(tmp_path, [id])
    assert {document.id for document in old.search(["common"], 10, {"even": True})[0]} == {"d0", "d2", "d4", "d6"}


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="/proc says which files are open")
@pytest.mark.parametrize("retriever_type", TYPES)
def test_files_of_a_base_are_closed_with_it(tmp_path, retriever_type):
    """At once, not when the garbage collector comes by: a server opens every version."""
    build(tmp_path, retriever_type)
    gc.disable()
    try:
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(3):
            ids(tmp_path, **encoder_for(retriever_type))
        assert len(os.listdir("/proc/self/fd")) == before
    finally:
        gc.enable()


# --- writers that fail on the way


def test_a_version_that_cannot_be_named_is_removed(tmp_path, monkeypatch):
    def full(path, text):
        raise OSError(28, "No space left on device")

    build(tmp_path)
    monkeypatch.setattr(knowledge_base, "atomic_write_text", full)
    with pytest.raises(UserError, match=r"No space left on device.*make room there, and run it again"):
        delete_documents(tmp_path, ["d1"])
    assert sorted(os.listdir(tmp_path)) == [".lock", "CURRENT", "v0001"] and len(ids(tmp_path)) == 8


def test_a_full_disk_is_not_kept_full_by_what_was_encoded(tmp_path, monkeypatch):
    monkeypatch.setattr("nanochat.retrieval.segment.ENCODED_AT_ONCE", 3)

    class Full(Encoder):
        def encode(self, texts):
            if "word6" in texts[0]:
                assert list((tmp_path / "kb").glob(".encoded-*"))
                raise OSError(28, "No space left on device")
            return super().encode(texts)

    with pytest.raises(UserError, match="No space left"):
        build_knowledge_base(documents(), tmp_path / "kb", "dense", encoder=Full())
    assert not (tmp_path / "kb").exists()


def test_a_damaged_current_loses_no_version(tmp_path):
    build(tmp_path)
    delete_documents(tmp_path, ["d1"])
    (tmp_path / "CURRENT").write_bytes(b"\0\0\0\0\0")
    with pytest.raises(UserError, match=r"CURRENT.*go back to v0002: .* rollback .*or build it again"):
        open_knowledge_base(tmp_path)
    assert rollback(tmp_path).version == "v0003" and len(ids(tmp_path)) == 7
    (tmp_path / "CURRENT").unlink()
    with pytest.raises(UserError, match="not finished"):
        rollback(tmp_path)
    assert {"v0002", "v0003"} <= set(os.listdir(tmp_path))


# --- the manager


def test_augmented_conversation_has_the_documents_before_the_last_question():
    manager = RetrievalManager("bm25", documents=[document.to_dict() for document in documents()])
    conversation = {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "word1?"},
            {"role": "assistant", "content": "Yes."},
            {"role": "user", "content": "word2?"},
        ],
        "metadata": {"id": 1},
    }
    before = json.dumps(conversation)
    augmented = manager.augment_conversation(conversation, top_k=2)
    assert json.dumps(conversation) == before
    roles = [message["role"] for message in augmented["messages"]]
    assert roles == ["system", "user", "assistant", "retrieval", "user"]
    assert augmented["messages"][3]["documents"][0]["id"] == "d2"
    assert augmented["messages"][3]["documents"][0]["score"] > 0
    assert augmented["metadata"] == {"id": 1}
    nothing = manager.augment_conversation({"messages": [{"role": "user", "content": "zzz"}]})
    assert nothing["messages"][0] == {"role": "retrieval", "documents": []}
    with pytest.raises(UserError, match="no user message"):
        manager.augment_conversation({"messages": []})


def test_manager_needs_one_source(tmp_path):
    with pytest.raises(UserError, match="one of them"):
        RetrievalManager("bm25")
    with pytest.raises(UserError, match="one of them"):
        RetrievalManager("bm25", tmp_path, documents=[])
    build(tmp_path)
    assert len(RetrievalManager("bm25", knowledge_base=tmp_path)) == 8
