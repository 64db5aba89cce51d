"""The whole model: packing, decoding and ragged batches give what one plain forward gives."""

from __future__ import annotations

import shutil

import pytest
import torch

from nanochat.model.lm import IGNORE, HybridLM, ModelConfig, default_block_pattern, parse_block_pattern

PATTERNS = ["TT", "MM", "MTMT", "TMMT"]


def tiny(pattern: str, **overrides) -> HybridLM:
    torch.manual_seed(0)
    settings = {"d_model": 64, "head_dim": 16, "d_state": 16, "mamba_head_dim": 32, "n_kv_head": 2}
    settings |= {"d_conv": 8 if pattern == "TMMT" else 4, **overrides}
    model = HybridLM(ModelConfig.from_depth(97, block_pattern=pattern, **settings))
    with torch.no_grad():  # the zero-initialised projections would hide every mixer
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.05)
    return model


@pytest.mark.parametrize("pattern", PATTERNS)
def test_decode_equals_forward(pattern):
    model = tiny(pattern).eval()
    tokens = torch.randint(0, 97, (2, 150))
    with torch.no_grad():
        full = model(tokens)
        cache = model.new_cache(2)
        parts = [model(tokens[:, :70], cache=cache), model(tokens[:, 70:83], cache=cache)]
        parts += [model(tokens[:, t : t + 1], cache=cache) for t in range(83, 150)]
    assert (torch.cat(parts, 1) - full).abs().max() < 1e-4


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="torch.compile needs a C++ compiler")
def test_compiled_steps_equal_plain_ones():
    model = tiny("MT").eval()
    tokens = torch.randint(0, 97, (2, 40))
    with torch.inference_mode():
        full = model(tokens)
        model.compile_steps()
        cache = model.new_cache(2)
        parts = [model(tokens[:, :30], cache=cache)]
        parts += [model(tokens[:, t : t + 1], cache=cache) for t in range(30, 36)]
        one = cache.select(torch.tensor([1]))  # another number of rows
        last = [model(tokens[1:, t : t + 1], cache=one) for t in range(36, 40)]
    assert (torch.cat(parts, 1) - full[:, :36]).abs().max() < 1e-4
    assert (torch.cat(last, 1) - full[1:, 36:]).abs().max() < 1e-4


@pytest.mark.parametrize("pattern", PATTERNS)
def test_ragged_batch_equals_rows_alone(pattern):
    model = tiny(pattern).eval()
    lengths = [5, 90, 1, 64]
    rows = [torch.randint(0, 97, (n,)) for n in lengths]
    padded = torch.full((4, max(lengths)), 96)
    for i, row in enumerate(rows):
        padded[i, : len(row)] = row
    following = torch.randint(0, 97, (4, 6))
    with torch.no_grad():
        cache = model.new_cache(4)
        got = [model(padded, cache=cache, valid=torch.tensor(lengths), last_only=True)]
        got += [model(following[:, t : t + 1], cache=cache, last_only=True) for t in range(6)]
        kept = cache.select(torch.tensor([3, 1]))
        forked = model(following[[3, 1], :1], cache=kept, last_only=True)
        for i, row in enumerate(rows):
            whole = torch.cat([row, following[i]])
            alone = model(whole.unsqueeze(0))[0, len(row) - 1 :]
            assert (torch.stack([g[i] for g in got]) - alone).abs().max() < 1e-4
        again = torch.cat([rows[3], following[3], following[3][:1]]).unsqueeze(0)
        assert (forked[0] - model(again)[0, -1]).abs().max() < 1e-4


@pytest.mark.parametrize("pattern", PATTERNS)
def test_packed_examples_have_the_loss_they_have_alone(pattern):
    model = tiny(pattern)
    lengths = [20, 70, 1, 37]
    rows = [torch.randint(0, 97, (n + 1,)) for n in lengths]
    tokens = torch.cat([r[:-1] for r in rows]).unsqueeze(0)
    targets = torch.cat([r[1:] for r in rows]).unsqueeze(0)
    seq_idx = torch.repeat_interleave(torch.arange(4), torch.tensor(lengths)).unsqueeze(0)
    packed = model(tokens, targets, seq_idx=seq_idx, reduction="none").split(lengths)
    for row, losses in zip(rows, packed, strict=True):
        alone = model(row[None, :-1], row[None, 1:], reduction="none")
        assert (alone - losses).abs().max() < 1e-5


def test_only_learned_positions_count_and_none_is_zero():
    model = tiny("MT")
    tokens = torch.randint(0, 97, (2, 30))
    targets = torch.full((2, 30), IGNORE)
    assert model(tokens, targets).item() == 0.0
    targets[0, 5], targets[1, 29] = 3, 4
    logits = model(tokens)
    expected = -(logits[0, 5].log_softmax(-1)[3] + logits[1, 29].log_softmax(-1)[4]) / 2
    assert torch.allclose(model(tokens, targets), expected, atol=1e-6)


def test_embeds_are_tokens():
    model = tiny("MT")
    tokens = torch.randint(0, 97, (1, 12))
    assert torch.equal(model(tokens), model(embeds=model.embed(tokens)))


VARIANTS = [{"mlp": "swiglu"}, {"rope": False}, {"tie_embeddings": True}, {"mamba_groups": 2}]


@pytest.mark.parametrize("overrides", VARIANTS)
def test_variants_train_and_checkpointing_changes_nothing(overrides):
    model = tiny("MT", **overrides)
    tokens = torch.randint(0, 97, (2, 40))
    gradients = []
    for recompute in (False, True):
        model.zero_grad()
        model.gradient_checkpointing = recompute
        model(tokens[:, :-1], tokens[:, 1:]).backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert all(g.abs().sum() > 0 for g in gradients[0])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*gradients, strict=True))


def test_block_patterns():
    assert parse_block_pattern("T,T,M,M") == parse_block_pattern("ttmm") == parse_block_pattern(["T", "T", "M", "M"])
    for bad in ("", "TXM", "T;M"):
        with pytest.raises(ValueError, match="block_pattern"):
            parse_block_pattern(bad)
    for depth in range(2, 40):
        pattern = default_block_pattern(depth)
        assert len(pattern) == depth and pattern[0] == "M" and "T" in pattern
    d20 = ModelConfig.from_depth(1000, depth=20)
    assert d20.d_model == 1280 and d20.block_pattern.count("T") == 4
    with pytest.raises(ValueError, match="disagree"):
        ModelConfig.from_depth(1000, depth=3, block_pattern="MT")
