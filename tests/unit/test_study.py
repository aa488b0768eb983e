"""Studies: every figure again, the slow way, on a small model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from layers import close, some_decomposition
from tiny import tiny_model
from torch import Tensor

from qkscope.attention import AttentionSite, harvest
from qkscope.data import Batch
from qkscope.data.prompts import Asked
from qkscope.decomposition import Decomposition
from qkscope.errors import UserError
from qkscope.explain.intervene import Edit, Pair
from qkscope.explain.study import LEADING, REMOVED, TRIED, _blind, _Half, leading_pairs, study_layers

ENDS = [6, 8, 7, 8, 5, 8, 6, 7]
MARKS = {"A": [2, 3, 1, 4, 2, 5, 3, 1], "B": [4, -1, 3, 2, 1, 1, 5, 2]}


def some_prompts(choices: bool = True) -> Asked:
    """Eight prompts of random tokens; one of them has no B."""
    tokens = torch.randint(3, 60, (8, 9), generator=torch.Generator().manual_seed(4))
    end = torch.tensor(ENDS)
    real = torch.arange(9) <= end[:, None]
    nothing = torch.zeros(8, dtype=torch.int64)
    marks = {name: torch.tensor(at) for name, at in MARKS.items()}
    right = [[5], [6, 7], [8], [9], [5], [6], [7], [8]] if choices else [[]] * 8
    wrong = [[10], [11], [12, 13], [14], [15], [16], [17], [18]] if choices else [[]] * 8
    return Asked(Batch(tokens, real, torch.arange(8), nothing), end, marks, right, wrong)


def opened(name: str = "llama", layer: int = 1) -> tuple[AttentionSite, Decomposition]:
    site = AttentionSite(tiny_model(name), layer=layer)
    batch = some_prompts().batch
    dec = some_decomposition(harvest([site], batch.tokens_BT, batch.real_BT)[0], share=0.5)
    dec.layer = layer
    return site, dec


def mean(figures: dict[str, Any]) -> float:
    return figures["mean"]


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_attention_and_choice_are_those_of_the_reported_half(name: str) -> None:
    site, dec = opened(name)
    asked = some_prompts()
    found = study_layers([(dec, site)], asked, "A", ["A", "B"])
    half = [1, 3, 5, 7]
    inputs = harvest([site], asked.batch.tokens_BT, asked.batch.real_BT)[0]
    patterns = {
        "true": inputs.log_pattern_BNQK,
        "reconstructed": dec.log_pattern_all(inputs),
        "pruned": dec.log_pattern_kept(inputs),
    }
    for head in range(dec.shape.N):
        for mark, at in MARKS.items():
            for kind, log in patterns.items():
                values = [log[b, head, ENDS[b], at[b]].exp().item() if at[b] >= 0 else 0.0 for b in half]
                row = next(row for row in found["heads"] if row["head"] == head)
                close(torch.tensor(mean(row["attention"][mark][kind])), torch.tensor(sum(values) / 4))
    logits = site.model(input_ids=asked.batch.tokens_BT, attention_mask=asked.batch.real_BT.long()).logits.detach()
    chosen = []
    for b in half:
        row = logits[b, ENDS[b]].double().softmax(-1)
        chosen.append((row[asked.answers[b]].sum() / row[asked.wrong[b]].sum()).log().item())
    close(torch.tensor(mean(found["difference"])), torch.tensor(sum(chosen) / 4))
    assert found["prompts"] == {"choosing": 4, "reported": 4} and len(found["details"]) == 2


def test_heads_are_those_that_the_choice_needs_most() -> None:
    """Over all layers; what is reported of them is of the other half."""
    asked = some_prompts()
    first, dec = opened("llama", 0), opened("llama", 1)[1]
    second = AttentionSite(first[0].model, layer=1)  # the layers of a run are of one model
    both = [(first[1], first[0]), (dec, second)]
    found = study_layers(both, asked, "A", ["A"], heads=3)
    halves = {
        dec.layer: [_Half(dec, site, asked.take(torch.tensor(index))) for index in ([0, 2, 4, 6], [1, 3, 5, 7])]
        for dec, site in both
    }
    gained = {}
    for layer, (choosing, _) in halves.items():
        for n in range(4):
            change = choosing.without(n, "A")[1]
            assert change is not None
            gained[layer, n] = float(change.mean())
    order = sorted(gained, key=lambda place: gained[place])
    assert [(row["layer"], row["head"]) for row in found["heads"]] == order
    assert [(row["layer"], row["head"]) for row in found["details"]] == order[:3]
    for row in found["heads"]:
        reported = halves[row["layer"]][1].without(row["head"], "A")[1]
        assert reported is not None and row["without_target"]["mean"] == pytest.approx(float(reported.mean()), abs=1e-5)


def test_named_heads_are_looked_into() -> None:
    site, dec = opened()
    found = study_layers([(dec, site)], some_prompts(), "A", ["A"], heads=[3])
    assert [row["head"] for row in found["details"]] == [3] and len(found["heads"]) == 4


def test_a_blind_head_keeps_its_mass() -> None:
    site, _ = opened()
    asked = some_prompts()
    inputs = harvest([site], asked.batch.tokens_BT, asked.batch.real_BT)[0]
    rows, end, key = torch.arange(8), asked.end_B, asked.marks["B"]
    plain, blind = inputs.log_pattern_BNQK.exp(), _blind(2, rows, end, key)(inputs)
    for b in range(8):
        row, before = blind[b, 2, ENDS[b]], plain[b, 2, ENDS[b]].clone()
        if MARKS["B"][b] >= 0:
            before[MARKS["B"][b]] = 0
            assert float(row[MARKS["B"][b]]) == 0
        close(row, before / before.sum())
    untouched = torch.ones_like(plain, dtype=torch.bool)
    untouched[rows, 2, end] = False
    close(blind[untouched], plain[untouched])


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_contributions_are_differences_of_scores(name: str) -> None:
    """What a pair adds to the log-odds is what the weighted scores lose when it alone is taken from the map."""
    site, dec = opened(name)
    half = _Half(dec, site, some_prompts())
    found = half.contributions(1, ["A", "B"])
    inputs = half.inputs
    true = inputs.log_pattern_BNQK.exp()
    for p in range(*dec.pairs.of_head(1).indices(len(dec.pairs))[:2], 5):
        alone = torch.tensor([p])
        scores = dec.scores(inputs, dec.pairs.take(alone), dec.strength_P[alone])
        values = []
        for b, end in enumerate(ENDS):
            keys = [at[b] for at in MARKS.values() if at[b] >= 0]
            row = true[b, 1, end, : end + 1]
            rest = [j for j in range(end + 1) if j not in keys]
            there, elsewhere = (
                sum(row[j] * scores[b, 1, end, j] for j in js) / sum(row[j] for j in js) for js in (keys, rest)
            )
            values.append(float(there - elsewhere))
        close(found[p], torch.tensor(sum(values) / 8), floor=1e-2)
    assert not bool(found[dec.pairs.head_P != 1].any())


def test_an_ablation_says_what_the_edit_does() -> None:
    site, dec = opened()
    asked = some_prompts()
    row = study_layers([(dec, site)], asked, "A", ["A", "B"], heads=[1])["details"][0]
    said = row["ablation"]
    named = [Pair(p["query_feature"], p["key_feature"], 1) for p in said["pairs"]]
    assert len(named) in TRIED or len(named) < TRIED[-1]
    half = asked.take(torch.tensor([1, 3, 5, 7]))
    inputs = harvest([site], half.batch.tokens_BT, half.batch.real_BT)[0]
    before, after = inputs.log_pattern_BNQK.exp(), Edit.of(dec, named).log_pattern(inputs).exp()
    ends = half.end_B.tolist()

    def to_family(pattern: Tensor) -> list[float]:
        places = [[int(at[b]) for at in half.marks.values() if int(at[b]) >= 0] for b in range(4)]
        return [float(sum(pattern[b, 1, ends[b], j] for j in places[b])) for b in range(4)]

    moved = (after - before).abs().sum(-1)[:, 1] / 2
    others = [float(moved[b, : ends[b]].mean()) for b in range(4)]
    for found, values in (
        (said["effect"]["attention"], to_family(after)),
        (said["effect"]["before"]["attention"], to_family(before)),
        (said["effect"]["row"], [float(moved[b, ends[b]]) for b in range(4)]),
        (said["effect"]["other_rows"], others),
    ):
        close(torch.tensor(mean(found)), torch.tensor(sum(values) / 4))
    assert said["effect"]["removed"] == pytest.approx(1 - sum(to_family(after)) / sum(to_family(before)), abs=1e-4)
    assert said["effect"]["difference"]["mean"] != said["effect"]["before"]["difference"]["mean"]
    assert set(said["controls"]) == {"next most important", "at random"}


def test_no_fewer_pairs_are_enough() -> None:
    """The number ablated is the first of those tried that takes enough on the choosing half, or all there are."""
    site, dec = opened()
    asked = some_prompts()
    choosing = _Half(dec, site, asked.take(torch.tensor([0, 2, 4, 6])))
    for head in range(4):
        said = study_layers([(dec, site)], asked, "A", ["A", "B"], heads=[head])["details"][0].get("ablation")
        worth = choosing.contributions(head, ["A", "B"])
        leading = leading_pairs(worth)
        assert said is not None
        count = len(said["pairs"])
        assert {p["nats"] for p in said["pairs"]} == set(worth[leading[:count]].tolist())
        taken = [choosing.removed(head, leading[:n], ["A", "B"]) for n in TRIED if n < count]
        assert all(share < REMOVED for share in taken)
        enough = choosing.removed(head, leading[:count], ["A", "B"]) >= REMOVED
        assert enough or count == len(leading)


@given(st.lists(st.floats(-4, 4, width=16), min_size=1, max_size=60))
def test_leading_pairs_are_the_fewest_with_most_of_what_is_added(values: list[float]) -> None:
    worth = torch.tensor(values)
    chosen = worth[leading_pairs(worth)].tolist()
    added = sorted((v for v in values if v > 0), reverse=True)
    assert chosen == added[: len(chosen)] and len(chosen) <= TRIED[-1]
    if len(chosen) < TRIED[-1]:
        assert sum(chosen) >= LEADING * sum(added) - 1e-4
    assert not chosen or sum(chosen[:-1]) < LEADING * sum(added) + 1e-4


def test_prompts_without_answers_are_studied_by_attention_alone() -> None:
    site, dec = opened()
    found = study_layers([(dec, site)], some_prompts(choices=False), "A", ["A"])
    assert found["difference"] is None and found["heads"][0]["without_target"] is None
    halves = _Half(dec, site, some_prompts().take(torch.tensor([0, 2, 4, 6]))).to
    attention = halves(_Half(dec, site, some_prompts().take(torch.tensor([0, 2, 4, 6]))).end_BNK["true"], ["A"]).mean(0)
    assert [row["head"] for row in found["heads"]] == attention.argsort(descending=True).tolist()
    assert "difference" not in found["details"][0]["ablation"]["effect"]


def test_what_cannot_be_studied_is_said() -> None:
    site, dec = opened()
    with pytest.raises(UserError, match="2 prompts are too few"):
        study_layers([(dec, site)], some_prompts().take(torch.tensor([0, 1])), "A", ["A"])
    with pytest.raises(UserError, match="head 7: the layer has heads 0 to 3"):
        study_layers([(dec, site)], some_prompts(), "A", ["A"], heads=[7])
