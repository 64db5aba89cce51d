"""The web chat's server against clients that mean it ill, or are slow: what it refuses, whom it leaves, what it says
of itself and what it keeps to itself."""

from __future__ import annotations

import contextlib
import hmac
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from nanochat.checkpoint_manager import checkpoint_root, save_checkpoint
from nanochat.engine import Engine
from nanochat.retrieval import Document, RetrievalManager
from nanochat.retrieval.knowledge_base import build_knowledge_base
from nanochat.tokenizer import SPECIAL_TOKENS

pytest.importorskip("fastapi")
httpx = pytest.importorskip("httpx")
pytest.importorskip("openai")

from scripts._completions import Completion  # noqa: E402
from scripts._guard import MAX_BODY_BYTES, Connection  # noqa: E402
from scripts.chat_web import Config  # noqa: E402
from tests.scripts.test_chat_web import DOCUMENTS, JSON, Server, said, wait_until  # noqa: E402

REPOSITORY = Path(__file__).parents[2]
LONG = Document("long", "A long one", "word " * 800_000)
PATIENCE = 0.7
CHAT = "/v1/chat/completions"
HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


@pytest.fixture(scope="module")
def model(small_tokenizer, make_model):
    model = make_model(small_tokenizer.vocab_size, "MT")
    with torch.no_grad():  # its answers go on and on
        model.lm_head.weight[Engine(model, small_tokenizer).end] = 0.0
    return model


@pytest.fixture(scope="module")
def engine(model, small_tokenizer) -> Engine:
    return Engine(model, small_tokenizer)


@pytest.fixture(scope="module")
def server(engine) -> Iterator[Server]:
    manager = RetrievalManager("bm25", documents=[*DOCUMENTS, LONG])
    server = Server(Config([], max_tokens=8, top_k=2, max_rows=4, max_waiting=4), engine, {"guide": manager})
    yield server
    server.close()


@pytest.fixture
def impatient(server, monkeypatch) -> Server:
    monkeypatch.setattr(Connection, "patience", PATIENCE)
    for listening in server.server.servers[0].sockets:  # else the kernel takes whole answers off the server's hands
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    return server


@pytest.fixture
def client(server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=20) as client:
        yield client


@contextlib.contextmanager
def dialled(server: Server, receive_buffer: int = 0) -> Iterator[socket.socket]:
    with socket.socket() as client:
        if receive_buffer:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        client.settimeout(20)
        client.connect(("127.0.0.1", server.port))
        yield client


def connections(server: Server) -> int:
    return len(server.server.server_state.connections)


def left_after(client: socket.socket, drips: Iterator[bytes], pause: float = 0.1) -> float:
    """Seconds until the server leaves a client that sends these pieces, one after the other."""
    began = time.monotonic()
    client.settimeout(pause)
    for drip in drips:
        with contextlib.suppress(ConnectionError):
            client.sendall(drip)
        try:
            while client.recv(65536):
                pass
            break
        except TimeoutError:
            continue
        except ConnectionError:
            break
    else:
        raise AssertionError(f"not left in {time.monotonic() - began:.0f} seconds")
    return time.monotonic() - began


# --- slow clients


def dripped(start: bytes, drip: bytes) -> Iterator[bytes]:
    yield start
    for _ in range(100):
        yield drip


@pytest.mark.parametrize(
    ("start", "drip"),
    [
        (b"", b""),  # nothing at all
        (b"GET /health HTTP/1.1\r\n", b""),
        (b"GET /health HTTP/1.1\r\nX: ", b"x"),
        (HEAD + b"Content-Length: 1000\r\n\r\n{", b""),
        (HEAD + b"Content-Length: 1000\r\n\r\n{", b" "),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\n \r\n"),
        (HEAD + b"Content-Length: 9000000\r\n\r\n", b" " * 1000),  # answered before it has come
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\n \r\n"),
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n", b""),  # answered, and nothing more comes
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n", b"G"),
    ],
)
def test_who_is_slow_to_ask_is_left(impatient, start, drip):
    with dialled(impatient) as client:
        assert PATIENCE * 0.9 < left_after(client, dripped(start, drip)) < 8
    wait_until(lambda: connections(impatient) == 0)


