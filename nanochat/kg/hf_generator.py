"""A causal language model of transformers as the generator of D-RAG (Gao et al., EMNLP 2025).

Facts stand before the question, each as one vector that a projector made and the embeddings of its text. The loss on
the answer reaches the projector through the embeddings, the retriever through the facts' gates (`hf_gates`), and the
model itself through LoRA (Hu et al. 2021, arXiv 2106.09685) by peft; the model's own weights stay.

LoRA is on every linear layer but the last and Mamba's out_proj, whose weight the fused kernel reads past any adapter.
The routed experts of mixtures are tensors, not linear layers, and stay as they are.

    pip install "nanochat[hf]"

Shapes: B batch, L length, D model width, F facts, V vocabulary.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanochat.common import UserError, quiet
from nanochat.hf_tokenizer import OrdinaryText
from nanochat.kg.closed_answers import ClosedAnswer, likeliest
from nanochat.kg.hf_gates import ARGUMENT, MIXERS, check_mixers, lay_out, make_gates, positions, prepare
from nanochat.model.fp8 import SMALLEST, fp8_config
from nanochat.model.lm import IGNORE


@dataclass(frozen=True)
class LoRA:
    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0


class HFGenerator:
    """Made by `load`. model: peft's. width: D. end: the token that ends an answer. bos: the one that texts begin
    with, or None where the tokenizer has none."""

    def __init__(self, model: Any, tokenizer: Any):
        self.model, self.tokenizer = model, tokenizer
        self._lm = model.get_base_model()  # the adapters are inside of it
        self._back = prepare(self._lm)
        self.width: int = self._lm.get_input_embeddings().embedding_dim
        self.bos: int | None = tokenizer.bos_token_id
        self.end, self._stops = _ends(self._lm, tokenizer)
        self._text = OrdinaryText(tokenizer, (self.bos, *self._stops))
        self.fact_marks = [], self.encode("\n")
        arguments = inspect.signature(self._lm.forward).parameters
        self._cache_argument = "cache" if "cache" in arguments else "past_key_values"  # renamed in transformers 5.24

    fact_marks: tuple[list[int], list[int]]
    """What stands before and behind a fact."""

    @property
    def device(self) -> torch.device:
        return self._lm.get_input_embeddings().weight.device

    def encode(self, text: str) -> list[int]:
        """Ordinary text, with nothing before it."""
        return self._text.encode(text)

    def decode(self, ids: Iterable[int]) -> str:
        return self.tokenizer.decode(list(ids), skip_special_tokens=True)

    def frame(self, question: str) -> tuple[list[int], list[int]]:
        """What stands before the facts, and what stands between them and the answer."""
        before = [self.bos] if self.bos is not None else []
        return before + self.encode("Facts:\n"), self.encode(f"Question: {question}\nAnswer:")

    def embed(self, ids: Tensor) -> Tensor:
        """(...) -> (..., D), in the model's type."""
        return self._lm.get_input_embeddings()(ids)

    def losses(self, embeds: Tensor, fact: Tensor, gate: Tensor | None, targets: Tensor, valid: Tensor) -> Tensor:
        """The mean loss of each row's answer (B,), in fp32; 0 for a row without one.

        embeds (B, L, D), padded on the right; fact (B, L): the fact of each token, -1 for other text; gate (B, F) in
        [0, 1], or None: all are there; targets (B, L): the token to predict at each place, -1 where nothing is learned;
        valid (B,): tokens of each row, at least one."""
        embeds = embeds.to(self._lm.dtype)
        extra = {}
        gates = None
        if gate is not None and gate.shape[1]:
            layout = lay_out(fact, self._back)
            gates = make_gates(layout, gate)
            embeds, targets = layout.spread(embeds), layout.spread(targets, IGNORE)
            valid = layout.place.gather(1, valid[:, None] - 1)[:, 0] + 1
            extra = {ARGUMENT: gates, "position_ids": positions(layout, gates.token)}
        mask = torch.arange(embeds.shape[1], device=embeds.device) < valid[:, None]
        columns = (targets != IGNORE).any(0).nonzero()[:, 0]  # logits of the others are not made
        if not len(columns):
            return (embeds * 0).sum((1, 2)).float()
        logits = self._lm(
            inputs_embeds=embeds, attention_mask=mask.long(), logits_to_keep=columns, use_cache=False, **extra
        ).logits
        if gates is not None and not gates.seen:
            raise UserError(f"{type(self._lm).__name__} does not hand gates on to its layers: no D-RAG with it")
        targets = targets[:, columns]
        each = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="none")
        learned = (targets != IGNORE).sum(1)
        return each.view_as(targets).sum(1) / learned.clamp(min=1)

    @torch.no_grad()
    def generate(
        self,
        embeds: Tensor,
        fact: Tensor,
        valid: Tensor,
        max_tokens: int,
        closed: Sequence[ClosedAnswer] | None = None,
    ) -> list[list[int]]:
        """The likeliest next tokens after each row, until one ends the answer (it is left out). closed: what each row's
        answer may be.

        embeds (B, L, D), padded on the right, valid (B,). Facts that were not chosen are not in the rows; those that
        are, whole: what belongs to which (fact) no longer matters."""
        B, L, _ = embeds.shape
        at = torch.arange(L, device=embeds.device)
        back = (at - (L - valid[:, None])) % L  # to padding on the left: decoded tokens follow real ones
        x = embeds.to(self._lm.dtype).gather(1, back[..., None].expand_as(embeds))
        mask = (at >= L - valid[:, None]).long()
        x = x * mask[..., None].to(x.dtype)
        place = (mask.cumsum(1) - 1).clamp(min=0)
        cache = {self._cache_argument: _new_cache(self._lm), "use_cache": True}
        made: list[list[int]] = [[] for _ in range(B)]
        going = set(range(B))
        with _evaluating(self._lm):
            for step in range(max_tokens):
                logits = self._lm(
                    inputs_embeds=x, attention_mask=mask, position_ids=place, logits_to_keep=1, **cache
                ).logits
                ids = likeliest(logits[:, -1], closed)
                for row, i in enumerate(ids):
                    if i in self._stops:
                        going.discard(row)
                    elif row in going:
                        made[row].append(i)
                if not going or step + 1 == max_tokens:
                    break
                x, place = self.embed(torch.tensor(ids, device=x.device)[:, None]), place[:, -1:] + 1
                mask = F.pad(mask, (0, 1), value=1)
        return made

    def train(self, on: bool = True) -> None:
        self.model.train(on)

    def trainable_parameters(self) -> list[nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]

    def save(self, directory: Path) -> None:
        """What was learned, and the path of the model it belongs to."""
        self.model.save_pretrained(str(directory))

    def load_adapters(self, directory: Path) -> None:
        """What `save` wrote of a model of the same shape."""
        from peft import set_peft_model_state_dict
        from safetensors.torch import load_file

        set_peft_model_state_dict(self.model, load_file(directory / "adapter_model.safetensors"))


