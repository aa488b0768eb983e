"""The norm before an attention, read off the model, against the model's own module and its own hidden states."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import NAMES, tiny_model
from torch import nn

from qkscope.attention import AttentionSite, harvest
from qkscope.errors import UserError
from qkscope.norm import norm_of
from qkscope.routing import random_tokens

KINDS = {
    "gpt2": "layer", "gpt_neox": "layer", "opt": "layer", "phi": "layer", "cohere2": "layer", "starcoder2": "layer",
    "olmo2": "none", "olmo3": "none", "bert": "none",
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_norm_of_every_architecture(name: str) -> None:
    """The right kind, and the model's own x from its own residual stream, at other tokens than it was measured with."""
    model = tiny_model(name)
    site = AttentionSite(model, None, layer=1, residual=True)
    norm = norm_of(site)
    assert norm.kind == KINDS.get(name.split(":")[0], "rms")
    tokens = torch.randint(5, 55, (2, 11), generator=torch.Generator().manual_seed(5))
    real = torch.ones_like(tokens, dtype=torch.bool)
    r = harvest([site], tokens, real)[0]
    x = harvest([site], tokens, real, residual=False)[0]
    assert r.residual and not x.residual
    torch.testing.assert_close(norm(r.x_BTD), x.x_BTD, rtol=1e-5, atol=1e-5)
    hidden = model(input_ids=tokens, attention_mask=real.long(), output_hidden_states=True).hidden_states
    assert torch.equal(r.x_BTD, hidden[1])
    torch.testing.assert_close(r.q_BTNH, x.q_BTNH, rtol=0, atol=0)


@pytest.mark.parametrize(("name", "eps"), [("gpt2", 1e-3), ("gpt2", 1e-6), ("llama", 1e-2), ("llama", 1e-8)])
def test_epsilon(name: str, eps: float) -> None:
    changes: dict[str, Any] = {"layer_norm_epsilon": eps} if name == "gpt2" else {"rms_norm_eps": eps}
    found = norm_of(AttentionSite(tiny_model(name, **changes), None, layer=0)).eps
    assert found == pytest.approx(eps, rel=1e-3, abs=1e-12)


def test_gamma_and_beta_are_the_models() -> None:
    model = tiny_model("gpt2")
    own, found = model.transformer.h[1].ln_1, norm_of(AttentionSite(model, None, layer=1))
    torch.testing.assert_close(found.weight, own.weight)
    torch.testing.assert_close(found.bias, own.bias)
    gemma = tiny_model("gemma")
    found = norm_of(AttentionSite(gemma, None, layer=1))
    torch.testing.assert_close(found.weight, 1 + gemma.model.layers[1].input_layernorm.weight)
    assert not found.bias.any()


def test_another_norm_is_refused() -> None:
    class Cubed(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x**3

    model = tiny_model("llama")
    model.model.layers[0].input_layernorm = Cubed()
    with pytest.raises(UserError, match=r"layer 0: .* neither LayerNorm nor RMSNorm"):
        norm_of(AttentionSite(model, None, layer=0))


def test_bfloat16() -> None:
    """Of a model that computes in bfloat16: its norm to float32, since its module is measured by itself."""
    site = AttentionSite(tiny_model("gpt2").to(torch.bfloat16), None, layer=1)
    own: Any = site.block.ln_1
    found = norm_of(site)
    torch.testing.assert_close(found.weight, own.weight.float())
    r = harvest([site], *random_tokens(site.model), residual=True)[0]
    assert r.x_BTD.dtype == torch.bfloat16
