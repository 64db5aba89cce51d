"""The same model as a transformers model, and back: weights copied, logits equal.

Two architectures of transformers hold ours, and vLLM serves both:

- NemotronH (alternating layers of one mixer each; MLP relu², attention without positions): relu2 without RoPE.
- GraniteMoeHybrid without experts (gated MLP, RoPE or none): swiglu.

transformers is imported where it is needed: pip install "nanochat[hf]".
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nanochat.common import UserError
from nanochat.model.lm import HybridLM, ModelConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NEMOTRON, GRANITE = "nemotron_h", "granitemoehybrid"


def target_of(config: ModelConfig) -> str:
    """The transformers architecture (its model_type) that equals a model of this shape."""
    if config.mlp == "relu2" and not config.rope:
        return NEMOTRON
    if config.mlp != "swiglu":
        raise UserError(
            "no transformers architecture has relu² and RoPE together with Mamba-2: train with --mlp swiglu, or with "
            "--mlp relu2 --rope false"
        )
    if config.head_dim * config.n_head != config.d_model:
        raise UserError(
            f"{config.n_head} heads of {config.head_dim} are not the width {config.d_model}: GraniteMoeHybrid, the "
            "target for swiglu, cannot hold that"
        )
    return GRANITE


def _names(config: ModelConfig, target: str) -> list[tuple[str, str]]:
    """(our name, theirs) of every weight but the MLPs of Granite, which are merged."""
    nemotron = target == NEMOTRON
    pairs = [
        ("embed.weight", "model.embeddings.weight" if nemotron else "model.embed_tokens.weight"),
        ("norm.weight", "model.norm_f.weight" if nemotron else "model.norm.weight"),
        ("lm_head.weight", "lm_head.weight"),
    ]
    for i, kind in enumerate(config.block_pattern):
        ours = f"blocks.{i}"
        if nemotron:  # a layer for the mixer, a layer for the MLP
            mixer, mlp = f"model.layers.{2 * i}", f"model.layers.{2 * i + 1}"
            pairs += [(f"{ours}.mixer_norm.weight", f"{mixer}.norm.weight")]
            pairs += [(f"{ours}.mlp_norm.weight", f"{mlp}.norm.weight")]
            pairs += [(f"{ours}.mlp.{p}_proj.weight", f"{mlp}.mixer.{p}_proj.weight") for p in ("up", "down")]
            theirs = f"{mixer}.mixer"
        else:
            layer = f"model.layers.{i}"
            pairs += [(f"{ours}.mixer_norm.weight", f"{layer}.input_layernorm.weight")]
            pairs += [(f"{ours}.mlp_norm.weight", f"{layer}.post_attention_layernorm.weight")]
            pairs += [(f"{ours}.mlp.down_proj.weight", f"{layer}.shared_mlp.output_linear.weight")]
            theirs = f"{layer}.{'self_attn' if kind == 'T' else 'mamba'}"
        if kind == "T":
            same = [f"{p}_proj.weight" for p in "qkvo"]
        else:
            same = ["in_proj.weight", "dt_bias", "A_log", "D", "norm.weight", "out_proj.weight"]
            pairs += [(f"{ours}.mixer.conv_{p}", f"{theirs}.conv1d.{p}") for p in ("weight", "bias")]
        pairs += [(f"{ours}.mixer.{name}", f"{theirs}.{name}") for name in same]
    return pairs


def hf_tensors(model: HybridLM, target: str) -> dict[str, Tensor]:
    """Our weights under the target's names."""
    ours = model.state_dict()
    tensors = {theirs: ours[name] for name, theirs in _names(model.config, target)}
    tensors = {k: t.unsqueeze(1) if k.endswith("conv1d.weight") else t for k, t in tensors.items()}
    if target == GRANITE:
        for i in range(len(model.config.block_pattern)):
            up = ours[f"blocks.{i}.mlp.up_proj.weight"]
            gate = ours[f"blocks.{i}.mlp.gate_proj.weight"]
            tensors[f"model.layers.{i}.shared_mlp.input_linear.weight"] = torch.cat([gate, up])
    return tensors


