"""Exercises for very small models: batches of random tokens that teach looking things up, before there is text.

Small models do not find in-context lookup by themselves: on text, the loss of a model of a million parameters stays at
guessing for thousands of steps. Four exercises build it in order. Copying makes an induction head (Olsson et al. 2022,
arXiv 2209.11895): find where the last token stood before, say what followed. Far copying makes it match several tokens
over any distance. Both are trained on the first blocks alone, so that the head forms in the first attention layer and
the layers above can use what it finds. Recall then separates finding from saying: the cue stands inside a question, and
its continuation is the answer. Records, last, go from a document's number and a key to the value that it holds, and
from its title to its number.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from nanochat.model.lm import IGNORE
from nanochat.packing import Batch
from nanochat.tokenizer import Tokenizer


@dataclass
class Marks:
    """Tokens that documents and questions are made of, as nanochat/conversation.py lays them out."""

    doc_start: int
    doc_body: int
    doc_end: int
    user_start: int
    user_end: int
    assistant_start: int
    numbers: list[list[int]]
    """Of documents 1 to 5."""
    bracket: list[int]
    closing: list[int]

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> Marks:
        names = ("doc_start", "doc_body", "doc_end", "user_start", "user_end", "assistant_start")
        special = [tokenizer.special_id(f"<|{name}|>") for name in names]
        numbers = [tokenizer.encode(str(n)) for n in range(1, 6)]
        return cls(*special, numbers, tokenizer.encode(" ["), tokenizer.encode("]"))


Example = tuple[list[int], list[bool]]  # tokens, and for each whether it is learned; the first never is


def copy_example(rng: np.random.Generator, vocab_size: int) -> Example:
    """A random sequence of 8 to 24 tokens written twice; the second copy is learned, but for its first token."""
    ids = rng.integers(0, vocab_size, int(rng.integers(8, 25))).tolist()
    return ids * 2, [False] * (len(ids) + 1) + [True] * (len(ids) - 1)


def names(rng: np.random.Generator, number: int, letters: np.ndarray) -> list[list[int]]:
    """Up to 12 names of two words of 2 to 4 tokens. 1, 2 or 4 last words are shared by all, so that the last word alone
    does not tell whose name it is."""

    def words(n: int) -> list[list[int]]:
        return [rng.choice(letters, int(rng.integers(2, 5))).tolist() for _ in range(n)]

    shared = int(rng.choice([1, 2, 4]))
    firsts, lasts = words(12 // shared), words(shared)
    return [firsts[pair // shared] + lasts[pair % shared] for pair in rng.permutation(12)[:number].tolist()]


def far_copy_example(rng: np.random.Generator, vocab_size: int) -> Example:
    """1 to 12 sequences, then all of them again in another order.

    All are spelled with the same few tokens, as names are with the same syllables, so that one token says little and
    several have to match. A third of the examples are of random sequences of 6 to 16 tokens; in their second copies all
    but the first four tokens are learned, since those say which one it is. The others are of names with 1 or 2 tokens
    after each, which are learned.
    """
    number = int(rng.choice([1, 2, 3, 4, 6, 8, 12]))
    letters = rng.integers(0, vocab_size, int(rng.choice([12, 24, 48])))
    named = bool(rng.random() < 2 / 3)
    heads = names(rng, number, letters) if named else [rng.choice(letters, 4).tolist() for _ in range(number)]
    sizes = rng.integers(1, 3, number) if named else rng.integers(2, 13, number)
    tails = [rng.choice(letters, size).tolist() for size in sizes.tolist()]
    order = [*range(number), *rng.permutation(number).tolist()]
    ids = [token for i in order for token in heads[i] + tails[i]]
    mask = [False] * (len(ids) // 2)
    for i in order[number:]:
        mask += [False] * len(heads[i]) + [True] * len(tails[i])
    return ids, mask


def recall_example(rng: np.random.Generator, vocab_size: int, marks: Marks) -> Example:
    """Documents of 10 to 29 tokens, then three questions a document: 3 to 5 of its tokens, in half of the questions
    with 0 to 8 others before and after. The answer is how the document goes on after them, 1 to 4 tokens."""
    number = int(rng.choice([1, 2, 3, 4, 6]))
    alphabet = rng.integers(0, vocab_size, int(rng.choice([24, 48, 200])))
    documents = [rng.choice(alphabet, int(rng.integers(10, 30))).tolist() for _ in range(number)]
    ids = [token for document in documents for token in (marks.doc_start, *document, marks.doc_end)]
    mask = [False] * len(ids)
    for _ in range(3 * number):
        document = documents[int(rng.integers(number))]
        width = int(rng.integers(3, 6))
        start = int(rng.integers(0, len(document) - width - 4))
        most = int(rng.choice([0, 8]))  # the cue alone is learned first
        before, after = (rng.choice(alphabet, int(n)).tolist() for n in rng.integers(0, most + 1, 2))
        cue = document[start : start + width]
        answer = document[start + width : start + width + int(rng.integers(1, 5))]
        question = [marks.user_start, *before, *cue, *after, marks.user_end, marks.assistant_start]
        ids += question + answer
        mask += [False] * len(question) + [True] * len(answer)
    return ids, mask


def record_example(rng: np.random.Generator, vocab_size: int, marks: Marks, documents: int | None = None) -> Example:
    """1 to 5 (or just so many) numbered documents that hold a value for each of the same 1 to 6 keys, then up to eight
    questions.

    The answer is a document's number in brackets and a value. Half of the questions give the document's title and a
    key, and both number and value are learned; the others give the key alone, and only the value is learned, from the
    number before it: where all give a title, choosing the value by the number is not learned. Half of the examples take
    their keys from the same 16, as relations are the same in the world: with new keys each time it takes far longer.
    """

    def some(low: int, high: int) -> list[int]:
        return rng.integers(0, vocab_size, int(rng.integers(low, high))).tolist()

    letters = rng.integers(0, vocab_size, int(rng.choice([12, 24, 48])))
    lasting = np.random.default_rng(0) if rng.random() < 0.5 else rng
    known = [lasting.integers(0, vocab_size, 1 + k % 2).tolist() for k in range(16)]
    keys = [known[k] for k in rng.permutation(16)[: int(rng.choice([1, 2, 3, 6]))].tolist()]
    ids, asked = [], []
    documents = documents or int(rng.integers(1, 6))
    for number, title in zip(marks.numbers, names(rng, documents, letters), strict=False):
        ids += [marks.doc_start, *title, *number, marks.doc_body]
        for k in rng.permutation(len(keys)).tolist():
            value = some(1, 3)
            ids += keys[k] + value
            asked.append((number, title, keys[k], value))
        ids += [marks.doc_end]
    mask = [False] * len(ids)
    for i in rng.permutation(len(asked))[:8].tolist():
        number, title, key, value = asked[i]
        titled = bool(rng.random() < 0.5)
        parts = [title if titled else [], some(0, 3), key]
        if rng.random() < 0.5:
            parts.reverse()
        question = [marks.user_start, *some(0, 3), *parts[0], *parts[1], *parts[2], *some(0, 2)]
        question += [marks.user_end, marks.assistant_start, *marks.bracket]
        cited = [*number, *marks.closing]
        ids += question + cited + value
        mask += [False] * len(question) + [titled] * len(cited) + [True] * len(value)
    return ids, mask


class WarmupBatches:
    """Rows filled with random examples; a batch is a pure function of (seed, step). vocab_size: tokens to draw from."""

    def __init__(
        self,
        example: Callable[[np.random.Generator, int], Example],
        vocab_size: int,
        max_seq_len: int,
        rows_per_step: int,
        seed: int = 0,
    ):
        self.example, self.vocab_size = example, vocab_size
        self.max_seq_len, self.rows_per_step, self.seed = max_seq_len, rows_per_step, seed

    def get(self, step: int, which: range | None = None) -> Batch:
        which = range(self.rows_per_step) if which is None else which
        size = self.max_seq_len + 1
        tokens = np.zeros((len(which), size), np.int64)
        learned = np.zeros((len(which), size), bool)
        seq_idx = np.zeros((len(which), size), np.int64)
        for r, row in enumerate(which):
            at = n = 0
            rng = np.random.default_rng([self.seed, step, row])
            while at < size:
                ids, mask = self.example(rng, self.vocab_size)
                end = min(at + len(ids), size)
                tokens[r, at:end], learned[r, at:end], seq_idx[r, at:end] = ids[: end - at], mask[: end - at], n
                at, n = end, n + 1
        targets = np.where(learned[:, 1:], tokens[:, 1:], IGNORE)
        return Batch(*(torch.from_numpy(a) for a in (tokens[:, :-1].copy(), targets, seq_idx[:, :-1].copy())))
