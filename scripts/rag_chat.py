"""Chat in the terminal with a model that answers from a knowledge base.

    python -m scripts.rag_chat --knowledge_base data/my_kb
    python -m scripts.rag_chat --knowledge_base data/my_kb --prompt "What is the return policy?"
    python -m scripts.rag_chat --knowledge_base data/my_kb < questions.txt

Each question is searched for, and the documents found stay in the talk with the answer; when the talk outgrows the
length the model was trained on, the oldest documents go first. Where the output is not a terminal it is plain text.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from nanochat.checkpoint_manager import load_model
from nanochat.citations import Source, cited_passages
from nanochat.common import UserError, compute_cleanup, compute_init, run_main
from nanochat.config import load_config
from nanochat.conversation import answer_ids, count_documents, render_prompt
from nanochat.engine import Engine
from nanochat.retrieval import RetrievalManager
from nanochat.sampling import Sampling
from nanochat.searching import Request, Searching
from scripts._terminal import Screen, one_line, read_questions


@dataclass
class Config:
    """Chat with a model that answers from a knowledge base."""

    knowledge_base: Path
    """Directory of the knowledge base; python -m nanochat.retrieval builds one."""
    source: Literal["base", "mid", "rag", "refrag", "refrag_rl", "agent_sft", "agent"] = "rag"
    """Stage of training the model comes from: rag, mid or base; the others search by themselves, refrag and refrag_rl
    for every question, agent_sft and agent where they have to."""
    model_tag: str = ""
    """Which model of that stage; empty: the one trained last."""
    retriever_type: str | None = None
    """simple, bm25, dense, hybrid or kg; if not given, what the knowledge base was built for."""
    top_k: int | None = None
    """Documents to find for each question (5), or for each search of a model that searches by itself (as in its
    training)."""
    temperature: float = 0.0
    """0 takes the likeliest token each time; higher is more varied."""
    refusal_threshold: float | None = None
    """Refuse to answer where the model gives that at least this probability; by default as it writes."""
    max_tokens: int = 256
    """Longest answer, in tokens."""
    max_doc_length: int = 500
    """Longest document, in tokens; the rest of it is cut off."""
    system: str = ""
    """A system message, at the head of the talk."""
    prompt: str | None = None
    """Answer this one question and exit."""
    seed: int = 0
    """Seeds sampling (temperature above 0)."""
    device: str = "auto"
    """auto, cpu, cuda or mps."""


class ChatSession:
    """One talk: what was said, what was found, and the settings that may change on the way. Prints nothing."""

    def __init__(
        self,
        engine: Engine,
        manager: RetrievalManager,
        top_k: int = 5,
        temperature: float = 0.0,
        max_tokens: int = 256,
        max_doc_tokens: int = 500,
        max_seq_len: int = 2048,
        system: str = "",
        seed: int = 0,
        max_hops: int = 0,
        refusal_threshold: float | None = None,
    ):
        """max_hops: searches that the model may write into an answer; 0: one search, for the question itself."""
        self.max_hops, self.refusal_threshold = max_hops, refusal_threshold
        self.engine, self.manager = engine, manager
        self.top_k, self.temperature, self.max_tokens = top_k, temperature, max_tokens
        self.max_doc_tokens, self.max_seq_len, self.seed = max_doc_tokens, max_seq_len, seed
        self.system = system
        self.messages: list[dict[str, Any]] = []
        self.sources: list[Source] = []
        self.searches: list[str] = []  # that the model wrote for the last answer
        self.last = ("", "")  # question and answer
        self.earlier: list[tuple[list[dict[str, Any]], tuple[str, str]]] = []  # the talk before each question
        self.reset()

    def reset(self) -> None:
        """Forget the talk."""
        self.messages = [{"role": "system", "content": self.system}] if self.system else []
        self.sources, self.searches, self.last, self.earlier = [], [], ("", ""), []

    def undo(self) -> bool:
        """Forget the last question and its answer; False where there is none."""
        if not self.earlier:
            return False
        self.messages, self.last = self.earlier.pop()
        self.sources, self.searches = [], []
        return True

    def _keep(self, messages: list[dict[str, Any]], question: str, said: str, sources: list[Source]) -> None:
        self.earlier.append((self.messages, self.last))
        self.messages, self.last, self.sources = messages, (question, said), sources

    def ask(self, question: str) -> Iterator[str]:
        """Find documents, then stream the answer's text. The talk keeps what was streamed, also of an answer that is
        closed before its end; a question that got no text at all and was stopped, or failed, leaves no trace."""
        if not question.strip():
            raise UserError("the question is empty")
        if self.max_hops:
            yield from self._ask_searching(question)
            return
        documents = self.manager.retrieve(question, self.top_k)
        messages = [
            *self.messages,
            {"role": "retrieval", "documents": [document.to_dict() for document in documents]},
            {"role": "user", "content": question},
        ]
        # Room is held for the answer, but a long --max_tokens must not push out the documents of a short model.
        held = min(self.max_tokens, self.max_seq_len // 4)
        tokenizer = self.engine.tokenizer
        prompt = render_prompt({"messages": messages}, tokenizer, self.max_seq_len - held, self.max_doc_tokens)
        # This question's documents are the last to go, so what is left of all is theirs first.
        left = prompt.count(tokenizer.special_id("<|doc_start|>"))
        first = count_documents({"messages": self.messages}) + 1
        sources = [Source(first + i, document, i < left) for i, document in enumerate(documents)]

        ids = self.engine.generate(
            prompt,
            max_tokens=min(self.max_tokens, self.max_seq_len - len(prompt)),
            temperature=self.temperature,
            refusal_threshold=self.refusal_threshold,
            seed=self.seed + len(self.messages),  # the same question asked again may get another answer
        )
        streamed, complete = "", False
        try:
            for new in self._text(ids):
                streamed += new
                yield new
            complete = True
        finally:
            if complete or streamed:
                self._keep([*messages, {"role": "assistant", "content": streamed}], question, streamed, sources)

    def _ask_searching(self, question: str) -> Iterator[str]:
        """The same where the model searches for itself while it answers."""
        messages = [*self.messages, {"role": "user", "content": question}]
        conversation, tokenizer = {"messages": messages}, self.engine.tokenizer
        prompt = render_prompt(conversation, tokenizer, self.max_seq_len // 2, self.max_doc_tokens)
        searching = Searching(
            self.manager.search,
            self.top_k,
            self.max_hops,
            max_doc_tokens=self.max_doc_tokens,
            max_context=self.max_seq_len - min(self.max_tokens, self.max_seq_len // 4),
        )
        sampling = Sampling(
            max_tokens=min(self.max_tokens, self.max_seq_len - len(prompt)),
            temperature=self.temperature,
            refusal_threshold=self.refusal_threshold,
            seed=self.seed + len(self.messages),
        )
        request = Request.of_conversation(conversation, prompt, sampling, tokenizer, searching)
        streamed, complete = "", False
        try:
            for new in self._text(self.engine.stream(request)):
                streamed += new
                yield new
            complete = True
        finally:
            if complete or streamed:
                first = count_documents({"messages": self.messages}) + 1
                found = [document for hop in request.hops for document in hop.documents]
                sources = [Source(first + i, document) for i, document in enumerate(found)]
                self._keep([*messages, request.message()], question, streamed, sources)
                self.searches = [hop.query for hop in request.hops]

    def _text(self, ids: Iterator[int]) -> Iterator[str]:
        """The answer's text as it comes. White space at the end waits: it is not part of the answer unless something
        follows."""
        answer, streamed = "", ""
        for text in self.engine.stream_text(answer_ids(ids, self.engine.tokenizer)):
            answer += text
            new, streamed = answer.strip()[len(streamed) :], answer.strip()
            if new:
                yield new


def open_manager(retriever_type: str | None, path: str | Path) -> RetrievalManager:
    with contextlib.redirect_stdout(sys.stderr):  # notes about the base are not part of the talk
        return RetrievalManager(retriever_type, Path(path).expanduser())


# --- commands

HELP = """\
/sources    the last sources in full, with the sentences that the answer rests on; /sources N: only [N]
/undo       take back the last question and its answer
/reset      forget the talk
/kb PATH    answer from another knowledge base (alone: which one is in use)
/topk N     documents to find for each question
/help       this
/quit       leave (also Ctrl-D); Ctrl-C stops an answer
A line that ends in \\ goes on in the next one; so does all between two \"\"\". Arrow-up has what was asked before."""


