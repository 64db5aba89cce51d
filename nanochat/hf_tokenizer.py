"""Our tokenizer as a `tokenizers` file with a chat template for transformers and vLLM, and back; text for others'.

The file holds the same vocabulary, ids and splitting pattern; merges are found again from the ranks. The chat template
writes what `nanochat/conversation.py` renders, and tests hold the two to the same ids. One difference cannot be closed
there: a template makes one string, and the tokenizer turns every control token's spelling in it into that token. So the
template breaks up "<|" in texts from outside with a space; what a document spells is still never control.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanochat.common import UserError
from nanochat.conversation import CHAT_TEMPLATE
from nanochat.tokenizer import SPECIAL_TOKENS, Tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class OrdinaryText:
    """Text as ids of a tokenizer of transformers, and never as one that controls: what spells a special token becomes
    the tokens of its letters. controls: ids that control though the vocabulary has them as words."""

    def __init__(self, tokenizer: Any, controls: Collection[int | None] = ()):
        self.tokenizer = tokenizer
        self._special = set(tokenizer.get_added_vocab().values()) | set(tokenizer.all_special_ids)
        if tokenizer.unk_token_id not in controls:  # an unknown word, which controls nothing
            self._special.discard(tokenizer.unk_token_id)

    def encode(self, text: str) -> list[int]:
        """Nothing is put before or behind it."""
        ids = []
        for i in self._found(text):
            if i in self._special:  # a vocabulary that holds the spelling as a word
                spelled = self.tokenizer.convert_ids_to_tokens(i)
                ids += [j for letter in spelled for j in self._found(letter) if j not in self._special]
            else:
                ids.append(i)
        return ids

    def _found(self, text: str) -> list[int]:
        """The tokenizer's own steps less its search for added tokens, which would find them in any text."""
        fast = self.tokenizer.backend_tokenizer
        if fast.normalizer is not None:
            text = fast.normalizer.normalize_str(text)
        words = [text]
        if fast.pre_tokenizer is not None:
            words = [word for word, _ in fast.pre_tokenizer.pre_tokenize_str(text)]
        return [token.id for word in words for token in fast.model.tokenize(word)]


def byte_letters() -> dict[int, str]:
    """The printable letter that stands for each byte in byte-level vocabularies (GPT-2's table): visible Latin-1 for
    themselves, the others by the letters from U+0100 on."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [b for b in range(256) if b not in visible]
    return {b: chr(b) for b in visible} | {b: chr(256 + i) for i, b in enumerate(others)}


def merges_of(token_bytes: list[bytes]) -> list[tuple[bytes, bytes]]:
    """The pair that makes each token longer than a byte, by rank: what is left of it when it is encoded with the
    merges before it."""
    ranks = {token: rank for rank, token in enumerate(token_bytes)}
    merges = []
    for token in token_bytes:
        if len(token) == 1:
            continue
        parts = [bytes([b]) for b in token]
        while len(parts) > 2:
            pairs = [ranks.get(a + b, len(ranks)) for a, b in itertools.pairwise(parts)]
            at = min(range(len(pairs)), key=pairs.__getitem__)
            if pairs[at] >= ranks[token]:
                raise ValueError(f"token {token!r} cannot be reached by merges")
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        merges.append((parts[0], parts[1]))
    return merges


def to_hf_tokenizer(tokenizer: Tokenizer, max_positions: int) -> PreTrainedTokenizerFast:
    """The same tokenizer for transformers; save_pretrained writes it."""
    try:
        from tokenizers import AddedToken, Regex, decoders, pre_tokenizers
        from tokenizers import Tokenizer as Fast
        from tokenizers.models import BPE
        from transformers import PreTrainedTokenizerFast
    except ImportError:
        raise UserError('transformers is missing: pip install "nanochat[hf]"') from None
    letters = byte_letters()

    def spelled(token: bytes) -> str:
        return "".join(letters[b] for b in token)

    vocab = {spelled(token): rank for rank, token in enumerate(tokenizer.token_bytes)}
    merges = [(spelled(a), spelled(b)) for a, b in merges_of(tokenizer.token_bytes)]
    fast = Fast(BPE(vocab, merges))
    fast.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(tokenizer.pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    fast.decoder = decoders.ByteLevel()
    fast.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in tokenizer.special_tokens])
    return PreTrainedTokenizerFast(
        tokenizer_object=fast,
        bos_token="<|bos|>",
        eos_token="<|assistant_end|>",
        pad_token="<|assistant_end|>",
        chat_template=CHAT_TEMPLATE,
        model_max_length=max_positions,
        clean_up_tokenization_spaces=False,
    )


def from_hf_tokenizer(directory: Path) -> Tokenizer:
    """Our tokenizer from the tokenizer.json that `to_hf_tokenizer` made."""
    path = directory / "tokenizer.json"
    try:
        data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        vocab = data["model"]["vocab"]
        pattern = data["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"]
        added = sorted(data["added_tokens"], key=lambda token: token["id"])
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise UserError(f"{path} is not a tokenizer that was exported from here ({error!r})") from error
    specials = [token["content"] for token in added]
    if missing := [name for name in SPECIAL_TOKENS if name not in specials]:
        raise UserError(f"{path} lacks the special tokens {', '.join(missing)}: it was not exported from here")
    back = {letter: byte for byte, letter in byte_letters().items()}
    ordinary = sorted((rank, token) for token, rank in vocab.items() if token not in specials)
    if [rank for rank, _ in ordinary] + [token["id"] for token in added] != list(range(len(ordinary) + len(added))):
        raise UserError(f"{path}: ids must run from 0, special tokens last")
    return Tokenizer([bytes(back[letter] for letter in token) for _, token in ordinary], pattern, specials)
