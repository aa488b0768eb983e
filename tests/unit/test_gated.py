"""Scores of all pairs of active features with a gate each, and the gates' gradient, against loops in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from layers import LAYERS, close, rotation, some_inputs, some_sides, turn_matrix
from torch import Tensor

from qkscope.pairs import gated as room
from qkscope.pairs.gated import GatedScores
from qkscope.pairs.pair_map import rows, with_bias
from qkscope.pattern import AttentionInputs
from qkscope.rotary import Rotary

Sides = tuple[Tensor, Tensor, Tensor, Tensor]  # both activations, both rows


def some_case(inputs: AttentionInputs, *, silent: bool = False) -> Sides:
    """Activations and rows of random dictionaries; padding has no feature, not even the bias, as for an adversary."""
    query, key = some_sides(inputs, widths=(9, 7))
    acts = [(with_bias(side.encode(inputs.x_BTD)) * inputs.real_BT[..., None]).detach() for side in (query, key)]
    if silent:  # a token, a feature and a sequence without anything
        acts[0][0, 2], acts[1][..., 3], acts[1][1] = 0, 0, 0
    n, g = inputs.q_BTNH.shape[2], inputs.k_BTGH.shape[2]
    return acts[0], acts[1], rows(query, n).detach(), rows(key, g).detach()


def slow_gated(gates_NFJ: Tensor, case: Sides, inputs: AttentionInputs) -> Tensor:
    acts_q, acts_k, rows_q, rows_k = (y.double() for y in case)
    batch, length, _ = acts_q.shape
    heads, groups = rows_q.shape[1], rows_k.shape[1]
    out = gates_NFJ.new_zeros(batch, heads, length, length)
    entries = []
    for b in range(batch):
        turns = [turn_matrix(inputs.rule.rotary, b, t, rows_q.shape[2]) for t in range(length)]
        for head in range(heads):
            for i in range(length):
                u = (turns[i] @ (acts_q[b, i, :, None] * rows_q[:, head]).T).T
                for j in range(length):
                    v = (turns[j] @ (acts_k[b, j, :, None] * rows_k[:, head * groups // heads]).T).T
                    entries.append((gates_NFJ[head] * (u @ v.T)).sum() * inputs.rule.scaling)
    return torch.stack(entries).view_as(out)


@pytest.mark.parametrize("silent", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_scores_and_gradients_are_the_loops(name: str, silent: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """One token at a time, or all at once."""
    monkeypatch.setattr(room, "BLOCK_CPU", 1 if silent else 1 << 22)
    inputs = some_inputs(31, length=5, **LAYERS[name])
    case = some_case(inputs, silent=silent)
    g = torch.Generator().manual_seed(0)
    gates = torch.rand(4, 10, 8, generator=g, dtype=torch.float64)
    weights = torch.randn(2, 4, 5, 5, generator=g, dtype=torch.float64)
    slow, fast = gates.clone().requires_grad_(), gates.float().requires_grad_()
    wanted, found = slow_gated(slow, case, inputs), GatedScores(*case, inputs.rule)(fast)
    close(found.detach().double(), wanted.detach())
    (wanted * weights).sum().backward()
    (found * weights.float()).sum().backward()
    assert slow.grad is not None and fast.grad is not None
    close(fast.grad.double(), slow.grad)


@pytest.mark.parametrize("kind", [None, "half", "partial"])
def test_gradients_in_double_precision(kind: str | None) -> None:
    inputs = some_inputs(32, length=4, heads=2, groups=1)
    rotary = kind and rotation(kind, 4, inputs.q_BTNH.shape[-1])
    if rotary:
        rotary = Rotary(rotary.cos_BTH.double(), rotary.sin_BTH.double(), rotary.partner_H)
    acts_q, acts_k, rows_q, rows_k = (y.double() for y in some_case(inputs))
    made = GatedScores(acts_q, acts_k, rows_q, rows_k, replace(inputs.rule, rotary=rotary or None))
    gates = torch.rand(2, 10, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(made, gates)


def test_a_token_of_many_features_and_a_feature_of_many_tokens() -> None:
    """Cells of all sizes: as a start of training has, and the feature of the first token."""
    inputs = some_inputs(33, length=24, **LAYERS["half-split"])
    acts_q, acts_k, rows_q, rows_k = some_case(inputs)
    acts_q[0, 5] = torch.rand(10) + 0.1
    acts_q[0, 6, :9] = 0
    acts_k[0, :, 2] = torch.rand(24) + 0.1
    case = acts_q, acts_k, rows_q, rows_k
    gates = torch.rand(4, 10, 8, generator=torch.Generator().manual_seed(2))
    close(GatedScores(*case, inputs.rule)(gates).double(), slow_gated(gates.double(), case, inputs))
