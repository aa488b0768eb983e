"""Tiny random-weight models of every supported architecture, made from their configurations alone.

Weights are drawn so that patterns are far from uniform, heads differ, and norms, biases and sinks are not at their
neutral start: a wrong pattern then shows. Windows (5) are shorter than every context that a test uses.
"""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

VOCABULARY = 61
WINDOW = 5

_BASE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_LOCAL_GLOBAL = ["sliding_attention", "full_attention"]
_ROPE = {"rope_type": "default", "rope_theta": 100.0}  # low: every dimension turns visibly in a few positions
_MLA: dict[str, Any] = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": None,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 6,
    "first_k_dense_replace": 1,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 16,
    "rope_parameters": _ROPE,
}

# What differs from the base, by the name a test asks for: "model_type" or "model_type:variant".
CONFIGS: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128},
    "gpt2:unscaled": {"scale_attn_weights": False, "scale_attn_by_inverse_layer_idx": True},
    "gpt_neox": {"rotary_pct": 0.5, "rope_parameters": {**_ROPE, "partial_rotary_factor": 0.5}},
    "llama": {"rope_parameters": _ROPE},
    "llama:yarn": {
        "rope_parameters": {
            **_ROPE,
            "rope_type": "yarn",
            "factor": 4.0,
            "attention_factor": 1.5,
            "original_max_position_embeddings": 32,
        }
    },
    "qwen2": {"rope_parameters": _ROPE},
    "qwen3": {"head_dim": 16, "rope_parameters": _ROPE},
    "gemma": {"head_dim": 16, "rope_parameters": _ROPE},
    "gemma2": {
        "head_dim": 16,
        "query_pre_attn_scalar": 3,
        "attn_logit_softcapping": 2.0,
        "sliding_window": WINDOW,
        "layer_types": _LOCAL_GLOBAL,
        "rope_parameters": _ROPE,
    },
    "gemma3_text": {
        "head_dim": 16,
        "query_pre_attn_scalar": 3,
        "sliding_window": WINDOW,
        "layer_types": _LOCAL_GLOBAL,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10.0},
            "full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1000.0},
        },
    },
    "mistral": {"head_dim": 8, "sliding_window": WINDOW, "rope_parameters": _ROPE},
    "phi": {"rope_parameters": {**_ROPE, "partial_rotary_factor": 0.5}, "tie_word_embeddings": False},
    "phi3": {"rope_parameters": {**_ROPE, "partial_rotary_factor": 1.0}, "sliding_window": None},
    "olmo2": {"rope_parameters": _ROPE},
    "olmo3": {"sliding_window": WINDOW, "layer_types": _LOCAL_GLOBAL, "rope_parameters": _ROPE},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "granite": {"attention_multiplier": 0.7, "embedding_multiplier": 2.0, "residual_multiplier": 0.5},
    "cohere2": {"head_dim": 8, "sliding_window": WINDOW, "layer_types": _LOCAL_GLOBAL, "rope_parameters": _ROPE},
    "starcoder2": {"sliding_window": WINDOW, "rope_parameters": _ROPE},
    "deepseek_v3": _MLA,
    "deepseek_v3:q_lora": {**_MLA, "q_lora_rank": 12},
    "gpt_oss": {
        "head_dim": 8,
        "sliding_window": WINDOW,
        "layer_types": _LOCAL_GLOBAL,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "rope_parameters": _ROPE,
    },
    "bert": {"type_vocab_size": 2},
}
NAMES = list(CONFIGS)
BIDIRECTIONAL = ["bert"]
LEARNED_POSITIONS = ["gpt2", "gpt2:unscaled", "opt", "bert"]

# Not routed, or not causal self-attention: a site must refuse them.
UNSUPPORTED: dict[str, dict[str, Any]] = {
    "bloom": {"n_layer": 2, "n_head": 4},
    "gptj": {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4},
    "mpt": {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 128},
    "t5": {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4},
}


def tiny_model(name: str, seed: int = 0, **changes: Any) -> Any:
    """A frozen model in evaluation mode for "model_type" or "model_type:variant"; `changes` go into its config."""
    return copy.deepcopy(_made(name, seed)) if not changes else _make(name, seed, changes)


@cache
def _made(name: str, seed: int) -> Any:
    return _make(name, seed, {})


def _make(name: str, seed: int, changes: dict[str, Any]) -> nn.Module:
    model_type = name.split(":")[0]
    own = CONFIGS[name] if name in CONFIGS else UNSUPPORTED[name]
    config = AutoConfig.for_model(model_type, **{**_BASE, **CONFIGS.get(model_type, {}), **own, **changes})
    config._attn_implementation = "eager"
    kind = AutoModel if model_type in (*BIDIRECTIONAL, "t5") else AutoModelForCausalLM
    model = kind.from_config(config)
    randomise(model, seed)
    return model.eval().requires_grad_(False)


@torch.no_grad()
def randomise(model: nn.Module, seed: int = 0) -> None:
    """Draw every parameter anew: matrices keep the size of what they read, vectors leave their neutral start."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() == 1 and "sink" not in name:
            neutral = parameter.mean()  # 0 for a bias and for Gemma's norms, 1 for other norms
            parameter.copy_(neutral + 0.3 * noise)
        elif parameter.dim() == 1 or "embed" in name or "wte" in name or "wpe" in name:
            parameter.copy_(noise)
        else:
            parameter.copy_(1.5 * noise * min(parameter.shape[-2:]) ** -0.5)
