"""python -m scripts.rag_chat, run as a user runs it, with a random model: what matters is the talk, not its sense."""

from __future__ import annotations

import io
import os
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from nanochat.checkpoint_manager import checkpoint_root, save_checkpoint
from nanochat.citations import Source, cited_passages
from nanochat.common import UserError
from nanochat.conversation import render_prompt
from nanochat.engine import Engine
from nanochat.retrieval.document import Document
from nanochat.retrieval.knowledge_base import build_knowledge_base
from nanochat.retrieval.manager import RetrievalManager
from scripts import rag_chat
from scripts._terminal import Screen, full_source, printable, read_questions, source_line
from scripts.rag_chat import ChatSession, run_command

REPOSITORY = Path(__file__).parents[2]
SCREEN = Screen()
QUESTION = "When was the bridge built?"
DOCUMENTS = [
    Document("bridge", "The bridge", "The old bridge was built in 1987.", source="guide.txt"),
    Document("river", "The river", "The river runs under the bridge."),
    Document("hill", "The mountain", "The mountain is old. \x1b[31mRed\x1b[0m\x07 end."),
]


@pytest.fixture(scope="module")
def home(tmp_path_factory, small_tokenizer, make_model) -> Path:
    """A base directory with a random model as checkpoint rag/tiny, and a knowledge base beside it."""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(home))
        meta = {"training_config": {"max_seq_len": 100_000}}
        model = make_model(small_tokenizer.vocab_size, "MT")
        with torch.no_grad():  # its answers go on and on
            model.lm_head.weight[Engine(model, small_tokenizer).end] = 0.0
        save_checkpoint(checkpoint_root("rag", "tiny"), 1, model, small_tokenizer, meta)
    build_knowledge_base(DOCUMENTS, home / "kb", "bm25")
    build_knowledge_base([Document("sea", "The sea", "The sea is deep.")], home / "other kb", "simple")
    return home


@pytest.fixture
def session(small_tokenizer, make_model, home) -> ChatSession:
    engine = Engine(make_model(small_tokenizer.vocab_size, "MT"), small_tokenizer)
    return ChatSession(engine, RetrievalManager(knowledge_base_path=home / "kb"), top_k=2, max_tokens=12)


def command(*argv: object) -> list[str]:
    return [sys.executable, "-m", "scripts.rag_chat", *map(str, argv)]


def environment(home: Path) -> dict[str, str]:
    return {**os.environ, "NANOCHAT_BASE_DIR": str(home), "TERM": "xterm"}


def run(home: Path, *argv: object, typed: str | bytes = b"") -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        command(*argv),
        cwd=REPOSITORY,
        env=environment(home),
        input=typed.encode() if isinstance(typed, str) else typed,
        capture_output=True,
        check=False,
    )
    out, err = done.stdout.decode(), done.stderr.decode()
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", out), "control characters where there is no terminal"
    return subprocess.CompletedProcess(done.args, done.returncode, out, err)


# --- the command


def test_one_question(home):
    done = run(home, "--knowledge_base", home / "kb", "--prompt", QUESTION, "--max_tokens", 8, "--top_k", 2)
    assert (done.returncode, done.stderr) == (0, "")
    answer, sources = done.stdout.split("sources:\n")
    assert answer.strip()
    assert re.fullmatch(r"  \[1\] \d\.\d{3}  The bridge\n  \[2\] \d\.\d{3}  The river\n", sources)
    again = run(home, "--knowledge_base", home / "kb", "--prompt", QUESTION, "--max_tokens", 8, "--top_k", 2)
    assert again.stdout == done.stdout


