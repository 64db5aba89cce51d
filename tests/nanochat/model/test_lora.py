"""Promises of nanochat/model/lora.py: what is adapted, that merging changes no output, and what a checkpoint holds."""

from __future__ import annotations

import pytest
import torch

from nanochat.checkpoint_manager import load_checkpoint, save_checkpoint
from nanochat.common import UserError
from nanochat.model.lm import HybridLM, ModelConfig
from nanochat.model.lora import FILE, adapter, add_lora, has_lora, load_adapter, merged
from nanochat.tokenizer import Tokenizer

pytest.importorskip("peft")
RANK, ALPHA = 3, 12.0


def tiny(seed: int = 0) -> HybridLM:
    torch.manual_seed(seed)
    model = HybridLM(ModelConfig.from_depth(300, block_pattern="MT", d_model=32, head_dim=16, d_state=16))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.05)
    return model


def adapted(seed: int = 0) -> HybridLM:
    model = tiny(seed)
    add_lora(model, RANK, ALPHA)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if ".lora_B." in name:
                p.normal_(std=0.1)
    return model


def test_every_projection_but_mambas_last_gets_one_and_nothing_else_learns():
    model, tokens = tiny(), torch.randint(0, 300, (2, 70))
    before = model(tokens)
    assert not has_lora(model)
    count = add_lora(model, RANK, ALPHA)
    assert torch.equal(model(tokens), before) and has_lora(model)
    names = {name.split(".lora_")[0] for name in adapter(model)}
    mlps = {f"blocks.{i}.mlp.{part}_proj" for i in (0, 1) for part in ("up", "gate", "down")}
    assert names == mlps | {"blocks.0.mixer.in_proj"} | {f"blocks.1.mixer.{part}_proj" for part in "qkvo"}
    assert count == len(names)
    model(tokens, tokens).backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == set(adapter(model))


@pytest.mark.parametrize("length", [70, 128])  # 128: the fused path of the state-space scan
def test_the_merged_model_computes_the_same(length):
    model, tokens = adapted(), torch.randint(0, 300, (2, length))
    plain = tiny(1)
    plain.load_state_dict(merged(model))
    difference = (model(tokens) - plain(tokens)).abs().max()
    assert difference < 1e-4 and (plain(tokens) - tiny()(tokens)).abs().max() > 0.01
    # by hand, for one of them
    a, b = (adapter(model)[f"blocks.0.mixer.in_proj.lora_{x}.default.weight"] for x in "AB")
    expected = tiny().blocks[0].mixer.in_proj.weight + ALPHA / RANK * b @ a
    assert torch.allclose(merged(model)["blocks.0.mixer.in_proj.weight"], expected, atol=1e-6)


def test_a_checkpoint_is_merged_and_goes_on_from_the_model_it_was_adapted_from(tmp_path):
    tokenizer = Tokenizer.train(["some text to learn from, and more of it"] * 3, 280)
    model = adapted()
    directory = save_checkpoint(tmp_path / "tag", 1, model, tokenizer, {})
    assert (directory / FILE).exists()
    loaded, *_ = load_checkpoint(tmp_path / "tag")
    assert not has_lora(loaded)
    again = tiny()
    add_lora(again, RANK, ALPHA)
    load_adapter(again, directory, loaded.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))
    other = tiny(5)
    add_lora(other, RANK, ALPHA)
    with pytest.raises(UserError, match="another checkpoint"):
        load_adapter(other, directory, loaded.state_dict())
    larger = tiny()
    add_lora(larger, RANK + 1, ALPHA)
    with pytest.raises(UserError, match="another rank"):
        load_adapter(larger, directory, loaded.state_dict())
