"""No text from outside becomes control, whichever way it takes into a model: each special token's spelling is put
where any text can stand, and has to give just as many special ids as a harmless word in its place.

The layout of conversations is tested in nanochat/test_conversation.py, the server in scripts/test_chat_web.py, models
of transformers in nanochat/kg/test_hf_generator.py and nanochat/test_hf_tokenizer.py.
"""

from __future__ import annotations

import html
import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nanochat.conversation import render, render_prompt
from nanochat.dataset import tokenize_texts
from nanochat.dsi.docids import DocIds
from nanochat.dsi.model import QueryTokens
from nanochat.engine import Engine
from nanochat.kg.documents import fact_documents
from nanochat.kg.drag import DRAG, DRAGConfig
from nanochat.kg.generator import LMGenerator
from nanochat.kg.graph import Graph
from nanochat.kg.triples import read_facts
from nanochat.retrieval import Document, RetrievalManager
from nanochat.retrieval.chunking import count_words
from nanochat.retrieval.document import read_documents, read_queries
from nanochat.retrieval.knowledge_base import build_knowledge_base
from nanochat.retrieval.lm_encoder import MARKERS, render_text
from nanochat.retrieval.lm_rerank import LMReranker
from nanochat.sampling import Sampling
from nanochat.searching import Request, Searching, look_up
from nanochat.tokenizer import SPECIAL_TOKENS, Tokenizer
from tasks.agent import AgentTask
from tasks.common import load_conversations, render_examples
from tasks.own_documents import passages
from tasks.own_files import read_files
from tasks.question_writers import prompt, writing_example
from tasks.rag import RAGTask
from tasks.refrag import MultiHopRAGTask

HARMLESS = "baun"
SPELLINGS = [*SPECIAL_TOKENS, "".join(SPECIAL_TOKENS), "\n".join(SPECIAL_TOKENS)]