def run_command(session: ChatSession, screen: Screen, line: str, retriever_type: str | None = None) -> str | None:
    """Do one line that begins with a slash. Returns what to show, or None to leave."""
    name, _, argument = line.strip().partition(" ")
    argument = argument.strip()
    if name == "/quit":
        return None
    if name == "/help":
        return HELP
    if name == "/reset":
        session.reset()
        return "the talk is forgotten"
    if name == "/undo":
        return "taken back" if session.undo() else "nothing was said yet"
    if name == "/sources":
        if not session.sources:
            return "no sources yet"
        chosen = [s for s in session.sources if argument.strip("[]") in ("", str(s.number))]
        if not chosen:
            first, last = session.sources[0].number, session.sources[-1].number
            raise UserError(f"/sources {argument}: the last answer's sources are {first} to {last}")
        return screen.full_sources(chosen, cited_passages(chosen, *session.last))
    if name == "/topk":
        if argument:
            if not argument.isdecimal() or int(argument) < 1:
                raise UserError(f"/topk takes a number of documents, at least 1, not {argument!r}")
            session.top_k = int(argument)
        return f"{session.top_k} documents for each question"
    if name == "/kb":
        if argument:
            session.manager = open_manager(retriever_type, argument)
        return describe(session.manager)
    raise UserError(f"unknown command {name}; /help lists them")