@pytest.mark.parametrize("streaming", [True, False])
def test_who_does_not_read_is_left(impatient, streaming):
    if streaming:
        body = json.dumps({"messages": said(), "max_tokens": 1800, "stream": True, "retrieval": False}).encode()
        request = HEAD + f"Content-Length: {len(body)}\r\n\r\n".encode() + body
    else:
        request = b"GET /v1/knowledge_bases/guide/documents/long HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with dialled(impatient, 4096) as client:
        client.sendall(request)
        wait_until(lambda: any(c.transport.get_write_buffer_size() for c in impatient.server.server_state.connections))
        began = time.monotonic()
        wait_until(lambda: connections(impatient) == 0)
        assert PATIENCE * 0.5 < time.monotonic() - began < 8
    wait_until(lambda: impatient.load == 0)


def test_who_reads_slowly_gets_all_of_it(impatient):
    began, size = time.monotonic(), 0
    with dialled(impatient, 65536) as client:
        client.sendall(b"GET /v1/knowledge_bases/guide/documents/long HTTP/1.1\r\nHost: localhost\r\n\r\n")
        while size < len(LONG.content):
            piece = client.recv(100_000)
            assert piece, size
            size += len(piece)
            time.sleep(2.5 * PATIENCE / 40)
    assert time.monotonic() - began > 2 * PATIENCE


def test_who_waits_for_a_long_answer_gets_it(impatient, engine, monkeypatch):
    read_next = engine.read_next

    def slow(*args):
        time.sleep(PATIENCE / 4)
        return read_next(*args)

    monkeypatch.setattr(engine, "read_next", slow)
    for streaming in (False, True):
        began = time.monotonic()
        body = {"messages": said(), "max_tokens": 10, "stream": streaming}
        response = httpx.post(impatient.url + CHAT, json=body, timeout=20)
        assert response.status_code == 200 and '"length"' in response.text
        assert time.monotonic() - began > 2 * PATIENCE


def test_who_asks_often_stays(impatient):
    connection = http.client.HTTPConnection("127.0.0.1", impatient.port, timeout=20)
    connection.connect()
    connection.auto_open = 0  # a second one would be an error
    for _ in range(10):
        connection.request("GET", "/health")
        assert connection.getresponse().read() == b'{"status":"ok","load":0}'
        time.sleep(PATIENCE / 4)
    connection.close()


# --- too much


