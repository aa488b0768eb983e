"""Row-wise KL, its gradient and the fast exponential, against float64."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from layers import close, slow_kl_rows

from qkscope.kernels.row_kl import exp, row_entropy, row_kl


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    rows=st.integers(1, 6),
    keys=st.integers(1, 9),
    size=st.sampled_from([0.1, 1.0, 20.0]),
)
def test_value_and_gradient(seed: int, rows: int, keys: int, size: float) -> None:
    g = torch.Generator().manual_seed(seed)
    masked = torch.rand(2, rows, keys, generator=g) < 0.4
    masked[..., 0] = False
    true_scores, scores = (
        (size * torch.randn(2, rows, keys, generator=g)).masked_fill(masked, -torch.inf) for _ in range(2)
    )
    log_true = true_scores.log_softmax(-1)
    weight = torch.rand(2, rows, generator=g)
    found_scores = scores.clone().requires_grad_()
    found = row_kl(found_scores, log_true.exp(), row_entropy(log_true))
    (found * weight).sum().backward()

    wanted_scores = scores.double().requires_grad_()
    odds = wanted_scores.exp()
    wanted = slow_kl_rows(log_true.double().exp(), (odds / odds.sum(-1, keepdim=True)).clamp(min=1e-300))
    (wanted * weight.double()).sum().backward()
    close(found.detach(), wanted.detach(), 1e-4, floor=0.02)
    assert found.dtype == torch.float32
    assert found_scores.grad is not None and wanted_scores.grad is not None
    close(found_scores.grad, torch.nan_to_num(wanted_scores.grad), 1e-4, floor=0.02)
    assert torch.all(found_scores.grad[masked] == 0)


@settings(max_examples=40, deadline=None)
@given(arrays("float32", 12, elements=st.floats(-150, 80, width=32)))
def test_exp_is_torch_exp(values: object) -> None:
    x = torch.as_tensor(values)
    torch.testing.assert_close(exp(x), x.double().exp().float(), rtol=2e-5, atol=1e-38)


def test_exp_at_the_edges() -> None:
    x = torch.tensor([-torch.inf, 0.0, -1000.0, torch.inf, torch.nan])
    kept = x.clone()
    torch.testing.assert_close(exp(x), x.exp(), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(x, kept, rtol=0, atol=0, equal_nan=True)  # its argument is left as it was
    assert float(exp(torch.tensor(-torch.inf))) == 0.0


def test_entropy() -> None:
    pattern = torch.tensor([[0.5, 0.25, 0.25, 0.0], [1.0, 0.0, 0.0, 0.0], [0.25] * 4])
    wanted = torch.tensor([1.5, 0.0, 2.0]) * torch.log(torch.tensor(2.0))
    close(row_entropy(pattern.log()), wanted, 1e-6)


def test_kl_of_the_same_pattern_is_zero_and_of_any_other_is_not() -> None:
    scores = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    log = scores.log_softmax(-1)
    assert row_kl(scores + 3, log.exp(), row_entropy(log)).abs().max() < 1e-6
    assert (row_kl(scores * 1.1, log.exp(), row_entropy(log)) > 1e-5).all()