def describe(manager: RetrievalManager) -> str:
    return f"knowledge base: {manager.place}, {len(manager):,} documents, {manager.retriever_type}"


# --- the loop


def answer(session: ChatSession, screen: Screen, question: str) -> None:
    """Stream one answer and list its sources."""
    before = session.sources
    screen.answer(session.ask(question))
    if session.sources is not before:  # not stopped before its first word
        screen.sources(session.sources, session.searches)


def chat(session: ChatSession, screen: Screen, retriever_type: str | None = None) -> None:
    """Answer question after question until the input ends. One that cannot be answered costs one line on stderr."""
    for question in read_questions(screen):
        if not question:
            continue
        try:
            if question.startswith("/"):
                shown = run_command(session, screen, question, retriever_type)
                if shown is None:
                    return
                screen.write(shown + "\n\n")
            else:
                answer(session, screen, question)
                screen.write("\n")
        except UserError as error:
            print("error: " + one_line(str(error)), file=sys.stderr, flush=True)
        except KeyboardInterrupt:  # meant for an answer that had just ended
            if not screen.interactive:
                raise
            screen.write("\n")


def main() -> None:
    config = load_config(Config)
    for name in ("top_k", "max_tokens", "max_doc_length"):
        if getattr(config, name) is not None and getattr(config, name) < 1:
            raise UserError(f"--{name} {getattr(config, name)} must be at least 1")
    if not config.temperature >= 0:
        raise UserError(f"--temperature {config.temperature} must be 0 (greedy) or more")
    for stream in (sys.stdin, sys.stdout):  # an odd byte in a question, or a narrow terminal, must not end the talk
        stream.reconfigure(errors="replace")
    manager = open_manager(config.retriever_type, config.knowledge_base)
    compute = compute_init(config.device, config.seed)
    model, tokenizer, meta = load_model(config.source, compute.device, model_tag=config.model_tag)
    session = ChatSession(
        Engine(model, tokenizer, prefix_bytes=1 << 29),
        manager,
        config.top_k or meta.get("top_k_per_hop", 5),
        config.temperature,
        config.max_tokens,
        config.max_doc_length,
        meta.get("training_config", {}).get("max_seq_len", 2048),
        config.system,
        config.seed,
        meta.get("max_hops", 0),
        config.refusal_threshold,
    )
    screen = Screen()
    try:
        if config.prompt is not None:
            answer(session, screen, config.prompt)
        else:
            if screen.interactive:
                screen.write(f"{describe(manager)}\n/help lists the commands\n")
            chat(session, screen, config.retriever_type)
    except BrokenPipeError:  # whoever read the output has gone; nothing may be flushed to it at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    compute_cleanup()


if __name__ == "__main__":
    run_main(main)
