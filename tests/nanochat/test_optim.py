"""Which optimizer moves which parameter, and that a saved state goes on bit for bit."""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from nanochat import optim
from nanochat.optim import Muon, Optimizers, adamw

MUON_ENDS = ("q_proj", "k_proj", "v_proj", "o_proj", "in_proj", "out_proj", "up_proj", "gate_proj", "down_proj")


def homes(optimizers):
    """{parameter name: (optimizer, learning rate)}"""
    return {
        optimizers.names[p]: (type(part).__name__, group["lr"])
        for part in optimizers.parts
        for group in part.param_groups
        for p in group["params"]
    }


def one_step(model, optimizers, seed):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 60, (2, 24), generator=generator)
    model(tokens, tokens.roll(-1, 1)).backward()
    optimizers.step()
    optimizers.zero_grad()


@pytest.mark.parametrize("mlp", ["relu2", "swiglu"])
def test_matrices_in_blocks_go_to_muon_and_the_rest_to_adamw(make_model, mlp):
    model = make_model(60, "MT", mlp=mlp, d_model=48)
    optimizers = Optimizers(model, matrix_lr=0.02, embed_lr=0.2, head_lr=0.004, scalar_lr=0.005)
    found = homes(optimizers)
    parameters = dict(model.named_parameters())
    assert found.keys() == parameters.keys()
    by_width = (48 / 768) ** -0.5
    for name, (optimizer, lr) in found.items():
        if name.removesuffix(".weight").endswith(MUON_ENDS):
            assert parameters[name].ndim == 2
            assert (optimizer, lr) == ("Muon", 0.02), name
        else:
            expected = {"embed.weight": 0.2 * by_width, "lm_head.weight": 0.004 * by_width}.get(name, 0.005)
            assert (optimizer, lr) == ("AdamW", pytest.approx(expected)), name
    assert found["blocks.0.mixer.conv_weight"][0] == "AdamW"  # two-dimensional, but rows and columns are no features


def test_a_tied_weight_is_moved_once_and_a_frozen_one_never(make_model):
    tied = make_model(60, tie_embeddings=True)
    found = homes(Optimizers(tied))
    assert "lm_head.weight" not in found
    assert found["embed.weight"][0] == "AdamW"

    frozen = make_model(60)
    frozen.requires_grad_(False)
    frozen.norm.weight.requires_grad_(True)
    assert list(homes(Optimizers(frozen))) == ["norm.weight"]


def test_the_scale_multiplies_every_rate_from_its_start(make_model):
    optimizers = Optimizers(make_model(60))
    start = homes(optimizers)
    for scale in (0.5, 0.1, 1.0, 0.0):
        optimizers.set_lr_scale(scale)
        for name, (_, lr) in homes(optimizers).items():
            assert lr == pytest.approx(scale * start[name][1])


def test_a_step_of_scale_zero_moves_nothing_and_one_of_scale_one_everything(make_model):
    model = make_model(60)
    optimizers = Optimizers(model)
    for scale, moves in ((0.0, False), (1.0, True)):
        optimizers.set_lr_scale(scale)
        before = copy.deepcopy(model.state_dict())
        one_step(model, optimizers, 0)
        assert all(torch.equal(before[k], v) != moves for k, v in model.state_dict().items())
        assert all(p.grad is None for p in model.parameters())


def test_a_saved_state_goes_on_bit_for_bit(tmp_path, make_model):
    model = make_model(60, "MT")
    optimizers = Optimizers(model)
    for seed in range(3):
        one_step(model, optimizers, seed)
    state = optimizers.state_dict()
    assert {key.rpartition("/")[0] for key in state} == set(dict(model.named_parameters()))
    save_file({k: v.contiguous() for k, v in state.items()}, tmp_path / "state.safetensors")

    copied = copy.deepcopy(model)
    resumed = Optimizers(copied)
    resumed.load_state_dict(load_file(tmp_path / "state.safetensors"))
    fresh_model = copy.deepcopy(model)
    fresh = Optimizers(fresh_model)
    for seed in range(3, 6):
        for m, o in ((model, optimizers), (copied, resumed), (fresh_model, fresh)):
            one_step(m, o, seed)
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), copied.parameters(), strict=True))
    # the state matters: without it the same steps end elsewhere
    assert not any(torch.equal(a, b) for a, b in zip(model.parameters(), fresh_model.parameters(), strict=True))


def test_a_state_of_another_model_is_refused(make_model):
    model, deeper = make_model(60, "MT"), make_model(60, "MTT")
    optimizers = Optimizers(deeper)
    one_step(deeper, optimizers, 0)
    with pytest.raises(ValueError, match=r"unknown parameters: \['blocks.2"):
        Optimizers(model).load_state_dict(optimizers.state_dict())


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_muon_moves_every_matrix_as_torchs_does(weight_decay, monkeypatch):
    """Tall, wide and square ones, some without a gradient, in stacks cut short by the limit."""
    monkeypatch.setattr(optim, "STACK", 5000)
    shapes = [(32, 64), (64, 32), (48, 48), (32, 64), (64, 32), (48, 48), (96, 48), (48, 48)]

    def moved(kind: type) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(3)
        params = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
        optimizer = kind(params, lr=0.05, momentum=0.9, nesterov=True, weight_decay=weight_decay)
        for step in range(3):
            for p in params:
                p.grad = torch.randn(p.shape, generator=generator)
            params[step].grad = None
            optimizer.step()
        return params

    for ours, theirs in zip(moved(Muon), moved(torch.optim.Muon), strict=True):
        # equal to the last bit here; elsewhere a sum in another order may round to the next bfloat16
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


def test_adamw_moves_single_parameters_at_their_own_rate():
    parts = {"one": (nn.Linear(2, 2), 1e-3), "two": (nn.Linear(2, 1), 1e-2)}
    parts["two"][0].bias.requires_grad_(False)
    optimizers = adamw(parts, {"bias": 0.1})
    assert sorted(optimizers.names.values()) == ["one.bias", "one.weight", "two.weight"]
    before = {name: p.detach().clone() for p, name in optimizers.names.items()}
    for p in optimizers.names:
        p.grad = torch.ones_like(p)
    optimizers.set_lr_scale(0.5)
    optimizers.step()  # AdamW's first step is its rate
    moved = {name: (before[name] - p).abs().max().item() for p, name in optimizers.names.items()}
    assert moved == pytest.approx({"one.bias": 0.05, "one.weight": 5e-4, "two.weight": 5e-3}, rel=1e-3)
    resumed = adamw(parts, {"bias": 0.1})
    resumed.load_state_dict(optimizers.state_dict())
    assert all(
        torch.equal(a, b) for a, b in zip(*(o.state_dict().values() for o in (optimizers, resumed)), strict=True)
    )