def test_piped_questions_and_commands(home):
    lines = [
        QUESTION,
        "",
        "/sources",
        "/topk 1",
        "Is the mountain old?",
        "/sources",
        "/topk none",
        "/what",
        f"/kb {home / 'missing'}",
        f"/kb {home / 'other kb'}",
        "How deep is the sea?",
        "/reset",
        "/sources",
        "How deep is the sea?",
        "/quit",
        "never asked",
    ]
    done = run(home, "--knowledge_base", home / "kb", "--max_tokens", 5, typed="\n".join(lines))
    assert done.returncode == 0
    errors = done.stderr.splitlines()
    assert len(errors) == 3
    assert errors[0] == "error: /topk takes a number of documents, at least 1, not 'none'"
    assert errors[1] == "error: unknown command /what; /help lists them"
    assert errors[2].startswith("error: no knowledge base at ")

    listed = re.findall(r"^sources:\n((?:  \[.*\n)+)", done.stdout, re.MULTILINE)
    numbers = [re.findall(r"^  \[(\d+)\]", part, re.MULTILINE) for part in listed]
    assert numbers == [["1", "2"], ["3"], ["4"], ["1"]]  # through the whole talk; afresh after /reset
    assert "The old bridge was built in 1987." in done.stdout
    assert "bridge, guide.txt\n" in done.stdout
    assert "The mountain is old. Red end.\n" in done.stdout  # without its escape sequences
    assert "1 documents for each question" in done.stdout
    assert f"knowledge base: {home / 'other kb'}, 1 documents, simple" in done.stdout
    assert "no sources yet" in done.stdout
    assert "> " not in done.stdout and "/help" not in done.stdout  # no prompt, no banner


def test_odd_bytes_in_piped_questions_and_no_newline_at_the_end(home):
    typed = b"\xff\xfe bridge \x1b[31m\n" + "Brücke? 東京".encode()
    done = run(home, "--knowledge_base", home / "kb", "--max_tokens", 3, typed=typed)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("sources:\n") == 2
    assert "  none found\n" in done.stdout  # nothing in the base has a word of the second


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--prompt", "x"], "--knowledge_base is required"),
        (["--knowledge_base", "{home}/nowhere"], "no knowledge base at"),
        (["--knowledge_base", "{home}"], "is not a knowledge base"),
        (["--knowledge_base", "{home}/kb", "--source", "mid"], "no checkpoint of source 'mid'"),
        (["--knowledge_base", "{home}/kb", "--model_tag", "big"], "there are: tiny"),
        (["--knowledge_base", "{home}/kb", "--retriever_type", "bm52"], "did you mean 'bm25'?"),
        (["--knowledge_base", "{home}/kb", "--top_k", "0"], "--top_k 0 must be at least 1"),
        (["--knowledge_base", "{home}/kb", "--temperature", "-1"], "--temperature -1.0 must be 0"),
        (["--knowledge_base", "{home}/kb", "--prompt", " "], "the question is empty"),
        (["--knowledge_base", "{home}/kb", "--topk", "3"], "did you mean --top_k?"),
    ],
)
def test_mistakes_give_one_line(home, argv, said):
    done = run(home, *(word.format(home=home) for word in argv))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert said in done.stderr


