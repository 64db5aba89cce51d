"""Questions with answers about documents that come without any.

    write = make_writer("rules")                          # by rules over the text, no model (tasks/question_rules.py)
    write = make_writer("self:mid")                       # a model of this project, the newest of that source
    write = make_writer("hf:path/or/name")                # a causal or sequence-to-sequence model of transformers
    write = make_writer("https://host/v1", model="name")  # anything that speaks OpenAI's API
    pairs = write(documents, 3)                           # for each document [(question, answer), ...]

A model is shown one passage and asked for questions with short answers taken word for word from it; what comes back is
kept where that is so. `writing_example` renders the same for training: `prepare_rag_dataset --mode squad` writes
conversations/writing.jsonl, on which scripts.chat_sft makes a writer out of a model of one's own.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from nanochat.common import UserError
from nanochat.retrieval.document import Document
from tasks.question_rules import Pair, write_by_rules

Writer = Callable[[Sequence[Document], int], list[list[Pair]]]

PROMPT = """Write {count} questions that this text answers, with their answers.
An answer is a short piece of the text, word for word. A question can be understood without seeing the text.
Write each as
Q: question
A: answer

{title}
{content}"""
MAX_TOKENS = 64  # of a question with its answer
MAX_ANSWER_WORDS = 20
AT_ONCE = 8  # requests to a server, rows of a local model


def make_writer(name: str, model: str | None = None, device: str = "") -> Writer:
    """The writer of this name; model: at an address, the model asked for. Raises UserError."""
    kind, _, which = name.partition(":")
    if name == "rules":
        return lambda documents, count: [write_by_rules(document, count) for document in documents]
    if kind in ("http", "https"):
        return _checked(_server(name, model))
    if kind in ("self", "hf") and which:
        return _checked(_own_model(which, device) if kind == "self" else _transformers(which, device))
    raise UserError(f"no writer {name!r}; use rules, self:SOURCE, hf:PATH or the address of a server, https://HOST/v1")


def prompt(document: Document, count: int) -> str:
    return PROMPT.format(count=count, title=document.title, content=document.content)


def writing_example(document: Document, pairs: Sequence[Pair]) -> dict[str, Any]:
    """A conversation in which these are written."""
    written = "\n".join(f"Q: {question}\nA: {answer}" for question, answer in pairs)
    asked = {"role": "user", "content": prompt(document, len(pairs))}
    return {"messages": [asked, {"role": "assistant", "content": written}]}


def parse(written: str) -> list[Pair]:
    """Pairs out of what a model wrote: lines "Q: ..." each with an "A: ..." behind it, numbered or not."""
    marks = re.compile(
        r"^[\s*#>-]*(?:\d+[.)]\s*)?\**(Q|A|Question|Answer)\s*\d*\**\s*[:.]\**\s*(.*?)\**\s*$", re.IGNORECASE
    )
    pairs, question = [], ""
    for line in written.splitlines():
        if match := marks.match(line):
            if match[1][0].lower() == "q":
                question = match[2].strip()
            elif question:
                pairs.append((question, match[2].strip().strip('"“”').rstrip(".")))
                question = ""
    return pairs


def check(document: Document, pairs: Sequence[Pair], count: int) -> list[Pair]:
    """Those whose answer stands in the document, in its spelling; no question twice."""
    content = " ".join(document.content.split())
    kept: dict[str, str] = {}
    for question, answer in pairs:
        at = content.lower().find(" ".join(answer.lower().split())) if answer.strip() else -1
        if at >= 0 and len(question.split()) >= 3 and len(answer.split()) <= MAX_ANSWER_WORDS:
            kept.setdefault(question if question.endswith("?") else f"{question}?", content[at : at + len(answer)])
    return list(kept.items())[:count]


def _checked(write: Callable[[list[str], int], list[str]]) -> Writer:
    """write: what a model answers to prompts, of at most so many tokens."""

    def writer(documents: Sequence[Document], count: int) -> list[list[Pair]]:
        said = write([prompt(document, count) for document in documents], MAX_TOKENS * count)
        return [check(document, parse(text), count) for document, text in zip(documents, said, strict=True)]

    return writer


def _own_model(source: str, device: str) -> Callable[[list[str], int], list[str]]:
    from nanochat.checkpoint_manager import load_model
    from nanochat.common import compute_init
    from nanochat.engine import Engine

    model, tokenizer, _ = load_model(source, compute_init(device).device)
    engine = Engine(model, tokenizer)

    def write(prompts: list[str], max_tokens: int) -> list[str]:
        talks = [{"messages": [{"role": "user", "content": text}]} for text in prompts]
        answers = engine.generate_from_conversations(talks, temperature=0.0, max_tokens=max_tokens)
        return [text for text, _ in answers]

    return write


def _transformers(path: str, device: str) -> Callable[[list[str], int], list[str]]:
    try:
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer
    except ModuleNotFoundError as error:
        raise UserError(f"hf:{path} needs {error.name}: pip install 'nanochat[hf]'") from None
    try:
        seq2seq = AutoConfig.from_pretrained(path).is_encoder_decoder
        tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left")
        kind = AutoModelForSeq2SeqLM if seq2seq else AutoModelForCausalLM
        model = kind.from_pretrained(path, dtype="auto")
    except (OSError, ValueError) as error:
        raise UserError(f"hf:{path} cannot be loaded: {str(error).splitlines()[0]}") from None
    model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")).eval()
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token

    def as_chat(text: str) -> str:
        if seq2seq or not tokenizer.chat_template:
            return text
        said = [{"role": "user", "content": text}]
        return tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True)

    @torch.inference_mode()
    def write(prompts: list[str], max_tokens: int) -> list[str]:
        answers: list[str] = []
        for start in range(0, len(prompts), AT_ONCE):
            texts = [as_chat(text) for text in prompts[start : start + AT_ONCE]]
            special = seq2seq or not tokenizer.chat_template  # a template has them in it
            batch = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=special).to(model.device)
            done = model.generate(**batch, max_new_tokens=max_tokens, do_sample=False)
            new = done if seq2seq else done[:, batch["input_ids"].shape[1] :]
            answers += tokenizer.batch_decode(new, skip_special_tokens=True)
        return answers

    return write


def _server(address: str, model: str | None) -> Callable[[list[str], int], list[str]]:
    try:
        import openai
    except ModuleNotFoundError:
        raise UserError(f"--writer {address} needs openai: pip install 'nanochat[own]'") from None
    client = openai.OpenAI(base_url=address, api_key=os.environ.get("OPENAI_API_KEY", "none"), max_retries=4)

    def ask(text: str, max_tokens: int) -> str:
        said: list[Any] = [{"role": "user", "content": text}]
        reply = client.chat.completions.create(model=chosen, messages=said, max_tokens=max_tokens, temperature=0)
        return reply.choices[0].message.content or ""

    def write(prompts: list[str], max_tokens: int) -> list[str]:
        try:
            with ThreadPoolExecutor(AT_ONCE) as pool:
                return list(pool.map(lambda text: ask(text, max_tokens), prompts))
        except openai.OpenAIError as error:
            raise UserError(f"{address} did not answer: {_reason(error)}") from None

    try:
        chosen = model or client.models.list().data[0].id
    except (openai.OpenAIError, IndexError) as error:
        raise UserError(f"{address} does not list its models ({_reason(error)}); name one: --writer_model") from None
    return write


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
