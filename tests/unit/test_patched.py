"""The model's loss with the patterns of one layer or several replaced, against a forward pass written out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from layers import close
from tiny import VOCABULARY, tiny_model

from qkscope.attention import AttentionSite
from qkscope.data.sequences import Batch
from qkscope.evaluate import predictions
from qkscope.evaluate.patched import PatchedScore, zero_pattern
from qkscope.evaluate.patterns import uniform_pattern
from qkscope.evaluate.predictions import Predictions
from qkscope.kernels.row_kl import exp


def some_batch() -> Batch:
    tokens = torch.randint(3, VOCABULARY, (3, 12), generator=torch.Generator().manual_seed(0))
    real = torch.ones_like(tokens, dtype=torch.bool)
    real[1, 8:] = False
    return Batch(tokens, real, torch.arange(3), torch.zeros(3, dtype=torch.int64))


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_layers_are_replaced_together(name: str) -> None:
    model: Any = tiny_model(name)
    sites = [AttentionSite(model, None, layer=layer) for layer in (0, 1)]
    batch = some_batch()
    score = PatchedScore()
    score.add_together(
        sites,
        batch,
        {
            "own": [lambda inputs: exp(inputs.log_pattern_BNQK)] * 2,
            "zero": [zero_pattern] * 2,
            "uniform": [uniform_pattern, zero_pattern],
        },
    )
    found = score.report()
    counted = batch.real_BT[:, 1:]

    def loss() -> torch.Tensor:
        with torch.no_grad():
            logits = sites[0]._forward(batch.tokens_BT, batch.real_BT).logits.double()
        nats = -logits.log_softmax(-1)[:, :-1].gather(-1, batch.tokens_BT[:, 1:, None])[..., 0]
        return nats[counted].mean()

    plain = loss()
    close(torch.tensor(found["ce"]["model"]["mean"]), plain)
    close(torch.tensor(found["ce_increase"]["own"]["mean"]), torch.zeros(()), floor=float(plain))
    with sites[0].replace_pattern(uniform_pattern), sites[1].replace_pattern(zero_pattern):
        close(torch.tensor(found["ce"]["uniform"]["mean"]), loss())
    alone = PatchedScore()
    alone.add(sites[1], batch, {"zero": zero_pattern})
    assert abs(alone.report()["ce"]["zero"]["mean"] - found["ce"]["zero"]["mean"]) > 1e-3
    assert found["logit_kl"]["zero"]["mean"] > 0.01
    assert set(found["recovered"]["own"]) == {"zero", "uniform"}
    close(torch.tensor(found["recovered"]["own"]["zero"]["logit_kl"]["mean"]), torch.ones(()), 1e-3)


class Logits:
    """A site whose model says these."""

    def __init__(self, logits_BTV: torch.Tensor) -> None:
        self.logits = logits_BTV

    def _forward(self, *_: torch.Tensor) -> Logits:
        return self


def test_divergence_is_exact_however_far_the_logits_are_from_zero() -> None:
    g = torch.Generator().manual_seed(0)
    first = 3 * torch.randn(3, 12, 50_257, generator=g) - 120  # about as many and where GPT-2's are
    second = first + 0.01 * torch.randn(first.shape, generator=g)
    batch = some_batch()
    own, other = (Predictions(Logits(logits), batch) for logits in (first, second))  # type: ignore[arg-type]
    p, q = (logits.double().log_softmax(-1) for logits in (first, second))
    kl = (p.exp() * (p - q)).sum(-1)
    assert kl.min() > 1e-5 and kl.max() < 1e-3
    torch.testing.assert_close(own.kl(other).double(), kl, rtol=0, atol=2e-6)
    nats = -q[:, :-1].gather(-1, batch.tokens_BT[:, 1:, None])[..., 0]
    torch.testing.assert_close(other.next_token_loss().double(), nats, rtol=1e-7, atol=1e-6)


@pytest.mark.parametrize("chunk", [1, 1 << 20])
def test_divergence_has_the_gradient_of_its_formula(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(predictions, "CHUNK_CPU", chunk)
    g = torch.Generator().manual_seed(1)
    first, second = (torch.randn(3, 12, 40, generator=g) - 100 for _ in range(2))
    weights = torch.randn(3, 12, generator=g)
    batch = some_batch()
    exact = second.double().requires_grad_()
    p, q = first.double().log_softmax(-1), exact.log_softmax(-1)
    wanted = (p.exp() * (p - q)).sum(-1)
    leaf = second.clone().requires_grad_()
    found = Predictions(Logits(first), batch).kl(Predictions(Logits(leaf), batch))  # type: ignore[arg-type]
    close(found.detach().double(), wanted.detach(), 1e-5)
    (to_exact,) = torch.autograd.grad((wanted * weights).sum(), exact)
    (to_leaf,) = torch.autograd.grad((found * weights).sum(), leaf)
    close(to_leaf.double(), to_exact, 1e-4)


def test_logits_in_bfloat16_are_compared_in_float32() -> None:
    g = torch.Generator().manual_seed(2)
    first, second = ((3 * torch.randn(3, 12, 40, generator=g)).bfloat16() for _ in range(2))
    batch = some_batch()
    own, other = (Predictions(Logits(logits), batch) for logits in (first, second))  # type: ignore[arg-type]
    p, q = (logits.double().log_softmax(-1) for logits in (first, second))
    close(own.kl(other).double(), (p.exp() * (p - q)).sum(-1), 1e-5)
