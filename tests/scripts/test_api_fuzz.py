"""The web chat's API page against the server: requests made up from it, right and wrong ones, get the answers that it
promises, and never an error of the server's own.

    FUZZ_EXAMPLES=1000 FUZZ_SEED=1 python -m pytest tests/scripts/test_api_fuzz.py
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator

import pytest
import torch

from nanochat.engine import Engine
from nanochat.retrieval import Document, RetrievalManager

pytest.importorskip("fastapi")
schemathesis = pytest.importorskip("schemathesis")
from hypothesis import HealthCheck, Phase, given, seed, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from schemathesis import GenerationMode  # noqa: E402
from schemathesis.specs.openapi.checks import negative_data_rejection, positive_data_acceptance  # noqa: E402

from scripts.chat_web import Config, create_app  # noqa: E402

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "50"))  # of each kind
SEED = int(os.environ.get("FUZZ_SEED", "0"))
DOCUMENTS = [Document("bridge", "The bridge", "It was built in 1987."), Document("signs", "Signs", "<|bos|> signs")]
CHAT = "/v1/chat/completions"
DOCUMENT = "/v1/knowledge_bases/{name}/documents/{id}"
GETS = ("/health", "/v1/models", "/v1/knowledge_bases", DOCUMENT)


@pytest.fixture(scope="module")
def engine(small_tokenizer, make_model) -> Engine:
    model = make_model(small_tokenizer.vocab_size, "MT")
    with torch.no_grad():  # its answers go on and on
        model.lm_head.weight[Engine(model, small_tokenizer).end] = 0.0
    return Engine(model, small_tokenizer, prefix_bytes=1 << 20)


@pytest.fixture
def schema(engine) -> Iterator:
    """Of an app of its own: after each test schemathesis says to apps that it is over."""
    meta = {"model_tag": "tiny", "training_config": {"max_seq_len": 96}}
    managers = {"guide": RetrievalManager("bm25", documents=DOCUMENTS)}
    config = Config([], max_tokens=8, allowed_hosts=["testserver"])
    app = create_app(config, engine, meta, managers)
    yield schemathesis.openapi.from_asgi("/openapi.json", app)
    app.state.chat.worker.close()


def fuzz(ask, examples: int, **strategies) -> None:
    """Call ask with so many examples of what the strategies make up; the same ones for the same FUZZ_SEED."""
    bounded = settings(
        max_examples=examples,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],  # what fails is shown as it was found: smaller ones would take minutes to find
    )
    seed(SEED)(bounded(given(**strategies)(ask)))()


def test_the_page_names_every_route(schema):
    routes = {(operation.ok().method.upper(), operation.ok().path) for operation in schema.get_all_operations()}
    assert routes == {("POST", CHAT), *(("GET", path) for path in GETS)}


@pytest.mark.parametrize("path", GETS)
def test_routes_that_read(schema, path):
    """Documents that are there and others, and whatever may stand behind a question mark or in a header."""
    operation, seen = schema[path]["GET"], Counter()

    def ask(case, known, query, header):
        if path == DOCUMENT and known:
            case.path_parameters = {"name": "guide", "id": known}
        response = case.call(params=query, headers={"X-Other": header})
        case.validate_response(response)
        seen[response.status_code] += 1
        assert not known or response.status_code == 200

    header = st.text(st.characters(min_codepoint=32, max_codepoint=126)).map(str.strip)
    others = {"query": st.dictionaries(st.text(min_size=1), st.text(), max_size=3), "header": header}
    known = st.sampled_from(["", "", "bridge", "signs"])
    fuzz(ask, EXAMPLES, case=operation.as_strategy(GenerationMode.POSITIVE), known=known, **others)
    assert sum(seen.values()) >= EXAMPLES and set(seen) == ({200, 404} if path == DOCUMENT else {200}), seen


# what a page of the API cannot say of a conversation
RULES = (
    "the last message must be",
    "must be the first",
    "another user message",
    "must answer a user",
    "tokens without",
)


def test_questions_as_the_page_describes_them(schema):
    operation, seen = schema[CHAT]["POST"], Counter()

    def ask(case, plain):
        if plain:  # messages in the order of a conversation, to this model, over this base
            case.body = {**case.body, "messages": [{"role": "user", "content": plain}], "model": "rag-tiny"}
            case.body["knowledge_base"] = "guide"
        response = case.call()
        seen[response.status_code, bool(plain)] += 1
        if response.status_code == 400:
            assert any(rule in response.json()["error"]["message"] for rule in RULES), response.text
        case.validate_response(response, excluded_checks=[positive_data_acceptance])

    # of these words a few fit the model, whatever else is asked
    plain = st.one_of(st.just(""), st.text("the bridge", min_size=1, max_size=20).filter(str.strip))
    fuzz(ask, EXAMPLES, case=operation.as_strategy(GenerationMode.POSITIVE), plain=plain)
    assert set(seen) <= {(200, True), (200, False), (400, True), (400, False), (404, False)}, seen
    assert seen[200, True] > EXAMPLES / 8, seen


def test_questions_that_are_wrong(schema):
    operation, seen = schema[CHAT]["POST"], Counter()

    def ask(case):
        response = case.call()
        seen[response.status_code] += 1
        too_long = response.status_code == 413  # is refused as well, whatever is in it
        case.validate_response(response, excluded_checks=[negative_data_rejection] if too_long else [])

    fuzz(ask, EXAMPLES, case=operation.as_strategy(GenerationMode.NEGATIVE))
    assert seen[400] > EXAMPLES / 2 and max(seen) < 500, seen


def test_questions_that_are_no_json(schema):
    case = schema[CHAT]["POST"].Case(headers={"Content-Type": "application/json"})
    question = json.dumps({"messages": [{"role": "user", "content": "the bridge"}], "max_tokens": 1}).encode()

    def ask(noise, at, cut):
        response = case.call(data=question[:at] + noise + question[at + cut :])
        assert response.status_code in (200, 400, 404), response.text
        assert response.status_code == 200 or response.json()["error"]["message"]

    place = st.integers(0, len(question))
    fuzz(ask, EXAMPLES, noise=st.binary(max_size=8), at=place, cut=st.integers(0, 8))


@pytest.mark.parametrize("path", [CHAT, *GETS])
def test_other_methods_are_told_which_there_is(schema, path):
    own = "POST" if path == CHAT else "GET"
    for method in ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE"):
        case = schema[path][own].Case(path_parameters={"name": "guide", "id": "bridge"} if path == DOCUMENT else {})
        case.method = method
        if method != own:
            response = case.call()
            assert response.status_code == 405 and response.headers["allow"] == [own], (method, response.status_code)