def load(
    path: str | Path,
    *,
    lora: LoRA | None = None,
    dtype: str = "auto",
    device: str | torch.device = "cpu",
    checkpointing: bool = False,
    fp8: bool = False,
    fp8_emulate: bool = False,
) -> HFGenerator:
    """path: a model's directory or its name on the Hugging Face hub, or what `save` wrote.

    lora: for a model without, default LoRA(). dtype: of the weights, "auto" for the file's; adapters are fp32.
    checkpointing: layers are computed again in backward, a third more time for far less memory. fp8: the large products
    of the frozen layers in 8-bit floats; fp8_emulate: the same roundings on any machine."""
    try:
        with quiet():
            from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        raise UserError(f'{error.name} is missing, which reads hf: models: pip install "nanochat[hf]"') from None
    saved = (Path(path) / "adapter_config.json").exists()
    if saved and lora is not None:
        raise UserError(f"{path} has its own LoRA: its settings cannot be chosen again")
    try:
        base = PeftConfig.from_pretrained(str(path)).base_model_name_or_path if saved else str(path)
        tokenizer = AutoTokenizer.from_pretrained(base)
        lm = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path} is not a causal language model for transformers here: {reason}") from error
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise UserError(f"{base}: its tokenizer has no fast version, which is needed")
    check_mixers(lm)
    lm.to(device)
    if fp8 or fp8_emulate:
        use_fp8(lm, torch.device(device), fp8_emulate)
    with quiet():
        if saved:
            model = PeftModel.from_pretrained(lm, str(path), is_trainable=True)
        else:
            lora = LoRA() if lora is None else lora
            model = get_peft_model(
                lm,
                LoraConfig(
                    r=lora.rank,
                    lora_alpha=lora.alpha,
                    lora_dropout=lora.dropout,
                    target_modules="all-linear",
                    exclude_modules=_bypassed(lm) or None,
                    task_type="CAUSAL_LM",
                ),
            )
        if checkpointing:
            lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    generator = HFGenerator(model, tokenizer)
    generator.train(False)
    return generator


def use_fp8(lm: nn.Module, device: torch.device, emulate: bool = False) -> int:
    """Exchange the large linear layers inside of blocks for torchao's, in place; returns how many."""
    config = fp8_config(device, emulate)
    from torchao.float8 import convert_to_float8_training

    bypassed = set(_bypassed(lm))
    chosen = []

    def large(module: nn.Module, name: str) -> bool:
        sides = module.in_features, module.out_features
        fits = min(sides) >= SMALLEST and not any(side % 16 for side in sides)
        fits = fits and ".layers." in f".{name}" and name not in bypassed
        chosen.extend([name] if fits else [])
        return fits

    convert_to_float8_training(lm, config=config, module_filter_fn=large)
    return len(chosen)


def _bypassed(lm: nn.Module) -> list[str]:
    """The layers whose weights fused kernels read themselves."""
    return [f"{name}.out_proj" for name, module in lm.named_modules() if type(module).__name__ in MIXERS]


def _ends(lm: Any, tokenizer: Any) -> tuple[int, set[int]]:
    """The token that ends an answer, and all that the model may end with."""
    stops: set[int] = set()
    for settings in (lm.generation_config, lm.config):
        given = getattr(settings, "eos_token_id", None)
        stops |= set(given if isinstance(given, Sequence) else [] if given is None else [given])
    end = tokenizer.eos_token_id
    if end is None:
        if not stops:
            raise UserError(f"{lm.config.name_or_path}: neither its tokenizer nor its settings name a token that ends")
        end = min(stops)
    return end, stops | {end}


def _new_cache(lm: Any) -> Any:
    from transformers import DynamicCache

    return DynamicCache(config=lm.config)


@contextlib.contextmanager
def _evaluating(lm: nn.Module) -> Iterator[None]:
    training = lm.training
    lm.eval()
    try:
        yield
    finally:
        lm.train(training)
