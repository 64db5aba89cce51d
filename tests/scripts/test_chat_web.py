"""The web chat's server as clients meet it: OpenAI's own client, bad requests, clients that leave, a browser."""

from __future__ import annotations

import json
import os
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import torch

from nanochat.common import UserError
from nanochat.engine import Engine
from nanochat.retrieval import Document, RetrievalManager
from nanochat.tokenizer import SPECIAL_TOKENS

pytest.importorskip("fastapi")
httpx = pytest.importorskip("httpx")
openai = pytest.importorskip("openai")
from nanochat.citations import Source, find_passage  # noqa: E402
from scripts._completions import annotate, describe  # noqa: E402
from scripts.chat_web import Config, create_app, create_server, listen, open_bases  # noqa: E402

JSON = {"Content-Type": "application/json"}
QUESTION = "When was the bridge built?"
DOCUMENTS = [
    Document("bridge", "The bridge", "It is old. The old bridge was built in 1987. It is long.", source="guide.txt"),
    Document("river", "The river <img src=x onerror=alert(1)>", "The river runs under the bridge. <script>1</script>"),
    Document("a/b c", "Signs", "".join(SPECIAL_TOKENS) + " a bridge of signs", source="https://example.org/signs"),
]


class Server:
    """The app on a port of its own, in a thread."""

    def __init__(self, config: Config, engine: Engine, managers: dict[str, RetrievalManager]):
        meta = {"model_tag": "tiny", "training_config": {"max_seq_len": 2000}}
        self.app = create_app(config, engine, meta, managers)
        sock = listen("127.0.0.1", 0)
        self.port = sock.getsockname()[1]
        self.server = create_server(self.app)
        self.thread = threading.Thread(target=self.server.run, args=([sock],), daemon=True)
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)
        self.url = f"http://127.0.0.1:{self.port}"

    @property
    def load(self) -> int:
        return self.app.state.chat.worker.load

    def client(self, key: str = "none") -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0)

    def close(self) -> None:
        self.server.should_exit = True
        self.thread.join(20)
        assert not self.thread.is_alive()


@pytest.fixture(scope="module")
def engine(small_tokenizer, make_model) -> Engine:
    model = make_model(small_tokenizer.vocab_size, "MT")
    with torch.no_grad():  # its answers go on and on
        model.lm_head.weight[Engine(model, small_tokenizer).end] = 0.0
    return Engine(model, small_tokenizer)


@pytest.fixture(scope="module")
def server(engine) -> Iterator[Server]:
    managers = {
        "guide": RetrievalManager("bm25", documents=DOCUMENTS),
        "other": RetrievalManager("simple", documents=[Document("sea", "The sea", "The sea is deep.")]),
    }
    server = Server(Config([], max_tokens=8, top_k=2, max_rows=4, max_waiting=4), engine, managers)
    yield server
    server.close()


def said(content: str = QUESTION) -> list[dict[str, str]]:
    return [{"role": "user", "content": content}]


# --- OpenAI's client


def test_an_answer_in_one_piece(server, engine):
    client = server.client()
    assert [model.id for model in client.models.list().data] == ["rag-tiny"]
    reply = client.chat.completions.create(model="rag-tiny", messages=said())
    choice = reply.choices[0]
    assert choice.finish_reason == "length" and choice.message.role == "assistant" and choice.message.content
    assert reply.usage.completion_tokens == 8
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + 8
    assert [source["id"] for source in reply.sources] == ["bridge", "river"] and reply.sources[0]["content"]
    found = {"role": "retrieval", "documents": [document.to_dict() for document in DOCUMENTS[:2]]}
    expected, _ = engine.generate_from_conversation({"messages": [found, *said()]}, max_tokens=8)
    assert choice.message.content == expected


def test_a_stream_says_the_same(server):
    client = server.client()
    whole = client.chat.completions.create(model="rag-tiny", messages=said(), max_tokens=20)
    chunks = list(
        client.chat.completions.create(
            model="rag-tiny", messages=said(), max_tokens=20, stream=True, stream_options={"include_usage": True}
        )
    )
    first, *middle, last, usage = chunks
    assert first.choices[0].delta.role == "assistant" and [s["id"] for s in first.sources] == ["bridge", "river"]
    text = "".join(chunk.choices[0].delta.content or "" for chunk in [first, *middle, last])
    assert text == whole.choices[0].message.content and len(middle) > 5
    assert last.choices[0].finish_reason == "length" and all(c.choices[0].finish_reason is None for c in middle)
    assert usage.choices == [] and usage.usage == whole.usage and all(c.usage is None for c in middle)
    assert len({chunk.id for chunk in chunks}) == 1
    response = httpx.post(f"{server.url}/v1/chat/completions", json={"messages": said(), "stream": True})
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = [line for line in response.text.split("\n") if line]
    assert lines[-1] == "data: [DONE]" and all("usage" not in json.loads(line[6:]) for line in lines[:-1])


