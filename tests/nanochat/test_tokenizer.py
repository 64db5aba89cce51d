"""Promises of nanochat/tokenizer.py: it is byte-pair encoding, loses nothing, and text never becomes control."""

from __future__ import annotations

import base64
import json
import random
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat.common import UserError
from nanochat.tokenizer import FILE_NAME, MAX_RUN_CHARS, SPECIAL_TOKENS, SPLIT_PATTERN, Tokenizer

WORDS = [
    "the",
    "river",
    "Karsholm",
    "was",
    "founded",
    "in",
    "1987",
    "it's",
    "naïve",
    "日本",
    "x_y",
    "!!",
    "\n\n",
    "  ",
    "<|",
]
ENOUGH_FOR_ALL = 256 + 200 + len(SPECIAL_TOKENS)


def random_text(seed: int, num_words: int = 2000) -> str:
    rng = random.Random(seed)
    invented = ["".join(rng.choices("aeioklmnrst", k=rng.randint(2, 8))) for _ in range(200)]
    return " ".join("".join(rng.choices(WORDS + invented, k=rng.choice([1, 1, 2]))) for _ in range(num_words))


TOKENIZER = Tokenizer.train([random_text(0)], ENOUGH_FOR_ALL)


def merge(ids: list[int], pair: tuple[int, int], new: int) -> list[int]:
    out: list[int] = []
    for i in ids:
        out.append(i)
        if tuple(out[-2:]) == pair:
            out[-2:] = [new]
    return out


def slow_train(text: str, num_merges: int) -> list[bytes]:
    """Byte-pair encoding as it is told: join the most frequent neighbours, again and again (ties: the lower ids)."""
    token_bytes = [bytes([byte]) for byte in range(256)]
    pieces = [list(piece.encode()) for piece in regex.findall(SPLIT_PATTERN, text)]
    for _ in range(num_merges):
        counts = Counter(pair for piece in pieces for pair in pairwise(piece))
        if not counts:
            break
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        pieces = [merge(piece, best, len(token_bytes)) for piece in pieces]
        token_bytes.append(token_bytes[best[0]] + token_bytes[best[1]])
    return token_bytes


def slow_encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """Within each piece, join the neighbours with the lowest rank until none has one."""
    ranks = {token: rank for rank, token in enumerate(tokenizer.token_bytes)}
    ids = []
    for piece in regex.findall(SPLIT_PATTERN, text):
        parts = [bytes([byte]) for byte in piece.encode()]
        while True:
            pairs = [(ranks.get(a + b), i) for i, (a, b) in enumerate(pairwise(parts))]
            rank, i = min((pair for pair in pairs if pair[0] is not None), default=(None, 0))
            if rank is None:
                break
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        ids += [ranks[part] for part in parts]
    return ids


def test_training_equals_the_slow_reference() -> None:
    assert len(TOKENIZER.token_bytes) == 256 + 200
    assert TOKENIZER.token_bytes == slow_train(random_text(0), 200)


@pytest.mark.parametrize("seed", range(5))
def test_encoding_equals_the_slow_reference(seed: int) -> None:
    text = random_text(seed + 1, 500)
    assert TOKENIZER.encode(text) == slow_encode(TOKENIZER, text)


@given(st.text())
def test_encoding_any_short_text_equals_the_slow_reference(text: str) -> None:
    assert TOKENIZER.encode(text) == slow_encode(TOKENIZER, text)


@given(st.text())
def test_round_trip(text: str) -> None:
    ids = TOKENIZER.encode(text)
    assert TOKENIZER.decode(ids) == text
    assert all(0 <= i < len(TOKENIZER.token_bytes) for i in ids)


@given(st.lists(st.text(), max_size=5))
@settings(max_examples=30)
def test_batch_equals_single(texts: list[str]) -> None:
    assert TOKENIZER.encode_batch(texts) == [TOKENIZER.encode(text) for text in texts]
    assert TOKENIZER.encode_batch(texts, num_threads=1) == [TOKENIZER.encode(text) for text in texts]


@pytest.mark.parametrize("name", SPECIAL_TOKENS)
def test_no_spelling_becomes_a_special_token(name: str) -> None:
    first_special = len(TOKENIZER.token_bytes)
    for text in (name, name * 3, f" {name} ", f"a{name}b", name + "x" * MAX_RUN_CHARS, name.upper()):
        for ids in (TOKENIZER.encode(text), *TOKENIZER.encode_batch([text, text])):
            assert max(ids) < first_special
            assert TOKENIZER.decode(ids) == text


def test_special_ids_follow_the_ordinary_ones_and_show_their_spelling() -> None:
    ids = [TOKENIZER.special_id(name) for name in SPECIAL_TOKENS]
    assert ids == list(range(len(TOKENIZER.token_bytes), TOKENIZER.vocab_size))
    assert TOKENIZER.decode(ids) == "".join(SPECIAL_TOKENS)
    with pytest.raises(KeyError):
        TOKENIZER.special_id("<|unheard_of|>")


