"""Models that read a query and spell a document's id: transformers' T5, or this project's own HybridLM.

Both do the same two things: give logits for an id that is known (`target_logits`, for training), and spell ids token by
token (`begin`, for nanochat/dsi/trie.py).

    B queries, L tokens of a query, S tokens of an id, R rows of a decoding, V vocabulary, D width
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nanochat.common import UserError, quiet
from nanochat.dsi.trie import constrained
from nanochat.hf_tokenizer import OrdinaryText
from nanochat.model.lm import HybridLM, ModelConfig
from nanochat.tokenizer import Tokenizer


def pad(rows: Sequence[Sequence[int]], fill: int, device: torch.device) -> Tensor:
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[fill] * (longest - len(row))] for row in rows], device=device)


class T5Index(nn.Module):
    """Of an encoder-decoder; ids come out of its decoder."""

    kind = "t5"
    tables = ("t5.shared.weight", "t5.lm_head.weight")  # a vector of each token

    def __init__(self, t5: Any):
        super().__init__()
        self.t5 = t5
        self.start = t5.config.pad_token_id or 0  # what T5's decoder begins with

    @classmethod
    def new(cls, vocab_size: int, width: int = 128, layers: int = 2, heads: int = 4) -> T5Index:
        """A small one of random weights."""
        T5Config, T5 = _t5()
        shape = {"d_model": width, "d_kv": width // heads, "d_ff": 4 * width, "num_heads": heads}
        about = {"num_layers": layers, "num_decoder_layers": layers, "feed_forward_proj": "gated-gelu"}
        return cls(T5(T5Config(vocab_size=vocab_size, dropout_rate=0.0, **shape, **about)))

    @classmethod
    def load(cls, path: str) -> tuple[T5Index, Any]:
        """One of transformers, by folder or name on the hub, and its tokenizer."""
        _, T5 = _t5()
        from transformers import AutoTokenizer

        try:
            return cls(T5.from_pretrained(path)), AutoTokenizer.from_pretrained(path)
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise UserError(f"{path} is no T5 for transformers here: {' '.join(str(error).split())}") from error

    @property
    def config(self) -> dict[str, Any]:
        return self.t5.config.to_diff_dict()

    @classmethod
    def of_config(cls, config: dict[str, Any]) -> T5Index:
        T5Config, T5 = _t5()
        return cls(T5(T5Config(**config)))

    @property
    def device(self) -> torch.device:
        return self.t5.device

    @property
    def size(self) -> int:
        """Of the vocabulary."""
        return self.t5.config.vocab_size

    def resize(self, size: int) -> None:
        """Room for so many tokens; those that are there stay."""
        if size > self.t5.config.vocab_size:
            self.t5.resize_token_embeddings(size, mean_resizing=False)

    def target_logits(self, queries: Sequence[Sequence[int]], targets: Sequence[Sequence[int]]) -> Tensor:
        """(B, S, V): what the model says in place of each token of the targets."""
        states, mask = self._encode(queries)
        inputs = pad([[self.start, *target[:-1]] for target in targets], self.start, self.device)
        return self._decode(states, mask, inputs)

    def _encode(self, queries: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        ids = pad(queries, 0, self.device)
        lengths = torch.tensor([len(query) for query in queries], device=self.device)
        mask = (torch.arange(ids.shape[1], device=self.device) < lengths[:, None]).long()
        return self.t5.encoder(input_ids=ids, attention_mask=mask).last_hidden_state, mask

    def _decode(self, states: Tensor, mask: Tensor, inputs: Tensor) -> Tensor:
        return self.t5(encoder_outputs=(states,), attention_mask=mask, decoder_input_ids=inputs, use_cache=False).logits

    def begin(self, queries: Sequence[Sequence[int]]) -> T5Decoding:
        return T5Decoding(self, *self._encode(queries))


class T5Decoding:
    """Without a cache: ids are a handful of tokens."""

    def __init__(self, model: T5Index, states: Tensor, mask: Tensor):
        self._model, self._states, self._mask = model, states, mask
        self._inputs = torch.full((len(states), 1), model.start, device=states.device)
        self._query = torch.arange(len(states), device=states.device)
        self._read()

    def _read(self) -> None:
        states, mask = self._states[self._query], self._mask[self._query]
        self.logits = self._model._decode(states, mask, self._inputs)[:, -1]

    def advance(self, parents: Tensor, tokens: Tensor) -> None:
        self._inputs = torch.cat([self._inputs[parents], tokens[:, None]], 1)
        self._query = self._query[parents]
        self._read()


def _t5() -> tuple[Any, Any]:
    try:
        with quiet():
            from transformers import T5Config, T5ForConditionalGeneration
    except ImportError:
        raise UserError('transformers is missing, which has T5: pip install "nanochat[hf]"') from None
    return T5Config, T5ForConditionalGeneration


class LMIndex(nn.Module):
    """Of this project's own model: the query is a user's message, the id what the assistant says to it."""

    kind = "lm"
    tables = ("lm.embed.weight", "lm.lm_head.weight")

    def __init__(self, lm: HybridLM):
        super().__init__()
        self.lm = lm

    @classmethod
    def new(cls, vocab_size: int, block_pattern: str = "MTMT", width: int = 128) -> LMIndex:
        return cls(HybridLM(ModelConfig.from_depth(vocab_size, None, block_pattern, width, 64)))

    @property
    def config(self) -> dict[str, Any]:
        return vars(self.lm.config)

    @classmethod
    def of_config(cls, config: dict[str, Any]) -> LMIndex:
        return cls(HybridLM(ModelConfig(**config)))

    @property
    def device(self) -> torch.device:
        return self.lm.device

    @property
    def size(self) -> int:
        return self.lm.config.vocab_size

    @torch.no_grad()
    def resize(self, size: int) -> None:
        old = self.lm
        if size <= old.config.vocab_size:
            return
        new = HybridLM(ModelConfig(**{**vars(old.config), "vocab_size": size})).to(old.device)
        state = old.state_dict()
        for name in ("embed.weight", "lm_head.weight"):
            rows = new.state_dict()[name].clone()
            rows[: len(state[name])] = state[name]
            state[name] = rows
        new.load_state_dict(state)
        self.lm = new

    def target_logits(self, queries: Sequence[Sequence[int]], targets: Sequence[Sequence[int]]) -> Tensor:
        rows = [[*query, *target[:-1]] for query, target in zip(queries, targets, strict=True)]
        states = self.lm(pad(rows, 0, self.device), states=True)
        longest = max(map(len, targets))
        first = torch.tensor([len(query) - 1 for query in queries], device=self.device)
        places = (first[:, None] + torch.arange(longest, device=self.device)).clamp(max=states.shape[1] - 1)
        return self.lm.lm_head(states.gather(1, places[..., None].expand(-1, -1, states.shape[-1])))

    def begin(self, queries: Sequence[Sequence[int]]) -> LMDecoding:
        return LMDecoding(self.lm, queries)


class LMDecoding:
    def __init__(self, lm: HybridLM, queries: Sequence[Sequence[int]]):
        self._lm, self._cache = lm, lm.new_cache(len(queries))
        valid = torch.tensor([len(query) for query in queries], device=lm.device)
        self.logits = lm(pad(queries, 0, lm.device), cache=self._cache, valid=valid, last_only=True)

    def advance(self, parents: Tensor, tokens: Tensor) -> None:
        self._cache = self._cache.select(parents)
        self.logits = self._lm(tokens[:, None], cache=self._cache, last_only=True)


MODELS = {"t5": T5Index, "lm": LMIndex}


class QueryTokens:
    """Queries as a model reads them. tokenizer: this project's, or one of transformers (with T5's own ending)."""

    def __init__(self, tokenizer: Any, kind: str, max_tokens: int = 64):
        self.tokenizer, self.kind, self.max_tokens = tokenizer, kind, max_tokens
        self.own = isinstance(tokenizer, Tokenizer)
        if self.own:
            special = tokenizer.special_id
            self.end, self.size = special("<|assistant_end|>"), tokenizer.vocab_size
            around = [["<|bos|>", "<|user_start|>"], ["<|user_end|>", "<|assistant_start|>"]]
            self._before, self._behind = ([special(name) for name in names] for names in around)
        else:
            self.end, self.size = tokenizer.eos_token_id, len(tokenizer)
            self._before, self._behind = [], [tokenizer.eos_token_id]
        self._text = tokenizer if self.own else OrdinaryText(tokenizer)

    def encode(self, text: str) -> list[int]:
        """Ordinary text, not cut."""
        return self._text.encode(text)

    def __call__(self, query: str) -> list[int]:
        return [*self._before, *self.encode(query)[: self.max_tokens], *self._behind]


def log_probs(logits: Tensor, targets: Sequence[Sequence[int]], mask: Tensor) -> Tensor:
    """Of each target (B,), from logits (B, S, V) among the tokens that the mask (B, S, V) allows at each place; places
    behind a target's end allow token 0 alone, which says nothing."""
    chosen = pad(targets, 0, logits.device)
    return constrained(logits, mask).gather(2, chosen[..., None])[..., 0].sum(1)
