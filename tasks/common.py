"""What a task is: a sequence of conversations. And the tasks that plain chat data makes, by name.

Hub data sets load through `datasets` where the network allows, or from a local file.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from nanochat.common import UserError
from nanochat.conversation import render, validate
from nanochat.dataset import iter_records
from nanochat.packing import TokenData
from nanochat.tokenizer import Tokenizer

Conversation = dict[str, Any]


class Task(Protocol):
    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Conversation: ...


def load_smoltalk(path: Path | None = None) -> list[Conversation]:
    """SmolTalk (HuggingFaceTB/smol-smoltalk): conversations {"messages": [...]}, from a local .jsonl or the hub."""
    if path is not None:
        return load_conversations(path)
    ways = "give a local copy with --smoltalk_path FILE.jsonl, or leave SmolTalk out of the tasks"
    try:
        from datasets import load_dataset
    except ImportError:
        raise UserError(f'SmolTalk needs the datasets package: pip install "nanochat[hf]"; or {ways}') from None
    try:
        rows = load_dataset("HuggingFaceTB/smol-smoltalk", split="train")
    except Exception as error:  # whatever the hub client raises when there is no network
        raise UserError(f"SmolTalk cannot be had from the hub ({type(error).__name__}): {ways}") from error
    return [{"messages": row["messages"]} for row in rows]


def load_dolly(path: Path | None) -> list[Conversation]:
    """Dolly 15k (databricks-dolly-15k): {"instruction", "context", "response"}; the context goes before the
    instruction."""
    if path is None:
        raise UserError("Dolly needs its file: --dolly_path databricks-dolly-15k.jsonl (.gz too)")
    conversations = []
    for where, record in iter_records(path):
        try:
            question = "\n\n".join(t for t in (record.get("context", ""), record["instruction"]) if t.strip())
            answer = record["response"].strip()
        except (KeyError, AttributeError) as error:
            raise UserError(f"{where}: not a Dolly record (needs instruction, context, response as text)") from error
        if question.strip() and answer:
            conversations.append(
                {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
            )
    return conversations


def load_conversations(path: Path) -> list[Conversation]:
    """One conversation {"messages": [...]} a line."""
    conversations = []
    for where, record in iter_records(path):
        try:
            validate(record)
        except UserError as error:
            raise UserError(f"{where}: {error}") from error
        conversations.append(record)
    if not conversations:
        raise UserError(f"{path} holds no conversations")
    return conversations


def load_tasks(names: Sequence[str], paths: dict[str, Path | None], samples: int = -1) -> list[Conversation]:
    """The conversations of the named tasks, in order; `samples` limits each."""
    loaders = {"smoltalk": load_smoltalk, "dolly": load_dolly}
    conversations: list[Conversation] = []
    for name in names:
        loader = loaders.get(name.lower())
        if loader is None:
            raise UserError(f"unknown task {name!r}: there are SmolTalk and Dolly; other data: --conversations FILE")
        found = loader(paths.get(name.lower()))
        conversations += found[:samples] if samples >= 0 else found
    return conversations


@dataclass
class RenderCounts:
    """What happened to the examples on their way to tokens."""

    examples: int = 0
    shortened: int = 0
    dropped_documents: int = 0
    left_out: int = 0
    """Too long even without documents."""
    tokens: int = 0
    learned_tokens: int = 0

    def __str__(self) -> str:
        text = f"{self.examples:,} examples, {self.tokens:,} tokens, {self.learned_tokens:,} of them learned"
        if self.shortened:
            text += f"; {self.shortened:,} too long and lost {self.dropped_documents:,} documents from the end"
        if self.left_out:
            text += f"; {self.left_out:,} left out (question and answer alone are over max_seq_len)"
        return text


def render_examples(
    conversations: Iterable[Conversation],
    tokenizer: Tokenizer,
    max_seq_len: int,
    max_doc_tokens: int = 500,
    enough: float = math.inf,
) -> tuple[TokenData, RenderCounts]:
    """Conversations as packed training data; over-long ones lose documents from the end, never question or answer.

    Stops reading after `enough` tokens, so that conversations may be endless.
    """
    counts = RenderCounts()

    def rendered() -> Iterable[tuple[list[int], list[int]]]:
        for number, conversation in enumerate(conversations):
            if counts.tokens >= enough or (number > 100 and not counts.examples):
                return
            example = render(conversation, tokenizer, max_seq_len + 1, max_doc_tokens)
            if example is None:
                counts.left_out += 1
                continue
            counts.examples += 1
            counts.shortened += example.dropped_documents > 0
            counts.dropped_documents += example.dropped_documents
            counts.tokens += len(example.ids)
            counts.learned_tokens += sum(example.mask)
            yield example.ids, example.mask

    data = TokenData.from_examples(rendered())
    if not counts.examples:
        raise UserError(f"no example fits max_seq_len {max_seq_len}: raise it")
    return data, counts