def test_settings_of_the_request(server):
    create = server.client().chat.completions.create
    drawn = [
        create(model="", messages=said(), temperature=1.5, seed=seed).choices[0].message.content for seed in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    text = create(model="", messages=said(), max_tokens=20).choices[0].message.content
    stop = next(text[at : at + 3] for at in range(4, len(text)) if text[at : at + 3].strip().isalpha())
    assert stop.isascii(), text
    stopped = create(model="", messages=said(), max_tokens=20, stop=[stop])
    assert stopped.choices[0].message.content == text[: text.index(stop)].rstrip()
    assert stopped.choices[0].finish_reason == "stop"
    streamed = create(model="", messages=said(), max_tokens=20, stop=stop, stream=True)
    assert "".join(c.choices[0].delta.content or "" for c in streamed) == stopped.choices[0].message.content
    other = create(model="", messages=said("the sea?"), extra_body={"knowledge_base": "other", "top_k": 3})
    assert [source["id"] for source in other.sources] == ["sea"]
    plain = create(model="", messages=said("the sea?"), extra_body={"retrieval": False})
    assert plain.sources == [] and plain.usage.prompt_tokens < other.usage.prompt_tokens
    talk = [{"role": "developer", "content": "Be brief."}, *said("hello"), {"role": "assistant", "content": "hello"}]
    parts = [{"type": "text", "text": "When was "}, {"type": "text", "text": "the bridge built?"}]
    longer = create(model="", messages=[*talk, {"role": "user", "content": parts}])
    assert [source["id"] for source in longer.sources] == ["bridge", "river"]


# --- what is cited


def test_citations_and_their_passages():
    sources = [Source(n, document) for n, document in enumerate(DOCUMENTS, 1)]
    answer = "[1] 1987 [3][7]"
    notes = [note["url_citation"] for note in annotate(answer, sources, "http://h/v1/knowledge_bases/g/documents/")]
    assert [(answer[n["start_index"] : n["end_index"]], n["url"]) for n in notes] == [
        ("[1]", "http://h/v1/knowledge_bases/g/documents/bridge"),
        ("[3]", "https://example.org/signs"),
    ]
    told = describe(sources, QUESTION, answer)
    start, end = told[0]["passage"]
    assert DOCUMENTS[0].content[start:end] == "The old bridge was built in 1987."
    assert "passage" not in told[1] and "passage" not in told[2]  # not cited; nothing in it that was said
    assert not any("passage" in one for one in describe(sources))
    two = "Ada was born in 1904. The bridge of 1904 is old."
    assert find_passage("How old is the bridge?", "1904", two) == (22, len(two))
    assert find_passage("", "", two) is None


def test_documents_behind_the_links(server):
    found = httpx.get(f"{server.url}/v1/knowledge_bases/guide/documents/a%2Fb%20c").json()
    assert found["title"] == "Signs"
    assert httpx.get(f"{server.url}/v1/knowledge_bases/guide/documents/none").status_code == 404
    bases = httpx.get(f"{server.url}/v1/knowledge_bases").json()["data"]
    assert [(base["id"], base["documents"]) for base in bases] == [("guide", 3), ("other", 1)]


# --- bad requests


@pytest.mark.parametrize(
    ("body", "status", "word"),
    [
        ({}, 400, "messages"),
        ({"messages": []}, 400, "messages"),
        ({"messages": "hello"}, 400, "messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, 400, "role"),
        ({"messages": [{"role": "user", "content": " "}]}, 400, "empty"),
        ({"messages": [{"role": "user", "content": 3}]}, 400, "content"),
        (
            {"messages": [{"role": "user", "content": "x"}, {"role": "user", "content": "x"}]},
            400,
            "another user message",
        ),
        ({"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}, 400, "last message"),
        ({"messages": said(), "temperature": -1}, 400, "temperature"),
        ({"messages": said(), "top_p": 0}, 400, "top_p"),
        ({"messages": said(), "max_tokens": 0}, 400, "max_tokens"),
        ({"messages": said(), "top_k": 10**9}, 400, "top_k"),
        ({"messages": said(), "n": 2}, 400, "n"),
        ({"messages": said(), "stop": [""]}, 400, "stop"),
        ({"messages": said(), "stop": ["x"] * 5}, 400, "stop"),
        ({"messages": said(), "model": "gpt-9"}, 404, "gpt-9"),
        ({"messages": said(), "knowledge_base": "../other"}, 404, "guide, other"),
        ({"messages": said("bridge " * 5000)}, 400, "tokens"),
        ({"messages": said("x" * 5_000_000)}, 413, "bytes"),
    ],
)
def test_bad_requests_are_told_what_is_wrong(server, body, status, word):
    response = httpx.post(f"{server.url}/v1/chat/completions", content=json.dumps(body), headers=JSON)
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and word in error["message"]
    assert "\n" not in error["message"] and len(error["message"]) < 400


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"messages": NaN}', b"[" * 100_000, b'{"a":' * 50_000]
)
def test_what_is_no_json(server, content):
    response = httpx.post(f"{server.url}/v1/chat/completions", content=content, headers=JSON)
    assert response.status_code == 400 and response.json()["error"]["message"]


def test_more_documents_than_there_are(server):
    body = {"messages": said(), "max_tokens": 2, "top_k": 100}
    reply = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60)
    assert reply.status_code == 200 and 1 <= len(reply.json()["sources"]) <= 3


def test_not_a_number_and_other_addresses(server):
    content = json.dumps({"messages": said(), "temperature": float("nan")})
    assert httpx.post(f"{server.url}/v1/chat/completions", content=content, headers=JSON).status_code == 400
    plain = json.dumps({"messages": said()})  # what any page may have a browser send here, without asking
    assert httpx.post(f"{server.url}/v1/chat/completions", content=plain).status_code == 400
    half = json.dumps({"messages": said("the bridge \ud800"), "max_tokens": 2})
    assert httpx.post(f"{server.url}/v1/chat/completions", content=half, headers=JSON).status_code == 200
    assert httpx.get(f"{server.url}/nowhere").json()["error"]["type"] == "invalid_request_error"
    assert httpx.get(f"{server.url}/v1/chat/completions").status_code == 405
    endless = (b"x" * 100_000 for _ in range(100))  # of no stated length
    assert httpx.post(f"{server.url}/v1/chat/completions", content=endless, headers=JSON).status_code == 413
    headers = httpx.get(server.url).headers
    assert "script-src 'sha256-" in headers["content-security-policy"] and "unsafe" not in str(headers)


def test_text_is_never_control(server, engine):
    signs = "".join(SPECIAL_TOKENS)
    reply = server.client().chat.completions.create(model="", messages=said(signs + " signs"), max_tokens=4)
    assert "Signs" in [source["title"] for source in reply.sources]
    tokenizer = engine.tokenizer
    assert reply.usage.prompt_tokens > len(tokenizer.encode(signs)) > len(SPECIAL_TOKENS)


def test_a_key(engine):
    manager = RetrievalManager("simple", documents=DOCUMENTS)
    server = Server(Config([], max_tokens=2, api_key="sesame-ü"), engine, {"guide": manager})
    try:
        assert httpx.get(server.url).status_code == 200  # the page asks for it
        for sent, status in ((b"Bearer", 401), (b"Bearer sesame", 401), ("Bearer sesame-ü".encode(), 200)):
            assert httpx.get(f"{server.url}/v1/models", headers={"Authorization": sent}).status_code == status
        assert httpx.post(f"{server.url}/v1/chat/completions", json={"messages": said()}).status_code == 401
        with pytest.raises(openai.AuthenticationError, match="needs its key"):
            server.client("wrong").models.list()
    finally:
        server.close()


# --- many, and those that leave


def wait_until(condition, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize("streaming", [True, False])
def test_a_client_that_leaves_frees_its_place(server, streaming):
    body = {"messages": said(), "max_tokens": 1900, "stream": streaming, "retrieval": False}
    if streaming:
        with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=body, timeout=30) as response:
            lines = response.iter_lines()
            for _ in range(6):
                next(lines)
            assert server.load == 1
    else:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=0.5)
    wait_until(lambda: server.load == 0)
    assert httpx.get(f"{server.url}/health").json() == {"status": "ok", "load": 0}


def test_more_than_may_wait_are_told_to_come_again(server):
    bodies = [{"messages": said(f"{n} bridge"), "max_tokens": 100, "stream": n % 2 == 0} for n in range(24)]
    with ThreadPoolExecutor(24) as pool, httpx.Client(timeout=60) as client:
        responses = list(pool.map(lambda b: client.post(f"{server.url}/v1/chat/completions", json=b), bodies))
    statuses = [response.status_code for response in responses]
    assert set(statuses) <= {200, 429} and statuses.count(200) >= 8
    for response in responses:
        if response.status_code == 429:
            assert response.json()["error"]["code"] == "overloaded"
        elif "text/event-stream" in response.headers["content-type"]:
            assert response.text.endswith("data: [DONE]\n\n") or '"code": "overloaded"' in response.text
    wait_until(lambda: server.load == 0)


@pytest.mark.skipif(os.name != "posix", reason="needs setrlimit")
def test_a_thousand_connections_that_say_nothing_keep_nobody_out(server):
    import resource

    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(before[1], 8192), before[1]))  # both ends are in this process
    place = urlsplit(server.url)
    idle = []
    try:
        for n in range(1000):
            idle.append(socket.create_connection((place.hostname, place.port), timeout=20))
            if n % 3 == 0:
                idle[-1].sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
        body = {"messages": said(), "max_tokens": 2}
        assert httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60).status_code == 200
    finally:
        for connection in idle:
            connection.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    wait_until(lambda: httpx.get(f"{server.url}/health").json()["load"] == 0)