def test_a_reader_that_leaves_early_is_no_error(home):
    process = subprocess.Popen(
        command("--knowledge_base", home / "kb", "--prompt", QUESTION, "--max_tokens", 3000),
        cwd=REPOSITORY,
        env=environment(home),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    process.stdout.read(1)
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(60) == 0


@pytest.mark.skipif(os.name != "posix", reason="needs a pseudo-terminal")
def test_at_a_terminal(home):
    """Prompt and banner, Ctrl-C in an answer and at the prompt, history, Ctrl-D."""
    import pty

    master, slave = pty.openpty()
    process = subprocess.Popen(
        command("--knowledge_base", home / "kb", "--max_tokens", 90_000),
        cwd=REPOSITORY,
        env=environment(home),
        stdin=slave,
        stdout=slave,
        stderr=slave,
        preexec_fn=lambda: _at_terminal(slave),
    )
    os.close(slave)
    seen = b""

    def until(pattern: bytes, typed: bytes = b"", again: bytes = b"") -> bytes:
        """Type, then read until the pattern is there (if nothing comes, type again); returns what came since."""
        nonlocal seen
        start = len(seen)
        os.write(master, typed)
        deadline = time.monotonic() + 180  # a busy machine is slow
        while not re.search(pattern, seen[start:], re.DOTALL):
            assert time.monotonic() < deadline, seen.decode(errors="replace")
            if select.select([master], [], [], 1)[0]:
                try:
                    seen += os.read(master, 65536)
                except OSError:  # the terminal has gone with the process
                    break
            elif again:
                os.write(master, again)
        return seen[start:]

    try:
        banner = until(rb"> $")
        assert b"3 documents, bm25" in banner and b"/help lists the commands" in banner
        begun = until(
            rb"built\?\r\n.*reading.*\x1b\[2K[^\x1b]{3}", QUESTION.encode() + b"\r"
        )  # and would go on for long
        assert b"sources" not in begun
        stopped = until(rb"> $", b"\x03")
        assert b"(stopped)" in stopped
        assert b"\x1b[2msources:" in stopped and b"[1] " in stopped
        until(rb"half a line", b"half a line")
        # a Ctrl-C between two reads of readline waits for the next key (CPython's gap, not ours)
        assert b"Ctrl-D or /quit" in until(rb"> $", b"\x03", again=b"\x03")
        assert b"The old bridge was built in 1987." in until(rb"> $", b"/sources\r")
        until(rb"$", b"\x04")
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
        os.close(master)
    history = home / "rag_chat_history"
    if history.exists():  # Python has readline
        assert QUESTION in history.read_text()


def _at_terminal(slave: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # tests in the background are started with it ignored
    os.login_tty(slave) if hasattr(os, "login_tty") else _login_tty(slave)


def _login_tty(slave: int) -> None:  # os.login_tty is of Python 3.11
    import fcntl
    import termios

    os.setsid()
    fcntl.ioctl(slave, termios.TIOCSCTTY, 0)


# --- the session


def ask(session: ChatSession, question: str) -> str:
    return "".join(session.ask(question))


def test_the_talk_grows_and_the_model_reads_all_of_it(session, monkeypatch):
    prompts = []
    generate = session.engine.generate
    monkeypatch.setattr(session.engine, "generate", lambda p, **kw: prompts.append(p) or generate(p, **kw))
    first = ask(session, QUESTION)
    assert first == first.strip() != ""
    assert [m["role"] for m in session.messages] == ["retrieval", "user", "assistant"]
    assert session.messages[-1]["content"] == first
    assert [(s.number, s.document.id, s.read) for s in session.sources] == [(1, "bridge", True), (2, "river", True)]
    ask(session, "Is the mountain old?")
    assert [m["role"] for m in session.messages] == ["retrieval", "user", "assistant"] * 2
    assert [s.number for s in session.sources] == [3, 4]
    tokenizer = session.engine.tokenizer
    assert prompts[1] == render_prompt({"messages": session.messages[:-1]}, tokenizer)
    shown = tokenizer.decode(prompts[1])
    for source in session.sources:  # the listed number is the one the model saw
        assert f"{source.document.title}{source.number}<|doc_body|>" in shown
    assert first in shown
    session.reset()
    assert (session.messages, session.sources) == ([], [])


def test_the_system_message_stays(session):
    session.system = "Be brief."
    for _ in range(2):
        session.reset()
        assert session.messages == [{"role": "system", "content": "Be brief."}]
        ask(session, QUESTION)
    assert [m["role"] for m in session.messages] == ["system", "retrieval", "user", "assistant"]


def test_over_the_models_length_old_documents_go_and_the_sources_say_what_was_not_read(session, monkeypatch):
    ask(session, QUESTION)
    ask(session, QUESTION)
    lengths = []
    generate = session.engine.generate

    def spy(prompt, max_tokens, **kw):
        lengths.append((len(prompt), max_tokens))
        return generate(prompt, max_tokens=max_tokens, **kw)

    monkeypatch.setattr(session.engine, "generate", spy)
    alone = len(render_prompt({"messages": session.messages[:2]}, session.engine.tokenizer)) + session.max_tokens
    for limit, read in ((10_000, [True, True]), (alone, [True, True]), (alone - 1, [True, False])):
        session.max_seq_len = limit
        before = session.messages
        ask(session, QUESTION)
        assert [source.read for source in session.sources] == read, limit
        assert [source.number for source in session.sources] == [5, 6]  # numbers do not move when others are dropped
        length, room = lengths[-1]
        assert length + room <= limit
        assert (length > alone) == (limit == 10_000)  # the past was read while there was room for it
        session.messages = before
    assert "(did not fit, not read)" in source_line(session.sources[1])

    session.max_seq_len = 20
    before, sources = session.messages, session.sources
    with pytest.raises(UserError, match="question takes"):
        ask(session, QUESTION)
    assert session.messages is before and session.sources is sources
    session.max_seq_len = 10_000
    assert ask(session, QUESTION)  # the session goes on


def test_a_stopped_answer_is_kept_as_far_as_it_came(session):
    pieces = session.ask(QUESTION)
    shown = next(pieces) + next(pieces)
    pieces.close()
    assert session.messages[-1] == {"role": "assistant", "content": shown}
    assert session.sources
    before = session.messages
    pieces = session.ask(QUESTION)
    pieces.close()  # before its first word
    assert session.messages is before

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt
        yield

    session.engine.generate = interrupted
    with pytest.raises(KeyboardInterrupt):
        ask(session, QUESTION)
    assert session.messages is before


def test_a_model_that_searches_by_itself(session, monkeypatch):
    t = session.engine.tokenizer
    search = [t.special_id("<|search_start|>"), *t.encode(" old bridge"), t.special_id("<|search_end|>")]
    scripts = iter([[*search, *t.encode(" [1] In 1987"), t.special_id("<|assistant_end|>")]] * 2)
    written: list[int] = []

    def sample(logits, settings, draws, seen=None):
        if not written:
            written.extend(next(scripts))
        return torch.tensor([written.pop(0)])

    monkeypatch.setattr("nanochat.engine.sample", sample)
    session.max_hops, session.top_k, session.max_tokens = 2, 1, 60
    assert ask(session, QUESTION) == "[1] In 1987"
    assert [m["role"] for m in session.messages] == ["user", "assistant"]
    assert [part["type"] for part in session.messages[1]["content"]] == ["search", "documents", "text"]
    assert session.searches == ["old bridge"] and [(s.number, s.document.id) for s in session.sources] == [
        (1, "bridge")
    ]
    ask(session, QUESTION)
    assert [(s.number, s.document.id) for s in session.sources] == [(2, "river")]  # what was shown does not come again
    session.reset()
    assert (session.messages, session.sources, session.searches) == ([], [], [])


def test_markers_of_the_model_and_white_space_around_the_answer_are_not_streamed(session):
    t = session.engine.tokenizer
    written = [
        *t.encode(" \n The bridge"),
        *[t.special_id("<|search_start|>"), *t.encode("secret"), t.special_id("<|search_end|>")],
        *t.encode(" é東 \n\n"),
    ]
    session.engine.generate = lambda prompt, **kw: iter(written)
    assert ask(session, QUESTION) == "The bridge é東"
    session.engine.generate = lambda prompt, **kw: iter([])
    assert ask(session, QUESTION) == ""
    assert session.messages[-1] == {"role": "assistant", "content": ""}
    ask(session, QUESTION)  # the talk goes on after an empty answer


def test_sampled_answers_are_reproducible_and_differ_when_asked_again(session):
    session.temperature = 1.0
    first, second = ask(session, QUESTION), ask(session, QUESTION)
    session.reset()
    assert [ask(session, QUESTION), ask(session, QUESTION)] == [first, second]
    assert first != second


def test_what_was_said_last_is_taken_back(session):
    assert not session.undo()
    first = ask(session, QUESTION)
    before, last = session.messages, session.last
    assert last == (QUESTION, first)
    session.temperature = 1.0
    second = ask(session, "Is the mountain old?")
    assert session.undo() and (session.messages, session.last, session.sources) == (before, last, [])
    assert ask(session, "Is the mountain old?") == second  # as if for the first time
    assert session.undo() and session.undo() and session.messages == []
    assert not session.undo()


def test_sources_in_full_with_the_sentence_that_the_answer_rests_on(session):
    bridge = Document(
        "bridge", "The bridge", "It is \x1b[31mstone. It was built in 1987. It is long.", score=1.5, source="g.txt"
    )
    sources = [Source(3, bridge), Source(4, DOCUMENTS[1], read=False)]
    passages = cited_passages(sources, QUESTION, "[3] 1987")
    assert full_source(sources[0], passages[3], ("<", ">")) == (
        "[3] 1.500  The bridge\nbridge, g.txt\nIt is stone. <It was built in 1987.> It is long."
    )
    assert list(passages) == [3] and not cited_passages(sources, QUESTION, "1987")
    assert not cited_passages(sources, QUESTION, "[3] The documents do not say.")
    session.sources, session.last = sources, (QUESTION, "[3] 1987")
    both = run_command(session, SCREEN, "/sources")
    assert "**It was built in 1987.**" in both and "The river runs under the bridge." in both
    for number in ("4", "[4]"):
        shown = run_command(session, SCREEN, f"/sources {number}")
        assert "The river" in shown and "stone" not in shown and "not read" in shown
    with pytest.raises(UserError, match="sources are 3 to 4"):
        run_command(session, SCREEN, "/sources 1")


@pytest.mark.parametrize(
    ("typed", "asked"),
    [
        ("one\ntwo\n", ["one", "two"]),
        ("one\\\ntwo\nthree", ["one\ntwo", "three"]),
        ('"""a\n\n  b"""\nc\n', ["a\n\n  b", "c"]),
        ('"""\na\\\nb\n"""\nc', ["a\\\nb", "c"]),
        ('"""one line"""\nnext', ["one line", "next"]),
        ('"""never closed\nx', ["never closed\nx"]),
        ("ends in \\", ["ends in"]),
        ("", []),
        ("\n \n", ["", ""]),
    ],
)
def test_a_question_of_several_lines(typed, asked, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
    assert list(read_questions(SCREEN)) == asked


def test_commands(session, home):
    assert run_command(session, SCREEN, "/quit") is None
    assert "/sources" in run_command(session, SCREEN, "/help")
    assert run_command(session, SCREEN, "/topk") == "2 documents for each question"
    run_command(session, SCREEN, "/topk 7")
    assert session.top_k == 7
    for bad in ("0", "-1", "x", "1.5"):
        with pytest.raises(UserError, match="/topk takes a number"):
            run_command(session, SCREEN, f"/topk {bad}")
    old = session.manager
    with pytest.raises(UserError, match="no knowledge base"):
        run_command(session, SCREEN, "/kb nowhere")
    assert session.manager is old and session.top_k == 7
    assert "other kb" in run_command(session, SCREEN, f"/kb {home / 'other kb'}", "simple")
    assert session.manager is not old
    assert run_command(session, SCREEN, "/kb") == rag_chat.describe(session.manager)
    with pytest.raises(UserError, match="unknown command /topkk"):
        run_command(session, SCREEN, "/topkk 3")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain\ttext\nline", "plain\ttext\nline"),
        ("\x1b[31mred\x1b[0m", "red"),
        ("\x1b]0;title\x07after", "after"),
        ("\x1b]8;;http://x\x1b\\link\x1b]8;;\x1b\\", "link"),
        ("\x1b]never ended", "never ended"),  # what is no whole sequence must not swallow the text after it
        ("\x1bPq#0\x1b\\x\x1bc\x1b(By", "xy"),
        ("a\rb\x08c\x00d\x7fe\x9b31mf", "abcde31mf"),
        ("\u202eevil\u202c \u2066x\u2069", "evil x"),
        ("👩‍👩‍👧 é 東京", "👩‍👩‍👧 é 東京"),  # the joiner in an emoji is no control character
        ("\x1b", ""),
    ],
)
def test_printable(text, shown):
    assert printable(text) == shown
