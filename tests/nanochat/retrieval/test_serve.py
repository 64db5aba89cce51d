"""The server, its client, and readers beside a writer."""

from __future__ import annotations

import http.client
import json
import subprocess
import sys
import threading
import time

import pytest

from nanochat.common import UserError
from nanochat.retrieval import Document, RetrievalManager
from nanochat.retrieval.client import RetrievalClient
from nanochat.retrieval.knowledge_base import add_documents, build_knowledge_base, delete_documents
from nanochat.retrieval.serve import Server

TEXTS = ["the café", "привет мир", "東京は大きい", "common words", "common words", "common rare"]
DOCUMENTS = [Document(f"d{n}", f"T{n}", text, "", {"n": n}) for n, text in enumerate(TEXTS)]


@pytest.fixture
def served(tmp_path):
    """(client, manager over the same base, path)"""
    build_knowledge_base(DOCUMENTS, tmp_path / "kb", "bm25")
    server = Server(RetrievalManager(knowledge_base_path=tmp_path / "kb"), "127.0.0.1", 0, allow_changes=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield RetrievalClient(f"http://127.0.0.1:{server.server_port}"), tmp_path / "kb"
    server.shutdown()
    server.server_close()


QUERIES = ["common", "café", "CAFE", "привет", "東京", "", "zzz", "rare words " * 1000]


def test_the_client_answers_as_the_retriever(served):
    client, path = served
    retriever = RetrievalManager(knowledge_base_path=path).retriever
    for top_k in (1, 3, 100):
        assert client.search(QUERIES, top_k) == retriever.search(QUERIES, top_k)
    client.queries_at_once = 3
    assert client.search(QUERIES) == retriever.search(QUERIES)
    assert client.search(["common"], 5, {"n": {"gte": 4}}) == retriever.search(["common"], 5, {"n": {"gte": 4}})
    assert client.search([]) == [] and len(client) == 6
    assert client.score("common", ["d5", "d0"]) == retriever.score("common", ["d5", "d0"])
    with pytest.raises(TypeError):
        client.search("common")
    assert RetrievalManager("client", url=client.url).retrieve("rare", 1)[0].id == "d5"


def test_changes_through_the_client(served):
    client, path = served
    client.add([Document("new", "", "common novelty"), Document("d0", "", "replaced")])
    assert client.search(["novelty", "café", "replaced"], 5)[0][0].id == "new"
    client.delete(["d1"])
    assert client.search(["привет"]) == [[]] and len(client) == 6
    assert RetrievalManager(knowledge_base_path=path).retrieve("replaced")[0].id == "d0"
    for wrong in (lambda: client.delete(["nobody"]), lambda: client.add([Document("", "", "x")])):
        with pytest.raises(UserError, match=r"nobody|id"):
            wrong()


def ask(client, method, path, body=b"", headers=None):
    host = client.url.split("//")[1]
    connection = http.client.HTTPConnection(host, timeout=10)
    connection.request(method, path, body, headers or {})
    answer = connection.getresponse()
    return answer.status, json.loads(answer.read())


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"{", "not JSON"),
        (b"[]", "JSON object"),
        (b"{}", '"queries"'),
        (b'{"queries": "x"}', '"queries"'),
        (b'{"queries": [1]}', '"queries"'),
        (b'{"queries": ["x"], "top_k": 0}', "top_k"),
        (b'{"queries": ["x"], "top_k": true}', "top_k"),
        (b'{"queries": ["x"], "where": 3}', "where"),
        (b'{"queries": ["x"], "where": {"n": {"above": 3}}}', "gte"),
        (b"[" * 100_000, "not JSON"),
    ],
)
def test_wrong_requests_are_told(served, body, reason):
    status, answer = ask(served[0], "POST", "/search", body)
    assert status == 400 and reason in answer["error"]
    assert ask(served[0], "GET", "/health") == (200, {"status": "ok"})


def test_other_paths_and_too_large_requests(served):
    assert ask(served[0], "GET", "/etc/passwd")[0] == 404
    assert ask(served[0], "POST", "/nothing", b"GET /stats HTTP/1.1\r\n\r\n")[0] == 404
    assert ask(served[0], "POST", "/search", b"", {"Content-Length": str(1 << 40)})[0] == 400
    status, stats = ask(served[0], "GET", "/stats")
    assert status == 200 and stats["retriever"] == "bm25" and stats["counts"] == {"documents": 6}


def test_a_server_that_only_searches(served, tmp_path):
    server = Server(RetrievalManager(knowledge_base_path=served[1]), "127.0.0.1", 0)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    client = RetrievalClient(f"http://127.0.0.1:{server.server_port}")
    with pytest.raises(UserError, match="--allow_changes"):
        client.delete(["d1"])
    with pytest.raises(UserError, match="cannot listen"):
        Server(RetrievalManager(knowledge_base_path=served[1]), "127.0.0.1", server.server_port)
    server.shutdown()
    server.server_close()
    with pytest.raises(UserError, match="no retrieval server answers"):
        client.search(["x"])
    with pytest.raises(UserError, match="http://"):
        RetrievalClient("localhost:80")


def test_the_command_serves_until_it_is_stopped(tmp_path):
    build_knowledge_base(DOCUMENTS, tmp_path / "kb", "bm25")
    command = [sys.executable, "-m", "nanochat.retrieval", "serve", "--knowledge_base", tmp_path / "kb", "--port", "0"]
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, text=True)
    try:
        line = process.stdout.readline()
        assert "6 documents (bm25) at http://127.0.0.1:" in line
        assert RetrievalClient(line.split()[-1]).search(["rare"], 1)[0][0].id == "d5"
    finally:
        process.terminate()
        process.wait()


def test_a_manager_sees_new_versions_within_a_second(tmp_path):
    build_knowledge_base(DOCUMENTS, tmp_path / "kb", "bm25")
    manager = RetrievalManager(knowledge_base_path=tmp_path / "kb")
    first = manager.retrieve("rare")
    first[0].metadata["n"] = "mine"  # what a caller does to a result is not remembered
    assert manager.retrieve("rare")[0].metadata == {"n": 5}
    add_documents(tmp_path / "kb", [Document("late", "", "rare")])
    time.sleep(1.1)
    assert [document.id for document in manager.retrieve("rare")] == ["late", "d5"]
    assert manager.version == "v0002" and len(manager) == 7


def test_sixteen_readers_and_one_writer(tmp_path):
    """Every answer is that of one whole version."""
    path = tmp_path / "kb"
    build_knowledge_base([Document(f"a{n:02d}", "", "common word") for n in range(50)], path, "bm25")
    manager = RetrievalManager(knowledge_base_path=path)
    wrong, stop, asked = [], threading.Event(), [0] * 16

    def read(number: int) -> None:
        while not stop.is_set():
            version, found = manager.search_with_version([f"common {number}"], 1000)
            step = int(version[1:]) - 1  # each change adds ten, every third deletes ten again
            expected = 50 + 10 * (step - step // 3) - 10 * (step // 3)
            if len(found[0]) != expected or len({document.id for document in found[0]}) != expected:
                wrong.append((version, len(found[0]), expected))
            asked[number] += 1

    threads = [threading.Thread(target=read, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for step in range(1, 10):
        if step % 3:
            add_documents(path, [Document(f"b{step}{n}", "", "common addition") for n in range(10)])
        else:
            delete_documents(path, [f"b{step - 1}{n}" for n in range(10)])
        manager.refresh(now=True)
    stop.set()
    for thread in threads:
        thread.join()
    assert not wrong and min(asked) > 0