def write_lines(path: Path, records: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def documents_with(text: str, folder: Path) -> list[Document]:
    """Read from a file; the text in every field that is shown or searched."""
    records = [
        {
            "id": f"{text} {n}",
            "title": f"{text} bridge {n}",
            "content": f"A {text} bridge of {1900 + n}. {text}",
            "source": text,
            "metadata": {text: text, "list": [text]},
            "more": text,
        }
        for n in range(4)
    ]
    return read_documents(write_lines(folder / "documents.jsonl", records))


def queries_with(text: str, folder: Path) -> list[dict[str, Any]]:
    hops = [{"query": f"{text} bridge {n}", "doc_ids": [f"{text} {n}"]} for n in (0, 1)]
    records = [
        {"id": f"{text} one", "query": f"Which {text} bridge?", "answers": [f"1900 {text}"], "doc_ids": [f"{text} 0"]},
        {"id": f"{text} two", "query": text, "answers": [text], "doc_ids": [f"{text} 0", f"{text} 1"], "hops": hops},
        {"id": f"{text} none", "query": f"No {text} bridge?", "answers": [], "doc_ids": []},
    ]
    return read_queries(write_lines(folder / "queries.jsonl", records))


def manager_with(text: str, folder: Path) -> RetrievalManager:
    build_knowledge_base(documents_with(text, folder), folder / "kb", "bm25")
    return RetrievalManager(knowledge_base_path=folder / "kb")


def shown(documents: Sequence[Document], tokenizer: Tokenizer) -> list[int]:
    messages = [{"role": "retrieval", "documents": documents}, {"role": "user", "content": "Which?"}]
    return render_prompt({"messages": messages}, tokenizer)


# --- the ways, each from a text to the ids that a model gets


def retrieved(text: str, tokenizer: Tokenizer, folder: Path) -> list[int]:
    manager = manager_with(text, folder)
    asked = {"messages": [{"role": "user", "content": f"The {text} bridge?"}]}
    augmented = manager.augment_conversation(asked, top_k=3)
    assert len(augmented["messages"][0]["documents"]) == 3
    return render_prompt(augmented, tokenizer)


def rag_task(text: str, tokenizer: Tokenizer, folder: Path) -> list[int]:
    task = RAGTask(queries_with(text, folder), manager_with(text, folder), top_k=2, cite=True, quote=True)
    return [id for index in range(len(task)) for id in render(task[index], tokenizer).ids]


def refrag_task(text: str, tokenizer: Tokenizer, folder: Path) -> list[int]:
    task = MultiHopRAGTask(queries_with(text, folder), manager_with(text, folder), 2)
    return [id for index in range(len(task)) for id in render(task[index], tokenizer).ids]


def agent_task(text: str, tokenizer: Tokenizer, folder: Path) -> list[int]:
    manager = manager_with(text, folder)
    task = AgentTask(queries_with(text, folder), [False, True, True], lambda some: MultiHopRAGTask(some, manager, 2))
    return [id for index in range(len(task)) for id in render(task[index], tokenizer).ids]


def agent_search(text: str, tokenizer: Tokenizer, folder: Path) -> list[int]:
    """What the model writes of its own in ordinary tokens starts no search; the one that it does make is shown."""
    manager = manager_with(text, folder)
    searching = Searching(search=manager.search, max_hops=1, top_k_per_hop=2)
    request = Request(shown([], tokenizer), Sampling(max_tokens=10_000), tokenizer, searching)
    start, end = (tokenizer.special_id(f"<|search_{edge}|>") for edge in ("start", "end"))
    written = tokenizer.encode(f" {text} bridge")
    for token in [*written, start, *written, end]:
        assert not request.waiting
        request.take(token, tokenizer.special_id("<|assistant_end|>"))
    assert request.hops[0].query == f"{text} bridge"
    (read,) = look_up([[request]])
    assert len(request.hops[0].documents) == 2 and request.message()["content"][0]["text"] == f"{text} bridge"
    again = {"messages": [{"role": "user", "content": text}, request.message()]}
    return [*read, *request.ids, *render(again, tokenizer).ids]


def conversations_file(text: str, tokenizer: Tokenizer, folder: Path) -> list[int]:
    messages = [{"role": "user", "content": text}, {"role": "assistant", "content": f"{text}."}]
    found = load_conversations(write_lines(folder / "talks.jsonl", [{"messages": messages, text: text}] * 2))
    data, _ = render_examples(found, tokenizer, 2048)
    return data.ids.tolist()


def raw_text(text: str, tokenizer: Tokenizer, folder: Path) -> list[int]:
    (folder / "plain.txt").write_text(f"{text}\nA bridge of {text}\n", encoding="utf-8")
    write_lines(folder / "records.jsonl", [{"title": text, "text": text}, {"messages": [{"content": text}]}])
    split = tokenize_texts([folder / "plain.txt", folder / "records.jsonl"], tokenizer)
    return [id for ids, _ in split.values() for id in ids.tolist()]


def own_files(text: str, tokenizer: Tokenizer, folder: Path) -> list[int]:
    pytest.importorskip("bs4")
    pytest.importorskip("markdown_it")
    files = folder / "files"
    files.mkdir(exist_ok=True)
    (files / "a.txt").write_text(f"{text}\n\nA bridge of {text}.", encoding="utf-8")
    (files / "b.md").write_text(f"# Bridge\n\n```\n{text}\n```\n\nAn old bridge.", encoding="utf-8")
    shown_as = html.escape(text)
    (files / "c.html").write_text(f"<title>{shown_as}</title><h1>{shown_as}</h1><p>Of {shown_as}", encoding="utf-8")
    texts, unread = read_files([files])
    documents, _ = passages(texts, 2000, 0, count_words)
    assert not unread and len(documents) == 3
    assert all(text.split()[0] in document.content for document in documents)
    return shown(documents, tokenizer)


def question_writer(text: str, tokenizer: Tokenizer, folder: Path) -> list[int]:
    document = documents_with(text, folder)[0]
    asked = render_prompt({"messages": [{"role": "user", "content": prompt(document, 3)}]}, tokenizer)
    return asked + render(writing_example(document, [(f"{text}?", text)]), tokenizer).ids


def lm_encoder(text: str, tokenizer: Tokenizer, folder: Path) -> list[int]:
    return [id for kind in MARKERS for id in render_text(tokenizer, f"{text} bridge {text}", kind, 512)]


def lm_reranker(text: str, tokenizer: Tokenizer, folder: Path) -> list[int]:
    limits = SimpleNamespace(tokenizer=tokenizer, max_tokens=4096, max_doc_length=500)
    return LMReranker._prompt(limits, text, documents_with(text, folder))


def dsi(text: str, tokenizer: Tokenizer, folder: Path) -> list[int]:
    """A query, and an index whose ids are titles."""
    tokens = QueryTokens(tokenizer, "lm", max_tokens=1000)
    ids = DocIds("title", tokens.end, tokens.size)
    ids.add(documents_with(text, folder), tokens.encode, lambda documents: None, seed=0)
    assert len(ids.sequences) == 4
    return [*tokens(text), *(id for sequence in ids.sequences.values() for id in sequence)]


def facts_with(text: str, folder: Path) -> Any:
    one_line = text.replace("\n", " ")
    lines = [f"{one_line} film\tdirected_by {one_line}\tAnn {one_line}\n", f"Other\t{one_line}\tAnn {one_line}\n"]
    (folder / "facts.txt").write_text("".join(lines), encoding="utf-8")
    return read_facts([folder / "facts.txt"])


def facts_as_documents(text: str, tokenizer: Tokenizer, folder: Path) -> list[int]:
    found = list(fact_documents(facts_with(text, folder)))
    assert len(found) == 2
    return shown(found, tokenizer)


def drag(text: str, tokenizer: Tokenizer, folder: Path) -> list[int]:
    """Facts, names, answers and questions of the reader of a knowledge graph."""
    graph = Graph.build(facts_with(text, folder))
    model = SimpleNamespace(config=SimpleNamespace(d_model=8))
    reader = DRAG(None, None, LMGenerator(model, tokenizer), graph, DRAGConfig())
    before, behind = reader.generator.frame(f"Who made {text}?")
    facts = [id for fact in range(graph.num_facts) for id in reader.fact_ids(fact)]
    return [*before, *facts, *behind, *reader.answer_ids(range(len(graph)))]


WAYS = [retrieved, rag_task, refrag_task, agent_task, agent_search, conversations_file, raw_text, own_files]
WAYS += [question_writer, lm_encoder, lm_reranker, dsi, facts_as_documents, drag]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_text_is_never_control(
    way: Callable[[str, Tokenizer, Path], list[int]],
    small_tokenizer: Tokenizer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    first_special = len(small_tokenizer.token_bytes)
    expected = Counter(id for id in way(HARMLESS, small_tokenizer, tmp_path) if id >= first_special)
    for spelling in SPELLINGS:
        ids = way(spelling, small_tokenizer, tmp_path)
        found = Counter(id for id in ids if id >= first_special)
        assert found == expected, f"{spelling}: {found - expected} more, {expected - found} fewer"
        text = small_tokenizer.decode([id for id in ids if id < small_tokenizer.vocab_size])
        assert spelling.split("\n")[0] in text  # it is there, as text


def test_a_model_reads_no_control_from_a_talk(make_model: Callable[..., Any], small_tokenizer: Tokenizer) -> None:
    """Through the engine, which is what every chat goes through: what the model itself is handed."""
    model = make_model(small_tokenizer.vocab_size, "MT").eval()
    read: list[int] = []
    model.register_forward_pre_hook(lambda _, given: read.extend(given[0].flatten().tolist()))
    first_special, found = len(small_tokenizer.token_bytes), []
    for text in [HARMLESS, *SPELLINGS]:
        read.clear()
        talk = [{"role": "system", "content": text}, {"role": "retrieval", "documents": [Document("a", text, text)]}]
        talk += [
            {"role": "user", "content": text},
            {"role": "assistant", "content": text},
            {"role": "user", "content": text},
        ]
        Engine(model, small_tokenizer).generate_from_conversation({"messages": talk}, temperature=0.0, max_tokens=1)
        assert text in small_tokenizer.decode(read)
        found.append(Counter(id for id in read if id >= first_special))
    assert found[0] and all(of_text == found[0] for of_text in found[1:])