def hf_settings(config: ModelConfig, target: str) -> dict[str, Any]:
    """The target's config, but for its token ids."""
    shared = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "num_attention_heads": config.n_head,
        "num_key_value_heads": config.n_kv_head,
    }
    inner = config.mamba_expand * config.d_model
    kinds = {"T": "full_attention", "M": "linear_attention"}
    if target == NEMOTRON:
        return shared | {
            "layers_block_type": [layer for b in config.block_pattern for layer in (kinds[b], "mlp")],
            "head_dim": config.head_dim,
            "intermediate_size": config.mlp_width,
            "mlp_hidden_act": "relu2",
            "ssm_state_size": config.d_state,
            "mamba_num_heads": inner // config.mamba_head_dim,
            "mamba_head_dim": config.mamba_head_dim,
            "n_groups": config.mamba_groups,
            "conv_kernel": config.d_conv,
            "expand": config.mamba_expand,
            "layer_norm_epsilon": config.norm_eps,
            "tie_word_embeddings": False,  # it has no tied form: the matrix is written twice
        }
    return shared | {
        "num_hidden_layers": len(config.block_pattern),
        "layer_types": [kinds[b] for b in config.block_pattern],
        "hidden_act": "silu",
        "shared_intermediate_size": config.mlp_width,
        "intermediate_size": config.mlp_width,
        "num_local_experts": 0,
        "num_experts_per_tok": 0,
        "attention_multiplier": config.head_dim**-0.5,
        "position_embedding_type": "rope" if config.rope else None,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "rms_norm_eps": config.norm_eps,
        "mamba_n_heads": inner // config.mamba_head_dim,
        "mamba_d_head": config.mamba_head_dim,
        "mamba_n_groups": config.mamba_groups,
        "mamba_d_state": config.d_state,
        "mamba_d_conv": config.d_conv,
        "mamba_expand": config.mamba_expand,
        "tie_word_embeddings": config.tie_embeddings,
    }


def to_hf(model: HybridLM, max_positions: int, bos: int, eos: int) -> PreTrainedModel:
    """The transformers model with our weights. max_positions: the longest context, as it is written in its config."""
    try:
        import transformers
    except ImportError:
        raise UserError('transformers is missing: pip install "nanochat[hf]"') from None
    target = target_of(model.config)
    settings = hf_settings(model.config, target)
    settings |= {
        "max_position_embeddings": max_positions,
        "bos_token_id": bos,
        "eos_token_id": eos,
        "pad_token_id": eos,
    }
    if target == NEMOTRON:
        config = transformers.NemotronHConfig(**settings)
        theirs = transformers.NemotronHForCausalLM(config)
        # it clamps dt from below with what is meant for initialisation; the published models have none
        config.time_step_min = 0.0
        for layer in theirs.model.layers[::2]:
            layer.mixer.time_step_limit = (0.0, float("inf"))
    else:
        config = transformers.GraniteMoeHybridConfig(**settings)
        theirs = transformers.GraniteMoeHybridForCausalLM(config)
    theirs.load_state_dict(hf_tensors(model, target))
    return theirs.eval()