def test_a_port_that_is_taken(server):
    place = urlsplit(server.url)
    with pytest.raises(UserError, match=f"cannot listen on {place.hostname}:{place.port} .+ --port"):
        listen(place.hostname, place.port)
    with pytest.raises(UserError, match="--port 70000"):
        listen("127.0.0.1", 70_000)
    free = listen("127.0.0.1", 0)
    assert free.getsockname()[1] > 0
    free.close()


def test_folders_are_named_once(tmp_path):
    from nanochat.retrieval.knowledge_base import build_knowledge_base

    for name in ("one", "two/knowledge_base", "deep/one"):
        build_knowledge_base(DOCUMENTS, tmp_path / name, "simple")
    assert list(open_bases(Config([tmp_path / "one", tmp_path / "two/knowledge_base"]))) == ["one", "two"]
    with pytest.raises(UserError, match="called 'one'"):
        open_bases(Config([tmp_path / "one", tmp_path / "deep/one"]))
    with pytest.raises(UserError, match="--knowledge_base"):
        open_bases(Config([]))


# --- the page


CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome") or os.environ.get("CHROMIUM", "")


@pytest.mark.skipif(not CHROMIUM, reason="needs Chromium")
def test_the_page_in_a_browser(server, tmp_path: Path):
    api = pytest.importorskip("playwright.sync_api")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_context(viewport={"width": 390, "height": 780}).new_page()
        trouble: list[str] = []
        page.on("pageerror", lambda error: trouble.append(str(error)))
        page.on("dialog", lambda dialog: trouble.append(dialog.message))
        page.goto(server.url)
        page.locator("#base option").nth(1).wait_for(state="attached")
        assert page.title() == "rag-tiny"

        def ask(text: str, number: int) -> None:
            page.fill("#input", text)
            page.press("#input", "Enter")
            page.locator(".tools").nth(number).wait_for(timeout=30_000)

        ask(QUESTION, 0)
        assert page.locator(".answer").inner_text().strip() and page.locator(".source").count() == 2
        assert page.locator("img, .source script").count() == 0  # titles and contents are text
        page.locator(".source summary").nth(1).click()
        assert "<script>1</script>" in page.locator(".source p").nth(1).inner_text()
        page.select_option("#base", "other")
        ask("<b>How deep is the sea?</b>", 1)
        assert page.locator(".source .name").nth(2).inner_text() == "The sea"
        assert page.locator(".question p").nth(1).inner_text() == "<b>How deep is the sea?</b>"
        page.reload()
        page.locator(".tools").nth(1).wait_for()
        assert page.locator("#base").input_value() == "other"
        page.locator("button:has-text('Edit')").nth(1).click()
        assert page.locator("#input").input_value() == "<b>How deep is the sea?</b>"
        assert page.locator(".turn").count() == 1
        page.locator("button:has-text('Regenerate')").first.click()
        page.locator(".tools").first.wait_for(timeout=30_000)
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")  # nothing sticks out of a phone
        # a citation leads to its source
        page.evaluate(
            """() => { turns = [{question: "q", answer: "[2] it", sources: [1, 2].map((n) => ({number: n, id: "d",
            title: "T", content: "é𝄞 one. Two.", score: 1, read: true, ...(n == 2 ? {passage: [8, 12]} : {})}))}];
            showAll(); }"""
        )
        page.locator(".cite").click()
        assert page.locator("#source-0-2[open] mark").inner_text() == "Two."
        with page.expect_download() as download:
            page.select_option("#export", "JSON")
        saved = json.loads(Path(download.value.path()).read_text())
        assert saved["model"] == "rag-tiny" and saved["turns"][0]["answer"] == "[2] it"
        with page.expect_download() as download:
            page.select_option("#export", "Markdown")
        text = Path(download.value.path()).read_text()
        assert text == "> q\n\n[2] it\n\nSources:\n\n- [1] T\n- [2] T: “Two.”\n"
        # stopping
        server.app.state.chat.limits.max_tokens, before = 1800, server.app.state.chat.limits.max_tokens
        try:
            page.fill("#input", QUESTION)
            page.press("#input", "Enter")
            page.locator("#send:has-text('Stop')").wait_for()
            wait_until(lambda: server.load == 1)
            page.click("#send")
            page.locator(".note:has-text('stopped')").wait_for()
            wait_until(lambda: server.load == 0)
        finally:
            server.app.state.chat.limits.max_tokens = before
        assert trouble == []
        browser.close()
