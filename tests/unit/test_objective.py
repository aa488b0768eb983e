"""Step 1's objective against a slow float64 reference, and its penalties."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from layers import LAYERS, OFF, close, job_for, slow_kl, slow_kl_rows, slow_pattern_of, slow_scores, some_inputs
from torch import Tensor

from qkscope.training.objective import PatternTarget, revival_loss, root_penalty


@pytest.mark.parametrize("name", LAYERS)
def test_loss_is_three_terms_of_the_reference(name: str) -> None:
    inputs = some_inputs(11, **LAYERS[name])
    job = job_for(inputs, sparsity=0.0)
    found, log = job.loss(PatternTarget(inputs), OFF)
    q, k = job.query(inputs.x_BTD).view_as(inputs.q_BTNH), job.key(inputs.x_BTD).view_as(inputs.k_BTGH)
    both, half_q, half_k = slow_kl(inputs, q, k), slow_kl(inputs, q, inputs.k_BTGH), slow_kl(inputs, inputs.q_BTNH, k)
    assert min(both, half_q, half_k) > 0.01 and abs(half_q - half_k) > 1e-3
    close(found.detach(), (3 * both + half_q + half_k).detach())
    close(log["pattern_kl"], both.detach())
    found.backward()
    parameters = [p for p in job.parameters() if p.requires_grad]
    assert len(parameters) == 10
    for p, gradient in zip(parameters, torch.autograd.grad(3 * both + half_q + half_k, parameters), strict=True):
        assert p.grad is not None
        close(p.grad, gradient, 1e-3, floor=1e-3)


@pytest.mark.parametrize("name", LAYERS)
def test_the_true_queries_and_keys_cost_nothing(name: str) -> None:
    target = PatternTarget(some_inputs(12, **LAYERS[name]))
    loss, kl_3 = target.kl_of(target.q_nM, target.k_nM)
    assert abs(float(loss)) < 6e-6 and kl_3.abs().max() < 2e-6
    both, query_only, key_only = target.kl_of(target.q_nM * 1.1, target.k_nM)[1].tolist()
    assert both > 1e-4 and query_only > 1e-4 and abs(key_only) < 2e-6


class PlainTarget(PatternTarget):
    """The objective as autograd makes it of whole patterns."""

    def kl_of(self, query_nM: Tensor, key_nM: Tensor) -> tuple[Tensor, Tensor]:
        inputs, kls = self.inputs, []
        log_true = inputs.log_pattern_BNQK
        q_hat, k_hat = self.queries(query_nM), self.keys(key_nM)
        for q, k in ((q_hat, k_hat), (q_hat, inputs.k_BTGH), (inputs.q_BTNH, k_hat)):
            ratio = log_true - self.rule.log_pattern(q, k)
            rows = (log_true.exp() * ratio.masked_fill(log_true == -torch.inf, 0)).sum(-1)
            kls.append(rows.transpose(1, 2)[self.real_BT].mean())
        return 3 * kls[0] + kls[1] + kls[2], torch.stack(kls).detach()


@pytest.mark.parametrize("name", ["causal", "all"])
def test_training_goes_the_way_that_plain_autograd_goes(name: str) -> None:
    """The same losses, step after step (until, after about 60, a rounding error first turns a ReLU on or off)."""
    curves = []
    for kind in (PatternTarget, PlainTarget):
        inputs = some_inputs(19, length=16, batch=2, **LAYERS[name])
        job = job_for(inputs, width=24, k=6, sparsity=0.01)
        optimizer, losses = torch.optim.Adam(job.parameters(), lr=1e-2), []
        for _ in range(40):
            optimizer.zero_grad()
            loss, log = job.loss(kind(inputs), OFF)
            loss.backward()
            optimizer.step()
            losses.append([float(loss.detach()), float(log["pattern_kl"])])
        curves.append(torch.tensor(losses))
    found, wanted = curves
    assert (wanted[-1] < 0.6 * wanted[0]).all()
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", ["half-split", "sink-softcap-padded", "all"])
def test_attention_is_rows_of_the_pattern(name: str) -> None:
    inputs = some_inputs(18, **LAYERS[name])
    b, i = torch.tensor([1, 0, 1, 0]), torch.tensor([6, 0, 3, 4])
    true = slow_pattern_of(inputs.rule, slow_scores(inputs.rule, inputs.q_BTNH, inputs.k_BTGH))
    close(PatternTarget(inputs).attention(b, i), true[b, torch.arange(4), i, :7])


@pytest.mark.parametrize("name", LAYERS)
def test_rows_and_their_mean(name: str) -> None:
    """`kl_rows` of given scores, and the mean that leaves padded queries out."""
    inputs = some_inputs(13, **LAYERS[name])
    target = PatternTarget(inputs)
    scores = torch.randn(2, 4, 7, 7, generator=torch.Generator().manual_seed(0))
    true = slow_pattern_of(inputs.rule, slow_scores(inputs.rule, inputs.q_BTNH, inputs.k_BTGH))
    rows = slow_kl_rows(true, slow_pattern_of(inputs.rule, scores.double()))
    close(target.kl_rows(scores), rows)
    real = inputs.real_BT[:, None].expand_as(rows)
    close(target.mean(target.kl_rows(scores)), rows[real].sum() / real.sum())


def test_what_stands_at_padding_changes_no_loss() -> None:
    inputs = some_inputs(14, padding=True)
    job = job_for(inputs, activation="batchtopk", sparsity=0.1)
    losses = []
    for filler in (0.0, 50.0):
        hidden = ~inputs.real_BT
        for values in (inputs.x_BTD, inputs.q_BTNH, inputs.k_BTGH):
            values[hidden] = filler
        losses.append(float(job.loss(PatternTarget(replace(inputs)), OFF)[0].detach()))
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


# Penalties -------------------------------------------------------------------------------------------


def test_root_penalty_is_the_formula() -> None:
    acts = torch.tensor([[0.0, 4.0, 1.0], [0.0, 0.0, 9.0]])
    norms = torch.tensor([5.0, 1.0, 4.0])
    nothing = 1e-7**0.5
    wanted = ((nothing + 2 + 2) + (nothing + nothing + 6)) / 2
    assert float(root_penalty(acts, norms)) == pytest.approx(wanted, rel=1e-5)


def test_root_penalty_enters_the_loss_once_a_side() -> None:
    inputs = some_inputs(15, padding=True)
    x = inputs.x_BTD[inputs.real_BT]
    plain = float(job_for(inputs, sparsity=0.0).loss(PatternTarget(inputs), OFF)[0].detach())
    job = job_for(inputs, sparsity=0.3)
    wanted = 0.0
    for t in (job.query, job.key):
        for token in t.encode(x).detach().double():
            wanted += float((token * t.W_dec.detach().double().norm(dim=1) + 1e-7).sqrt().sum()) / len(x)
    assert float(job.loss(PatternTarget(inputs), OFF)[0].detach()) - plain == pytest.approx(0.3 * wanted, rel=1e-4)


@pytest.mark.parametrize("metric", [False, True])
def test_revival_loss_is_the_share_left_unexplained(metric: bool) -> None:
    g = torch.Generator().manual_seed(0)
    error, aux = torch.randn(5, 8, generator=g), torch.randn(5, 8, generator=g)
    root = torch.randn(2, 4, 4, generator=g)
    c = root @ root.transpose(1, 2) if metric else torch.eye(4).expand(2, 4, 4)

    def square(e: Tensor) -> float:
        return sum(float(part[h] @ c[h] @ part[h]) for part in e.view(5, 2, 4) for h in range(2))

    found = revival_loss(error, aux, c if metric else None)
    assert float(found) == pytest.approx(square(error - aux) / square(error), rel=1e-4)
    assert float(revival_loss(error, error, c if metric else None)) == 0


def test_revival_teaches_dead_features_only() -> None:
    """With every live feature's own gradient taken off, the auxiliary loss reaches the dead rows and no other."""
    inputs = some_inputs(16)
    gradients = []
    for weight in (0.0, 1.0):
        job = job_for(inputs, activation="batchtopk", aux=weight, dead_after=5)
        job.query.b_enc.data[:3] = -0.6  # seldom the largest, so idle since long ago, and yet open to revival
        job.query_idle[:3] = 100  # type: ignore[index]
        job.query.threshold.data.fill_(1e9)
        job.train()
        job.query.threshold.data[:3] = 1e9
        job.query.k = 0.2
        loss, log = job.loss(PatternTarget(inputs), OFF)
        loss.backward()
        dead = job.query_idle > 5  # type: ignore[operator]
        assert 0 < int(dead.sum()) < 9 and float(log["dead_query"]) == pytest.approx(float(dead.float().mean()))
        gradients.append(job.query.W_dec.grad)
    difference = gradients[1] - gradients[0]  # type: ignore[operator]
    assert (difference[dead] != 0).any()
    close(difference[~dead], torch.zeros_like(difference[~dead]), 1e-6)


def test_idle_counters_count_tokens_since_a_feature_fired() -> None:
    inputs = some_inputs(17, padding=True)
    job = job_for(inputs, sparsity=0.0)
    job.query.b_enc.data[4] = -1e6
    target = PatternTarget(inputs)
    for _ in range(3):
        job.loss(target, OFF)
    fired = (job.query.encode(target.x_nD) > 0).any(0)
    assert not fired[4] and fired.sum() > 4
    wanted = torch.where(fired, 0, 3 * target.n_tokens)
    assert job.get_buffer("query_idle").tolist() == wanted.tolist()