@pytest.mark.parametrize("unit", ["a", " ", "\n", "\x00", "é", "日", "!", "7", "ab1", " \n", "\u2028", "<|bos|>", "😀"])
def test_a_million_characters_without_a_break(unit: str) -> None:
    text = unit * (1_000_000 // len(unit))
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


@pytest.mark.parametrize("length", [MAX_RUN_CHARS - 1, MAX_RUN_CHARS, MAX_RUN_CHARS + 1, 2 * MAX_RUN_CHARS, 7001])
@pytest.mark.parametrize("unit", ["a", " "])
def test_runs_around_the_cut_keep_every_character(length: int, unit: str) -> None:
    text = f"before {unit * length} after"
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


def test_long_ordinary_text_is_not_cut() -> None:
    text = random_text(9, 3000)
    assert len(text) > MAX_RUN_CHARS
    assert TOKENIZER.encode(text) == slow_encode(TOKENIZER, text)


def test_lone_surrogates_are_replaced_and_pairs_joined() -> None:
    assert TOKENIZER.decode(TOKENIZER.encode("a\ud800b")) == "a\ufffdb"
    assert TOKENIZER.decode(TOKENIZER.encode("\ud83d\ude00")) == "😀"
    Tokenizer.train(["a\udfffb"], ENOUGH_FOR_ALL)


def test_empty_text_has_no_tokens() -> None:
    assert TOKENIZER.encode("") == []
    assert TOKENIZER.encode_batch([]) == []
    assert TOKENIZER.decode([]) == ""


def test_decode_bytes_gives_parts_of_characters() -> None:
    ids = TOKENIZER.encode("😀")
    assert b"".join(TOKENIZER.decode_bytes([i]) for i in ids) == "😀".encode()
    assert TOKENIZER.decode(ids[:1]) == "\ufffd"


@pytest.mark.parametrize("bad", [-1, TOKENIZER.vocab_size])
def test_decoding_an_id_outside_the_vocabulary_is_an_error(bad: int) -> None:
    with pytest.raises(ValueError, match="outside the vocabulary"):
        TOKENIZER.decode([bad])


def test_small_corpus_gives_fewer_merges_and_says_so() -> None:
    small = Tokenizer.train(["abab"], 5000)
    assert small.vocab_size == len(small.token_bytes) + len(SPECIAL_TOKENS) < 300
    assert Tokenizer.train([], 5000).vocab_size == 256 + len(SPECIAL_TOKENS)


def test_vocabulary_below_the_bytes_is_refused() -> None:
    with pytest.raises(UserError, match="at least 270"):
        Tokenizer.train(["abc"], 269)


def test_fingerprint_tells_tokenizers_apart() -> None:
    other_text = Tokenizer.train([random_text(1, 200)], ENOUGH_FOR_ALL)
    fewer = Tokenizer.train([random_text(0)], ENOUGH_FOR_ALL - 1)
    other_pattern = Tokenizer(TOKENIZER.token_bytes, pattern=r"\s+|\S+")
    other_specials = Tokenizer(TOKENIZER.token_bytes, special_tokens=[*SPECIAL_TOKENS, "<|new|>"])
    swapped = Tokenizer([*TOKENIZER.token_bytes[:-2], *reversed(TOKENIZER.token_bytes[-2:])])
    all_of_them = [TOKENIZER, other_text, fewer, other_pattern, other_specials, swapped]
    assert len({tokenizer.fingerprint for tokenizer in all_of_them}) == len(all_of_them)
    assert Tokenizer.train([random_text(0)], ENOUGH_FOR_ALL).fingerprint == TOKENIZER.fingerprint


def test_load_equals_save(tmp_path: Path) -> None:
    TOKENIZER.save(tmp_path / "tokenizer")
    loaded = Tokenizer.load(tmp_path / "tokenizer")
    assert loaded.token_bytes == TOKENIZER.token_bytes
    assert loaded.special_tokens == TOKENIZER.special_tokens
    assert loaded.pattern == TOKENIZER.pattern
    assert loaded.fingerprint == TOKENIZER.fingerprint
    assert loaded.encode(random_text(3)) == TOKENIZER.encode(random_text(3))


def change(name: str, value: object) -> Callable[[dict], object]:
    return lambda data: {**data, name: value}


def without(name: str) -> Callable[[dict], object]:
    return lambda data: {key: data[key] for key in data if key != name}


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda data: [], "not a tokenizer of this project"),
        (change("format", "bpe"), "not a tokenizer of this project"),
        (change("version", 2), "format version 2"),
        (without("tokens"), "damaged"),
        (without("fingerprint"), "damaged"),
        (change("tokens", None), "damaged"),
        (change("tokens", ["%"]), "damaged"),
        (change("tokens", [base64.b64encode(b"a").decode()] * 300), "damaged"),
        (change("pattern", 5), "damaged"),
        (change("pattern", r"\s+|\S+"), "does not match its fingerprint"),
        (change("special_tokens", SPECIAL_TOKENS[:-1]), "does not match its fingerprint"),
    ],
)
def test_damaged_or_foreign_file_is_refused(tmp_path: Path, damage: Callable[[dict], object], reason: str) -> None:
    TOKENIZER.save(tmp_path)
    path = tmp_path / FILE_NAME
    path.write_text(json.dumps(damage(json.loads(path.read_text()))))
    with pytest.raises(UserError, match=reason) as error:
        Tokenizer.load(tmp_path)
    assert str(path) in str(error.value)
    assert "scripts.tok_train" in str(error.value)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"\x00" * 100, b"[" * 100_000])
def test_file_that_is_not_json_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / FILE_NAME).write_bytes(content)
    with pytest.raises(UserError, match="not a readable tokenizer file"):
        Tokenizer.load(tmp_path)


def test_missing_file_names_the_command_that_makes_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no tokenizer at .*python -m scripts\.tok_train"):
        Tokenizer.load(tmp_path)