ROUTES = [("GET", path) for path in ("/", "/health", "/openapi.json", "/v1/models", "/v1/knowledge_bases", "/nowhere")]
ROUTES += [("GET", "/v1/knowledge_bases/guide/documents/bridge"), ("POST", CHAT), ("POST", "/nowhere"), ("PUT", CHAT)]


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_long_bodies_are_refused_unread(server, method, path):
    with dialled(server) as client:
        client.sendall(f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2000001\r\n\r\n".encode())
        answer = b""
        while b"request_too_large" not in answer:
            piece = client.recv(65536)
            assert piece, answer
            answer += piece
    assert answer.startswith(b"HTTP/1.1 413")


@pytest.mark.parametrize(
    ("method", "path", "status"), [("POST", CHAT, 413), ("POST", "/nowhere", 404), ("PUT", CHAT, 405)]
)
def test_bodies_of_no_stated_length_are_read_to_the_limit(server, method, path, status):
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
    pieces = (b" " * 100_000 for _ in range(2 * MAX_BODY_BYTES // 100_000))
    connection.request(method, path, pieces, JSON, encode_chunked=True)
    assert connection.getresponse().status == status
    connection.close()
    wait_until(lambda: connections(server) == 0)


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (b"X: " + b"x" * 20_000, b"400"),  # has no end
        (b"\r\n".join(b"X%d: x" % n for n in range(3000)), b"400"),
        (b"X: " + b"x" * 20_000 + b"\r\nConnection: close\r\n\r\n", b"431"),
        (b"X: yyyy\r\n" * 4000 + b"Connection: close\r\n\r\n", b"431"),
    ],
)
def test_long_heads_are_refused(server, head, status):
    with dialled(server) as client:
        client.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n" + head)
        answer = b""
        with contextlib.suppress(ConnectionError):
            while piece := client.recv(65536):
                answer += piece
    assert answer.startswith(b"HTTP/1.1 " + status) and b'{"error"' in answer
    assert b"content-security-policy" in answer.lower()


def test_where_all_places_are_taken_nothing_is_searched(server, client, monkeypatch):
    searched = []
    chat = server.app.state.chat
    monkeypatch.setattr(chat.managers["guide"], "retrieve", lambda *args: searched.append(args) or [])
    assert client.post(CHAT, json={"messages": said()}).status_code == 200 and len(searched) == 1
    assert client.post(CHAT, json={"messages": said("bridge " * 3000)}).status_code == 400
    assert len(searched) == 1  # what the model cannot read is not searched for either
    monkeypatch.setattr(type(chat), "full", True)
    for streaming in (True, False):
        response = client.post(CHAT, json={"messages": said(), "stream": streaming})
        assert response.status_code == 429 and response.headers["retry-after"] and len(searched) == 1


# --- what it says, and to whom


def test_headers_on_every_answer(server, client, monkeypatch):
    def broken(*args):
        raise RuntimeError("broken")

    def answers() -> Iterator[httpx.Response]:
        yield client.get("/")
        yield client.get("/v1/models")
        yield client.get("/nowhere")
        yield client.get(CHAT)
        yield client.post(CHAT, json={"messages": said()})
        yield client.post(CHAT, json={"messages": said(), "stream": True})
        yield client.post(CHAT, json={})
        yield client.post(CHAT, content=b"x" * 3_000_000)
        yield client.get("/health", headers={"Host": "evil.example"})
        yield client.get("/health", headers={"X": "x" * 20_000})
        monkeypatch.setattr(server.app.state.chat.managers["guide"], "retrieve", broken)
        yield client.post(CHAT, json={"messages": said()})

    statuses = []
    for answer in answers():
        statuses.append(answer.status_code)
        assert "script-src 'sha256-" in answer.headers["content-security-policy"]
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"
        assert not {"server", "access-control-allow-origin"} & set(answer.headers)
        if answer.status_code >= 400:
            assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    assert statuses == [200, 200, 404, 405, 200, 200, 400, 413, 400, 431, 500]


def test_pages_of_other_sites_are_not_let_in(client):
    asks = {"Origin": "https://evil.example", "Access-Control-Request-Method": "POST"}
    asks["Access-Control-Request-Headers"] = "content-type"
    for path in ("/", "/health", "/v1/models", CHAT):
        preflight = client.options(path, headers=asks)
        assert preflight.status_code == 405
        assert not [name for name in preflight.headers if name.startswith("access-control")]
    answer = client.post(CHAT, json={"messages": said()}, headers={"Origin": "https://evil.example"})
    assert not [name for name in answer.headers if name.startswith("access-control")]


def statuses_for(server: Server, hosts: list[str]) -> list[int]:
    with httpx.Client(base_url=server.url) as client:
        return [client.get("/health", headers={"Host": host}).status_code for host in hosts]


def test_names_of_other_hosts(server, engine):
    own = ["localhost", "localhost:8000", "LOCALHOST:1", "127.0.0.1:9", "[::1]:8000"]
    assert statuses_for(server, own) == [200] * len(own)
    others = ["evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.evil.example", "", "[", "a b"]
    assert statuses_for(server, others) == [400] * len(others)
    with dialled(server) as client:
        client.sendall(b"GET /health HTTP/1.0\r\n\r\n")
        assert client.recv(100).startswith(b"HTTP/1.1 400")
    manager = RetrievalManager("simple", documents=DOCUMENTS)
    for config, taken, refused in (
        (
            Config([], allowed_hosts=["chat.example.org"]),
            ["chat.example.org", "Chat.Example.Org:443"],
            ["evil.example"],
        ),
        (Config([], host="0.0.0.0"), ["evil.example", "10.0.0.5:8000"], []),
        (Config([], host="0.0.0.0", allowed_hosts=["box"]), ["box:8000", "localhost"], ["evil.example"]),
        (Config([], host="::1"), ["[::1]:8000"], ["evil.example"]),
    ):
        other = Server(config, engine, {"guide": manager})
        with contextlib.closing(other):
            assert statuses_for(other, taken) == [200] * len(taken), config
            assert statuses_for(other, refused) == [400] * len(refused), config


def test_the_key_opens_everything_but_the_page(engine, monkeypatch):
    compared = []
    compare = hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", lambda *pair: compared.append(pair) or compare(*pair))
    server = Server(Config([], api_key="sesame"), engine, {"guide": RetrievalManager("simple", documents=DOCUMENTS)})
    with contextlib.closing(server), httpx.Client(base_url=server.url) as client:
        for method, path in ROUTES:
            for sent in ("", "sesame", "Basic sesame", "Bearer", "Bearer Sesame", "Bearer sesam", "Bearer sesamee"):
                headers = {"Authorization": sent} if sent else {}
                answer = client.request(method, path, headers=headers)
                assert answer.status_code == (200 if path in ("/", "/health") else 401), (path, sent)
                assert answer.status_code == 200 or answer.headers["www-authenticate"] == "Bearer"
            for sent in ("Bearer sesame", "bearer sesame"):
                answer = client.request(method, path, headers={"Authorization": sent})
                assert answer.status_code != 401
        assert (b"sesam", b"sesame") in compared  # in a time that does not tell how much of it is right
        # nor is a body read before the key is known
        with dialled(server) as connection:
            connection.sendall(HEAD + b"Content-Length: 1000\r\n\r\n")
            assert connection.recv(100).startswith(b"HTTP/1.1 401")


# --- what it keeps to itself


SECRET = "xylophon"


def test_errors_are_told_without_their_words(server, engine, monkeypatch, capfd):
    def broken(*args):
        raise RuntimeError(SECRET)

    with monkeypatch.context() as patch:
        patch.setattr(server.app.state.chat.managers["guide"], "retrieve", broken)
        answer = httpx.post(server.url + CHAT, json={"messages": said()})
        assert answer.status_code == 500 and SECRET not in answer.text
    monkeypatch.setattr(engine, "read_next", broken)
    answer = httpx.post(server.url + CHAT, json={"messages": said()})
    assert answer.status_code == 500 and SECRET not in answer.text
    answer = httpx.post(server.url + CHAT, json={"messages": said(), "stream": True})
    assert answer.status_code == 200 and "internal_error" in answer.text and SECRET not in answer.text
    log = capfd.readouterr().err
    assert log.count("RuntimeError:") == 3 and "in broken" in log and SECRET not in log


@pytest.fixture(scope="module")
def home(tmp_path_factory, model, small_tokenizer) -> Path:
    """A base directory with the model as rag/tiny, and a base beside it."""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(home))
        settings = {"training_config": {"max_seq_len": 4000}}
        save_checkpoint(checkpoint_root("rag", "tiny"), 1, model, small_tokenizer, settings)
    documents = [*DOCUMENTS, Document("s", SECRET, f"{SECRET} is a word.")]
    build_knowledge_base(documents, home / "rag_examples/knowledge_base", "bm25")
    (home / "rag_examples/queries").mkdir()
    question = {"id": "q", "query": f"what is {SECRET}?", "answers": ["a word"], "doc_ids": ["s"]}
    (home / "rag_examples/queries/test.jsonl").write_text(json.dumps(question) + "\n")
    return home


