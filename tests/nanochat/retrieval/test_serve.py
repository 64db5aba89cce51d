"""The server, its client, and readers beside a writer."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import socket
import subprocess
import sys
import threading
import time

import pytest

from nanochat.common import UserError
from nanochat.retrieval import Document, RetrievalManager
from nanochat.retrieval.client import RetrievalClient
from nanochat.retrieval.knowledge_base import add_documents, build_knowledge_base, delete_documents
from nanochat.retrieval.serve import LARGEST_REQUEST, Server
from nanochat.tokenizer import SPECIAL_TOKENS

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


# --- slow clients, strange ones, and those that come from a web page


PATIENCE = 0.5
LONG = Document("long", "", "longword " + "filler " * 600_000)
SECRET = "xylophon"


@pytest.fixture(scope="module")
def long_manager() -> RetrievalManager:
    return RetrievalManager("bm25", documents=[*DOCUMENTS, LONG])


@pytest.fixture
def impatient(long_manager):
    """A server that has two places and half a second."""
    server = Server(long_manager, "127.0.0.1", 0, most_connections=2, patience=PATIENCE)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@contextlib.contextmanager
def dialled(server: Server):
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.settimeout(20)
        client.connect(("127.0.0.1", server.server_port))
        yield client


def everything(client: socket.socket) -> bytes:
    """What comes until the server hangs up."""
    answer = b""
    with contextlib.suppress(ConnectionError):
        while piece := client.recv(65536):
            answer += piece
    return answer


POST = b"POST /search HTTP/1.1\r\nHost: localhost\r\n"


@pytest.mark.parametrize(
    ("start", "drip"),
    [
        (b"", b""),  # nothing at all
        (b"GET /health HTTP/1.1\r\n", b""),
        (b"GET /health HTTP/1.1\r\nX: ", b"x"),
        (POST + b"Content-Length: 1000\r\n\r\n{", b""),
        (POST + b"Content-Length: 1000\r\n\r\n{", b" "),
        (b"GET /health HTTP/1.1\r\n\r\n", b""),  # answered, and nothing more comes
        (b"GET /health HTTP/1.1\r\n\r\n", b"G"),
    ],
)
def test_who_is_slow_to_ask_is_left(impatient, start, drip):
    with dialled(impatient) as client:
        client.sendall(start)
        client.settimeout(0.1)
        began = time.monotonic()
        while time.monotonic() < began + 10:
            with contextlib.suppress(TimeoutError, BrokenPipeError):
                client.sendall(drip)
                try:
                    if not client.recv(1000):
                        break
                except ConnectionError:
                    break
        assert PATIENCE * 0.9 < time.monotonic() - began < 8


def test_who_does_not_read_gives_its_place_back(impatient):
    body = b'{"queries": ["longword"]}'
    with dialled(impatient) as first, dialled(impatient) as second:
        for client in (first, second):
            client.sendall(POST + f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
            assert client.recv(12) == b"HTTP/1.1 200"
        with dialled(impatient) as third:
            answer = everything(third)
            assert answer.startswith(b"HTTP/1.1 503") and b"too many connections" in answer
        with pytest.raises(UserError, match="too many connections"):
            RetrievalClient(f"http://127.0.0.1:{impatient.server_port}").search(["rare"])
        time.sleep(PATIENCE + 0.2)
        until = time.monotonic() + 8
        while True:
            with contextlib.suppress(UserError):
                (found,) = RetrievalClient(f"http://127.0.0.1:{impatient.server_port}").search(["rare"])
                break
            assert time.monotonic() < until
            time.sleep(0.05)
        assert found[0].id == "d5"


@pytest.mark.parametrize("method", ["GET", "POST"])
@pytest.mark.parametrize(
    "length",
    [
        f"Content-Length: {LARGEST_REQUEST + 1}",
        "Content-Length: " + "9" * 5000,
        "Content-Length: -1",
        "Content-Length: 1_0",
        "Transfer-Encoding: chunked",
        "Transfer-Encoding: chunked\r\nContent-Length: 2",
    ],
)
def test_a_body_of_no_good_length_is_not_read(impatient, method, length):
    """Nor taken for the next request."""
    path = "/search" if method == "POST" else "/health"
    with dialled(impatient) as client:
        client.sendall(f"{method} {path} HTTP/1.1\r\n{length}\r\n\r\nGET /stats HTTP/1.1\r\n\r\n".encode())
        answer = everything(client)
    status = b"HTTP/1.1 400" if method == "POST" else b"HTTP/1.1 200"
    assert answer.startswith(status) and answer.count(b"HTTP/1.1") == 1


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (b"GET /" + b"x" * 70_000 + b" HTTP/1.1\r\n\r\n", 414),
        (b"GET /health HTTP/1.1\r\nX: " + b"x" * 70_000 + b"\r\n\r\n", 431),
        (b"GET /health HTTP/1.1\r\n" + b"X: y\r\n" * 200 + b"\r\n", 431),
        (b"<script>alert(1)</script>\r\n\r\n", 400),
        (b"GET /health HTTP/9.9\r\n\r\n", 505),
        (b"OPTIONS /search HTTP/1.1\r\nOrigin: https://evil.example\r\n\r\n", 501),
        (b"DELETE /search HTTP/1.1\r\n\r\n", 501),
        (b"GET /health HTTP/1.1\r\nOrigin: https://evil.example\r\n\r\n", 403),
        (POST + b"Origin: null\r\nContent-Type: text/plain\r\nContent-Length: 2\r\n\r\n{}", 403),
        (b"GET /stats HTTP/1.1\r\nHost: evil.example:8090\r\n\r\n", 403),
        (b"GET /stats HTTP/1.1\r\nHost: [\r\n\r\n", 403),
    ],
)
def test_what_it_refuses_it_refuses_as_it_answers(impatient, head, status):
    with dialled(impatient) as client:
        with contextlib.suppress(ConnectionError):
            client.sendall(head)
        answer = everything(client)
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 %d" % status) and b"Connection: close" in head
    assert b"nosniff" in head and b"Access-Control" not in head and b"Python" not in head
    assert set(json.loads(body)) == {"error"} and b"<" not in body


def test_names_of_this_machine(served, tmp_path):
    for host in ("localhost", "localhost:1", "127.0.0.1:8090", "[::1]:8090"):
        assert ask(served[0], "GET", "/health", headers={"Host": host})[0] == 200
    for host in ("evil.example", "localhost.evil.example"):
        assert ask(served[0], "POST", "/delete", b'{"ids": ["d1"]}', {"Host": host})[0] == 403
    assert len(served[0]) == 6
    server = Server(RetrievalManager(knowledge_base_path=served[1]), "0.0.0.0", 0)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    client = RetrievalClient(f"http://127.0.0.1:{server.server_port}")
    assert ask(client, "GET", "/health", headers={"Host": "other-machine:8090"})[0] == 200
    server.shutdown()
    server.server_close()


def test_what_fails_is_told_to_the_one_who_asked(served, monkeypatch, capfd):
    def broken(*args):
        raise FileNotFoundError(SECRET)

    monkeypatch.setattr(RetrievalManager, "search_with_version", broken)
    status, answer = ask(served[0], "POST", "/search", b'{"queries": ["x"]}')
    assert status == 500 and SECRET in answer["error"]
    assert SECRET not in "".join(capfd.readouterr())


def test_all_is_compiled_before_anybody_asks(tmp_path, monkeypatch):
    numba = pytest.importorskip("numba")
    compiled = []
    from nanochat.retrieval import scoring

    best = scoring.best
    monkeypatch.setattr(scoring, "best", lambda *args: compiled.append(args[-1]) or best(*args))
    build_knowledge_base(DOCUMENTS, tmp_path / "kb", "bm25")
    manager = RetrievalManager(knowledge_base_path=tmp_path / "kb")
    server = Server(manager, "127.0.0.1", 0)
    server.server_close()
    assert numba and compiled and all(compiled)
    compiled.clear()
    manager.retrieve("rare")
    assert compiled == [True]


def test_nothing_that_is_asked_is_logged(tmp_path):
    """The command's whole output, after questions, mistakes and strange requests."""
    build_knowledge_base([*DOCUMENTS, Document(SECRET, SECRET, SECRET)], tmp_path / "kb", "bm25")
    command = [sys.executable, "-m", "nanochat.retrieval", "serve", "--knowledge_base", tmp_path / "kb", "--port", "0"]
    process = subprocess.Popen(
        [*map(str, command), "--allow_changes", "true"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    try:
        first = process.stdout.readline()
        client = RetrievalClient(first.split()[-1])
        assert client.search([SECRET])[0][0].id == SECRET
        assert client.get([SECRET, f"no {SECRET}"])[1] is None
        client.add([Document(f"new {SECRET}", "", SECRET)])
        for wrong in (lambda: client.delete([f"no {SECRET}"]), lambda: client.search(["x"], where={SECRET: {"x": 1}})):
            with pytest.raises(UserError):
                wrong()
        place = client.url.split("//")[1].rsplit(":", 1)
        for strange in (f"GET /{SECRET} HTTP/1.1\r\n\r\n", f"{SECRET}\r\n\r\n", f"{SECRET} / HTTP/1.1\r\n\r\n", "{"):
            with socket.create_connection((place[0], int(place[1])), timeout=20) as connection:
                connection.sendall(strange.encode())
                connection.shutdown(socket.SHUT_WR)
                everything(connection)
        with socket.create_connection((place[0], int(place[1])), timeout=20) as connection:
            body = json.dumps({"queries": [SECRET] * 1000, "top_k": 100}).encode()
            connection.sendall(POST + f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # leaves without a word
        assert client.search([SECRET])[0]
    finally:
        process.terminate()
        rest, _ = process.communicate(timeout=20)
    assert SECRET not in first + rest and "Traceback" not in rest, rest


def test_spellings_of_control_tokens_in_queries(tmp_path, monkeypatch, make_model, small_tokenizer):
    """Of a base that our own model searches and orders: it reads the control tokens of the structure alone."""
    pytest.importorskip("torch")
    from nanochat.checkpoint_manager import checkpoint_root, save_checkpoint
    from nanochat.model.lm import HybridLM

    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    for source in ("embed", "rag"):
        model = make_model(small_tokenizer.vocab_size)
        save_checkpoint(checkpoint_root(source, "tiny"), 1, model, small_tokenizer, {"training_config": {"cite": True}})
    build_knowledge_base(DOCUMENTS, tmp_path / "kb", "hybrid", model="self", rerank="self", rerank_candidates=2)
    server = Server(RetrievalManager(knowledge_base_path=tmp_path / "kb"), "127.0.0.1", 0)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    client = RetrievalClient(f"http://127.0.0.1:{server.server_port}")
    first_special = min(small_tokenizer.special_id(name) for name in SPECIAL_TOKENS)
    read: list[list[int]] = []
    forward = HybridLM.forward

    def noted(self, tokens, *args, **kwargs):
        read.extend(row.tolist() for row in tokens)
        return forward(self, tokens, *args, **kwargs)

    monkeypatch.setattr(HybridLM, "forward", noted)

    def control(query: str) -> list[list[int]]:
        read.clear()
        client.search([query], 2)
        assert len(read) >= 2 and any(query in small_tokenizer.decode(row) for row in read)
        return sorted([token for token in row if token >= first_special] for row in read)

    plain = control("zzz qqq")
    for name in [*SPECIAL_TOKENS, "".join(SPECIAL_TOKENS)]:
        assert control(name) == plain, name
        with pytest.raises(UserError, match="id"):
            client.score("x", [name])
        assert client.get([name]) == [None]
    server.shutdown()
    server.server_close()


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
