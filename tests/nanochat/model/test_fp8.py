"""FP8 with emulated products: close to the full product, trained by the same gradients, gone in evaluation."""

from __future__ import annotations

import pytest
import torch

from nanochat.common import UserError
from nanochat.model.fp8 import takes_fp8, use_fp8

CPU = torch.device("cpu")


@pytest.fixture
def model(make_model):
    return make_model(320, "MT", d_model=128, head_dim=64, mamba_head_dim=32, mlp_width=256)


def test_the_large_layers_inside_blocks_are_taken(model):
    taken = {name for name, module in model.named_modules() if takes_fp8(name, module)}
    assert "lm_head" not in taken
    assert "blocks.0.mixer.in_proj" in taken and "blocks.1.mixer.q_proj" in taken and "blocks.1.mlp.down_proj" in taken
    assert model.blocks[0].mixer.in_proj.out_features % 16  # the case that needs filling up


def test_without_the_hardware_it_says_so(model):
    with pytest.raises(UserError, match="fp8_emulate"):
        use_fp8(model, CPU)


def test_emulated_training(model):
    pytest.importorskip("torchao")
    names = list(model.state_dict())
    ids = torch.randint(0, 320, (2, 64))
    exact = model(ids, ids)
    exact.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()

    model.train()
    assert use_fp8(model, CPU, emulate=True) == 12
    assert list(model.state_dict()) == names
    loss = model(ids, ids)
    loss.backward()
    assert loss != exact and abs(loss / exact - 1) < 0.02
    for name, p in model.named_parameters():
        if name.endswith("proj.weight"):
            similarity = torch.cosine_similarity(p.grad.flatten(), gradients[name].flatten(), dim=0)
            assert similarity > 0.98, name
    model.eval()
    assert torch.equal(model(ids, ids), exact)