def from_hf(settings: dict[str, Any], tensors: dict[str, Tensor]) -> HybridLM:
    """Our model from the config (config.json) and weights of one that `to_hf` could have made."""
    target = settings.get("model_type")
    if target not in (NEMOTRON, GRANITE):
        raise UserError(f"model_type {target!r} cannot be read: there are {NEMOTRON} and {GRANITE}")
    config = _nemotron_config(settings) if target == NEMOTRON else _granite_config(settings)
    # whatever setting is not ours would make another model of the same weights
    expected = hf_settings(config, target)
    if target == NEMOTRON:
        expected |= {"time_step_min": 0.0}
    else:
        expected |= {"embedding_multiplier": 1, "residual_multiplier": 1, "logits_scaling": 1, "attention_bias": False}
    settings = {"layers_block_type": settings.get("layer_types"), **settings}  # it has gone by both names
    for name, value in expected.items():
        if name not in ("intermediate_size", "num_experts_per_tok", "rope_parameters") and settings[name] != value:
            raise UserError(f"config.json: {name} is {settings[name]!r}, only {value!r} is a model of ours")
    tensors = {f"model.{k[9:]}" if k.startswith("backbone.") else k: t for k, t in tensors.items()}
    names = dict(_names(config, target))
    tensors.setdefault("lm_head.weight", tensors[names["embed.weight"]])  # a tied one is not written
    if missing := [theirs for theirs in names.values() if theirs not in tensors]:
        raise UserError(f"the weights lack {missing[0]}")
    ours = {name: tensors[theirs] for name, theirs in names.items()}
    ours = {k: t.squeeze(1) if k.endswith("conv_weight") else t for k, t in ours.items()}
    if target == GRANITE:
        for i in range(len(config.block_pattern)):
            gate, up = tensors[f"model.layers.{i}.shared_mlp.input_linear.weight"].chunk(2)
            ours[f"blocks.{i}.mlp.gate_proj.weight"], ours[f"blocks.{i}.mlp.up_proj.weight"] = gate, up
    with torch.device("meta"):
        model = HybridLM(config)
    model.load_state_dict({k: t.contiguous() for k, t in ours.items()}, assign=True)
    if config.tie_embeddings:
        model.lm_head.weight = model.embed.weight
    return model


def _nemotron_config(s: dict[str, Any]) -> ModelConfig:
    layers = s.get("layers_block_type") or s.get("layer_types") or []
    mixers = layers[::2]
    if layers[1::2] != ["mlp"] * len(mixers) or set(mixers) - {"full_attention", "linear_attention"}:
        raise UserError("config.json: only layers that alternate between a mixer and an MLP are a model of ours")
    return ModelConfig(
        vocab_size=s["vocab_size"],
        block_pattern="".join("T" if kind == "full_attention" else "M" for kind in mixers),
        d_model=s["hidden_size"],
        n_head=s["num_attention_heads"],
        n_kv_head=s["num_key_value_heads"],
        head_dim=s["head_dim"],
        rope=False,
        d_state=s["ssm_state_size"],
        mamba_expand=s["mamba_num_heads"] * s["mamba_head_dim"] // s["hidden_size"],
        mamba_head_dim=s["mamba_head_dim"],
        mamba_groups=s["n_groups"],
        d_conv=s["conv_kernel"],
        mlp="relu2",
        mlp_width=s["intermediate_size"],
        norm_eps=s["layer_norm_epsilon"],
    )


def _granite_config(s: dict[str, Any]) -> ModelConfig:
    return ModelConfig(
        vocab_size=s["vocab_size"],
        block_pattern="".join("T" if kind == "full_attention" else "M" for kind in s["layer_types"]),
        d_model=s["hidden_size"],
        n_head=s["num_attention_heads"],
        n_kv_head=s["num_key_value_heads"],
        head_dim=s["hidden_size"] // s["num_attention_heads"],
        rope=s.get("position_embedding_type") == "rope",
        rope_theta=(s.get("rope_parameters") or {}).get("rope_theta", 10_000.0),
        d_state=s["mamba_d_state"],
        mamba_expand=s["mamba_expand"],
        mamba_head_dim=s["mamba_d_head"],
        mamba_groups=s["mamba_n_groups"],
        d_conv=s["mamba_d_conv"],
        mlp="swiglu",
        mlp_width=s["shared_intermediate_size"],
        tie_embeddings=s["tie_word_embeddings"],
        norm_eps=s["rms_norm_eps"],
    )