def test_nothing_that_is_said_is_logged(home):
    """The command itself, its whole output, after questions, mistakes, attacks, and a stop in the middle of an
    answer."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        "-m",
        "scripts.chat_web",
        "--knowledge_base",
        home / "rag_examples/knowledge_base",
        "--port",
        port,
        "--device",
        "cpu",
    ]
    process = subprocess.Popen(
        [sys.executable, *map(str, command)],
        cwd=REPOSITORY,
        env={**os.environ, "NANOCHAT_BASE_DIR": str(home)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    url = f"http://127.0.0.1:{port}"
    try:
        wait_until(lambda: process.poll() is not None or accepts(port), 60)
        with httpx.Client(base_url=url, timeout=60) as client:
            talk = [{"role": "system", "content": SECRET}, *said(SECRET), {"role": "assistant", "content": SECRET}]
            body = {"messages": [*talk, *said(f"what is {SECRET}?")], "max_tokens": 4, "user": SECRET}
            answer = client.post(CHAT, json=body)
            assert answer.status_code == 200 and SECRET in answer.text  # in what was found
            assert client.post(CHAT, json={**body, "stream": True}).status_code == 200
            for wrong in ({"model": SECRET}, {"knowledge_base": SECRET}, {"stop": [SECRET] * 9}, {SECRET: SECRET}):
                client.post(CHAT, json={**body, **wrong})
            client.post(CHAT, json={"messages": [{"role": SECRET, "content": SECRET}]})
            client.post(CHAT, content=f'{{"{SECRET}": '.encode(), headers=JSON)
            client.post(CHAT, json={**body, "messages": said(f"{SECRET} " * 5000)})
            client.post(CHAT, content=SECRET.encode() * 300_000)
            client.get(f"/v1/knowledge_bases/rag_examples/documents/{SECRET}")
            client.get(f"/v1/knowledge_bases/{SECRET}/documents/s?{SECRET}")
            client.get("/v1/models", headers={"Authorization": f"Bearer {SECRET}", "Host": f"{SECRET}.example"})
        for garbage in (SECRET.encode() + b"\r\n\r\n", f"GET /{SECRET} {SECRET}\r\n\r\n".encode(), b"\x16\x03\x01"):
            with socket.create_connection(("127.0.0.1", port), timeout=20) as client:
                client.sendall(garbage)
                client.recv(1000)
        with contextlib.suppress(httpx.ReadTimeout):
            httpx.post(url + CHAT, json={**body, "max_tokens": 3000}, timeout=0.3)
        with httpx.stream("POST", url + CHAT, json={**body, "max_tokens": 3000, "stream": True}, timeout=20) as answer:
            lines = answer.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            for _ in lines:
                pass
    except httpx.RemoteProtocolError:
        pass  # the server went in the middle of its answer
    finally:
        process.terminate()
        output, _ = process.communicate(timeout=30)
    assert b"rag-tiny over rag_examples" in output and b"Traceback" not in output, output.decode()
    assert SECRET.encode() not in output, output.decode()


def test_the_bench_that_asks_for_a_long_time(home):
    command = [sys.executable, "-m", "bench.soak", "--home", str(home), "--clients", "3", "--minutes", "0.1", "--json"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])["figures"]
    assert figures["soak_errors"] == 0, done.stdout
    assert figures["soak_whole"] and figures["soak_stream"] and abs(figures["soak_memory_growth"]) < 0.5


def accepts(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200
    except httpx.TransportError:
        return False


# --- text is never control


def test_spellings_of_control_tokens_in_every_field(server, engine):
    """Whatever a client sends, the prompt has the control tokens of its structure, and no other."""
    chat, tokenizer = server.app.state.chat, engine.tokenizer
    special = {tokenizer.special_id(name): name for name in SPECIAL_TOKENS}

    def control(text: str, **more) -> list[str]:
        messages = [
            {"role": "system", "content": text},
            {"role": "user", "content": text},
            {"role": "assistant", "content": text},
            {"role": "user", "content": [{"type": "text", "text": text[:2]}, {"type": "text", "text": text[2:]}]},
        ]
        shown = []
        for role in ("system", "developer"):
            messages[0]["role"] = role
            asked = Completion.model_validate({"messages": messages, "retrieval": False, **more})
            prepared = chat.prepare(asked)
            assert text in prepared.question and text in tokenizer.decode(prepared.request.prompt)
            shown += [special[token] for token in prepared.request.prompt if token in special]
        return shown

    plain = control("a b c")
    assert len(plain) == 2 * (1 + 2 + 2 + 2 + 2 + 1)
    for name in [*SPECIAL_TOKENS, "".join(SPECIAL_TOKENS)]:
        assert control(name) == plain, name
        assert control("a b c", stop=[name[:200]], user=name, metadata={name: name}) == plain
        # with documents: the one that spells all of them is found for each
        asked = Completion.model_validate({"messages": said(f"signs {name}"), "top_k": 1})
        prepared = chat.prepare(asked)
        assert [source.document.id for source in prepared.sources] == ["a/b c"]
        shown = [special[token] for token in prepared.request.prompt if token in special]
        blocks = ["retrieval_start", "doc_start", "doc_body", "doc_end", "retrieval_end", "user_start", "user_end"]
        assert sorted(shown) == sorted(f"<|{part}|>" for part in ("bos", *blocks, "assistant_start"))


@pytest.mark.parametrize("name", SPECIAL_TOKENS)
def test_spellings_of_control_tokens_as_names(client, name):
    for more, status in (({"model": name}, 404), ({"knowledge_base": name}, 404), ({"stop": [name]}, 200)):
        answer = client.post(CHAT, json={"messages": said(name), "max_tokens": 2, **more})
        assert answer.status_code == status and (status == 200 or name in answer.json()["error"]["message"])
    for path in (f"guide/documents/{name}", f"{name}/documents/bridge"):
        assert client.get(f"/v1/knowledge_bases/{path}").status_code == 404


def test_a_listener_that_fails_is_left_and_the_others_are_told(server, monkeypatch):
    """A client's event loop that is gone must not take the thread that decodes for all with it."""
    chat = server.app.state.chat
    prepared = chat.prepare(Completion.model_validate({"messages": said(), "max_tokens": 4}))
    heard = threading.Event()

    def listen(event):
        heard.set()
        raise RuntimeError("the loop is closed")

    chat.worker.submit(prepared.request, listen)
    assert heard.wait(20)
    wait_until(lambda: server.load == 0)
    assert httpx.post(server.url + CHAT, json={"messages": said()}).status_code == 200
