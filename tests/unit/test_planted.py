"""Planted worlds: their layers are what they say, and the scores know the truth when they see it."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from layers import whole
from torch import Tensor

from qkscope import cli
from qkscope.errors import UserError
from qkscope.evaluate.planted import bench as bench_room
from qkscope.evaluate.planted import report
from qkscope.evaluate.planted.bench import PlantedBench, dictionaries, oracle_job, rows_of, spread, table
from qkscope.evaluate.planted.scores import identities, match_activations, pair_scores, predictions, true_triples
from qkscope.evaluate.planted.sizes import SIZES, Size
from qkscope.evaluate.planted.world import LOCAL, ROTARY_BASE, Planted, PlantedStream, WorldConfig
from qkscope.evaluate.stability import Overlap
from qkscope.pairs.pair_map import Pairs, with_bias

EXACT = WorldConfig(
    width=32, features=24, heads=2, head_width=8, pairs=5, pool=12, context=16, noise=0.0, orthogonal=True
)
CROWDED = WorldConfig(width=16, features=40, heads=2, head_width=8, pairs=5, pool=12, context=16)
ROTARY = replace(EXACT, rotary=True, head_width=24)
TINY = Size(
    WorldConfig(width=16, features=20, heads=2, head_width=8, pairs=3, pool=6, context=16),
    rotary_head_width=24, width=24, k=1, seed_sparsity=0.03, mask_sparsity=1e-5,
    tokens=2048, pair_tokens=1024, heldout_tokens=1024, batch_tokens=512, sample_tokens=512,
)  # fmt: skip


def world(config: WorldConfig = EXACT, seed: int = 0) -> Planted:
    return Planted(config, seed)


def coefficients(planted: Planted, tokens: int = 8192) -> Tensor:
    return planted.batch("heldout", 0, tokens)[0]


# The world -------------------------------------------------------------------------------------------


def slow_scores(planted: Planted, acts_TF: Tensor, head: int) -> Tensor:
    """Σ strength · a_f(i) · a_g(j), pair by pair in float64; no rotary embedding."""
    acts, p = with_bias(acts_TF).double(), planted.pairs
    scores = torch.zeros(len(acts), len(acts), dtype=torch.float64)
    for a, b, h, s in zip(p.query_P, p.key_P, p.head_P, planted.strength_P, strict=True):
        if h == head:
            for i in range(len(acts)):
                for j in range(len(acts)):
                    scores[i, j] += s * acts[i, a] * acts[j, b]
    return scores


@pytest.mark.parametrize("seed", [0, 1])
def test_scores_are_the_true_pairs_where_nothing_leaks(seed: int) -> None:
    planted = world(seed=seed)
    acts, inputs = planted.batch("train", 3, 32)
    scores = inputs.rule.scores(inputs.q_BTNH, inputs.k_BTGH)
    for b in range(len(acts)):
        for head in range(2):
            assert torch.allclose(scores[b, head].double(), slow_scores(planted, acts[b], head), atol=1e-4)
    assert torch.allclose(whole(planted.log_pattern_true(acts, inputs), inputs), inputs.log_pattern_BNQK, atol=1e-4)


def test_crowded_features_leak_and_the_leak_is_small_and_centred() -> None:
    planted = world(CROWDED)
    acts, inputs = planted.batch("train", 0, 16_384)
    read = inputs.x_BTD @ planted.readout_FD.T + planted.constant_F
    gain = (planted.readout_FD * planted.directions_FD).sum(1)
    assert torch.allclose(gain, torch.ones(41), atol=1e-4)
    error = (read - acts)[:, 1:, :-1]
    assert 0.02 < float(error.std()) < 0.4 and float(error.mean(dim=(0, 1)).abs().max()) < 0.1


def test_causal_mask_bos_and_sink() -> None:
    planted = world()
    acts, inputs = planted.batch("train", 0, 512)
    pattern = inputs.log_pattern_BNQK.exp()
    assert float(pattern.triu(1).abs().max()) == 0
    assert bool((acts[:, 0, -1] > 0).all()) and float(acts[:, 1:, -1].max()) == 0
    sinks = planted.pairs.query_P == planted.bos + 1
    assert planted.pairs.head_P[sinks].tolist() == [0] and planted.pairs.key_P[sinks].tolist() == [planted.bos]
    quiet = torch.zeros(1, 16, 25)
    quiet[0, 0, planted.bos] = acts[0, 0, planted.bos]
    silent = planted.inputs(quiet, torch.Generator().manual_seed(0)).log_pattern_BNQK.exp()[0]
    assert float(silent[0, -1, 0]) == pytest.approx(math.e**3 / (math.e**3 + 15), rel=1e-3)
    assert float(silent[1, -1, 0]) == pytest.approx(1 / 16, rel=1e-3)


def test_frequencies_are_zipfs_whatever_fires_together() -> None:
    planted = world(replace(EXACT, features=30, width=40))
    fires = (coefficients(planted, 200_000)[:, 1:, :-1] > 0).flatten(0, 1).float()
    rank = torch.arange(1.0, 31)
    wanted = 0.3 * rank**-0.6
    error = (wanted * (1 - wanted) / len(fires)).sqrt()
    assert float(((fires.mean(0) - wanted) / error).abs().max()) < 4.5
    assert bool((planted.parent_F >= 0).any()) and bool((planted.group_F >= 0).any())
    for child in (planted.parent_F >= 0).nonzero()[:, 0].tolist():
        parent = int(planted.parent_F[child])
        assert parent < child and float(fires[fires[:, parent] == 0, child].sum()) == 0
    first = (planted.group_F == 0).nonzero()[:, 0]
    together = (fires[:, first[0]] * fires[:, first[1]]).mean()
    assert float(together) > 1.5 * float(wanted[first[0]] * wanted[first[1]])


def test_pairs_are_shared_between_heads_and_most_features_are_irrelevant() -> None:
    planted = world(SIZES["medium"].world)
    heads = [{t[:2] for t in true_triples(planted) if t[2] == h} for h in range(4)]
    assert all(len(a & b) >= 3 for a, b in pairwise(heads))
    assert len(planted.pairs) == 4 * 12 + 2 and planted.config.features > planted.config.width
    assert len(planted.pairs.query_P.unique()) < planted.config.features / 2


def test_a_seed_is_a_world() -> None:
    one, same, other = world(seed=3), world(seed=3), world(seed=4)
    assert torch.equal(one.W_Q, same.W_Q) and torch.equal(one.pairs.key_P, same.pairs.key_P)
    assert not torch.equal(one.W_Q, other.W_Q)
    assert torch.equal(one.batch("train", 5, 64)[1].x_BTD, same.batch("train", 5, 64)[1].x_BTD)
    batches = [one.batch(split, index, 64)[0] for split, index in (("train", 0), ("train", 1), ("heldout", 0))]
    assert not any(torch.equal(a, b) for a, b in pairwise(batches))


def test_the_stream_goes_on_from_any_place() -> None:
    stream = PlantedStream(world(), 64)
    taken = [next(stream) for _ in range(4)]
    again = PlantedStream(world(), 64)
    again.restore(json.loads(json.dumps({"batch": 2})))
    assert torch.equal(next(again).layers[0].x_BTD, taken[2].layers[0].x_BTD) and again.state() == {"batch": 3}
    assert taken[1].n_tokens == 64 and taken[1].origin.document_B.tolist() == [4, 5, 6, 7]


def test_rotary_pattern_by_hand() -> None:
    """Complex numbers, one a plane, instead of the package's tables."""
    planted = world(ROTARY)
    _, inputs = planted.batch("train", 0, 16)
    half = 12
    rate = ROTARY_BASE ** (-torch.arange(half).double() * 2 / 24)
    turn = torch.polar(torch.ones(16, half).double(), torch.arange(16).double()[:, None] * rate)
    q, k = (torch.complex(v[0, ..., :half].double(), v[0, ..., half:].double()) for v in (inputs.q_BTNH, inputs.k_BTGH))
    q, k = q * turn[:, None], k * turn[:, None]
    scores = torch.einsum("qnh,knh->nqk", q, k.conj()).real * 24**-0.5
    scores = scores.masked_fill(torch.ones(16, 16, dtype=torch.bool).triu(1), -torch.inf)
    assert torch.allclose(scores.softmax(-1).float(), inputs.log_pattern_BNQK.exp()[0], atol=1e-5)


def test_rotary_pairs_act_at_all_distances_but_for_a_few() -> None:
    planted = world(ROTARY)
    assert planted.rotary is not None
    strengths = []
    for a, b, h, s in zip(*(getattr(planted.pairs, n) for n in ("query_P", "key_P", "head_P")), planted.strength_P,
                          strict=True):  # fmt: skip
        q, k = (rows[f, h].expand(1, 16, 1, 24) for rows, f in ((planted.rows_q, a), (planted.rows_k, b)))
        turned = torch.einsum("h,th->t", planted.rotary.rotate(q)[0, 15, 0], planted.rotary.rotate(k)[0, :, 0])
        assert float(turned[15]) * 24**-0.5 == pytest.approx(float(s), rel=1e-4)  # at distance 0
        strengths.append(float(turned[0] / turned[15]))
    far = sum(value > 0.85 for value in strengths)
    assert far == len(strengths) - 2 * LOCAL


def test_too_many_pairs_for_the_slow_planes_are_refused() -> None:
    with pytest.raises(ValueError, match="do not fit"):
        world(replace(ROTARY, head_width=4))


@pytest.mark.parametrize("name", list(SIZES))
@pytest.mark.parametrize("rotary", [False, True])
def test_every_size_is_a_world(name: str, rotary: bool) -> None:
    planted = Planted(SIZES[name].of(rotary), 0)
    _, inputs = planted.batch("train", 0, planted.config.context)
    assert bool(torch.isfinite(inputs.log_pattern_BNQK.exp()).all())


# Scores ----------------------------------------------------------------------------------------------


def overlap_of(learned: Tensor, true: Tensor) -> Overlap:
    overlap = Overlap.empty(true.shape[1], learned.shape[1])
    for a, b in zip(true.split(1000), learned.split(1000), strict=True):
        overlap.add(a, b)
    return overlap


def scored(planted: Planted, learned: Tensor, pairs: Pairs, worth: Tensor) -> dict[str, Any]:
    """Scores of dictionaries with these activations on both sides."""
    overlap = overlap_of(learned, with_bias(coefficients(planted)).flatten(0, 1))
    ids = identities(overlap)
    match = {side: float(match_activations(planted, side, overlap).mean()) for side in ("query", "key")}
    return {**match, **pair_scores(planted, predictions(pairs, worth, torch.ones(len(pairs)), ids, ids))}


def test_the_truth_scores_one_in_any_order_and_scale() -> None:
    planted = world()
    acts = coefficients(planted).flatten(0, 1)
    order = torch.randperm(25, generator=torch.Generator().manual_seed(1))
    place = torch.cat([order.argsort(), torch.tensor([25])])
    p = planted.pairs
    moved = Pairs.of(place[p.query_P], place[p.key_P], p.head_P, 25, 25, 2)
    for learned, pairs in ((acts, p), (acts[:, order] * 7, moved)):
        found = scored(planted, learned, pairs, torch.ones(len(p)))
        assert found["query"] == pytest.approx(1) and found["key"] == pytest.approx(1)
        assert (found["precision"], found["recall"], found["f1"]) == (1, 1, 1) and found["per_head"] == [1, 1]


def test_random_features_score_next_to_nothing() -> None:
    planted, generator = world(), torch.Generator().manual_seed(0)
    acts = coefficients(planted).flatten(0, 1)
    learned = torch.rand(len(acts), 25, generator=generator) * (torch.rand(len(acts), 25, generator=generator) < 0.05)
    found = scored(planted, learned, planted.pairs, torch.ones(len(planted.pairs)))
    assert found["query"] < 0.2 and found["f1"] <= 1 / len(planted.pairs)  # bias and BOS may be paired by chance
    p = planted.pairs
    wrong = Pairs.of(p.query_P.roll(1), p.key_P.roll(3), p.head_P, 25, 25, 2)
    assert scored(planted, acts, wrong, torch.ones(len(p)))["f1"] < 0.3


def test_copies_gain_nothing_and_cost_nothing() -> None:
    """A copy of every feature, and half of the pairs between copies: as if the copies were one."""
    planted = world()
    acts, p = coefficients(planted).flatten(0, 1), planted.pairs
    twice = torch.cat([acts, acts * 2], 1)
    half = p.take(torch.arange(0, len(p), 2))
    query, key = (torch.where(f == 25, 50, f) for f in (half.query_P, half.key_P))
    copies = [torch.where(f < 25, f + 25, f) for f in (query, key)]
    both = Pairs.of(torch.cat([query, copies[0]]), torch.cat([key, copies[1]]), half.head_P.repeat(2), 50, 50, 2)
    found = scored(planted, twice, both, torch.ones(len(both)))
    assert found["recall"] == len(half) / len(p) and found["precision"] == 1


def test_pairs_of_unknown_features_are_wrong_one_by_one_and_the_strongest_count() -> None:
    planted = world()
    truth = sorted(true_triples(planted))
    n = len(truth)
    ids = torch.tensor([*range(25), -1, 25])  # feature 25 is none, 26 the bias
    p = planted.pairs
    shifted = [torch.where(f == 25, 26, f) for f in (p.query_P, p.key_P)]
    nothing = torch.full((4,), 25)
    pairs = Pairs.of(torch.cat([shifted[0], nothing]), torch.cat([shifted[1], torch.arange(4)]),
                     torch.cat([p.head_P, torch.zeros(4, dtype=torch.int64)]), 26, 26, 2)  # fmt: skip
    unknown = pairs.query_P == 25
    for worth, right in ((torch.where(unknown, 0.5, 1.0), n), (torch.where(unknown, 2.0, 1.0), n - 4)):
        found = pair_scores(planted, predictions(pairs, worth, torch.ones(len(pairs)), ids, ids))
        assert found["f1"] == pytest.approx(right / n)


def test_copies_that_cancel_say_nothing() -> None:
    ids = torch.tensor([3, 3, 4, 25])  # two copies of feature 3
    pairs = Pairs.of(torch.tensor([0, 1, 2]), torch.tensor([2, 2, 0]), torch.zeros(3, dtype=torch.int64), 3, 3, 1)
    worth = torch.tensor([4.0, 4.0, 1.0])
    assert predictions(pairs, worth, torch.tensor([1.0, 2.0, 1.0]), ids, ids) == [(3, 4, 0), (4, 3, 0)]
    assert predictions(pairs, worth, torch.tensor([1.0, -2.0, 1.0]), ids, ids) == [(4, 3, 0), (3, 4, 0)]


def test_an_always_on_feature_is_the_bias() -> None:
    acts = with_bias(coefficients(world())).flatten(0, 1)
    learned = torch.stack([torch.ones(len(acts)) * 3, acts[:, 0], torch.zeros(len(acts))], 1)
    assert identities(overlap_of(learned, acts)).tolist() == [25, 0, -1, 25]


def test_the_oracle_is_perfect_where_nothing_leaks() -> None:
    size = replace(TINY, world=replace(EXACT, context=16), batch_tokens=512)
    made = PlantedBench(size, Planted(size.world, 0))
    found = made.ceiling()
    assert found["oracle"]["f1"] == 1 and found["oracle"]["match"] > 0.999 and found["oracle"]["match_rows"] > 0.999
    assert found["truth_kl"] < 1e-5 and found["oracle"]["kl"] < 1e-3 < found["uniform_kl"]
    assert len(oracle_job(made.world).pairs) == len(made.world.pairs) == 11


# The benchmark ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    return list(rows_of(PlantedBench(TINY, Planted(TINY.world, 0))))


def test_every_method_has_its_rows(rows: list[dict[str, Any]]) -> None:
    names = {(row["dictionary"], row["method"]) for row in rows}
    for dictionary in (*dictionaries(TINY), "random", "svd"):
        assert {(dictionary, "all pairs"), (dictionary, "importance"), (dictionary, "importance + refit")} <= names
    for dictionary in ("seed", "default"):
        assert {(dictionary, "mask"), (dictionary, "mask + refit")} <= names
    assert {("default", "prune and tune"), ("default", "shuffled")} <= names
    assert all(row["kl"] >= 0 and row.get("pairs", 0) <= 8 * 7 for row in rows)


def test_rank_decides_what_a_map_is_credited_with() -> None:
    """Right and wrong pairs in one map: the score is that of the n worth most."""
    made = PlantedBench(replace(TINY, world=replace(EXACT, context=16), batch_tokens=512), Planted(EXACT, 0))
    oracle = oracle_job(made.world)
    true, known = oracle.pairs, true_triples(made.world)
    shifted = zip(true.query_P.tolist(), true.key_P.roll(1).tolist(), true.head_P.tolist(), strict=True)
    wrong = [triple for triple in dict.fromkeys(shifted) if triple not in known]
    query, key, head = torch.tensor([*known, *wrong]).T
    pairs, order = Pairs.sorted(query, key, head, true.n_query, true.n_key, true.n_heads)
    good = (order < len(known)).float()
    ones = torch.ones(len(pairs))
    dec = replace(made.decomposition(oracle), pairs=pairs, strength_P=ones, weight_strength_P=ones)
    assert made.judge(dec, 1 + good)["f1"] == 1
    assert made.judge(dec, 2 - good)["f1"] < 0.5


def test_a_world_gives_the_same_figures_again(rows: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_room, "dictionaries", lambda size: dict(list(dictionaries(size).items())[1:2]))
    again = list(rows_of(PlantedBench(TINY, Planted(TINY.world, 0))))
    own, other = ([{**r, "seconds": 0} for r in found if r["dictionary"] == "default"] for found in (again, rows))
    assert own == other and len(own) > 10


def test_spread_and_table() -> None:
    assert spread([1.0, 2.0, 3.0]) == {"mean": 2.0, "sd": 1.0, "values": [1.0, 2.0, 3.0]}
    assert spread([1.0])["sd"] is None
    ceiling = {"uniform_kl": 1.0, "truth_kl": 0.1, "oracle": {"kl": 0.2, "f1": 1.0, "per_head": [1.0]}}
    one = {
        "world": "plain",
        "ceiling": ceiling,
        "rows": [{"dictionary": "seed", "method": "mask", "multiple": 2, "kl": 3}],
    }
    found = table([one, one])
    assert [row["dictionary"] for row in found] == ["uniform", "truth", "oracle", "seed"]
    assert found[-1]["figures"] == {"kl": spread([3, 3])} and found[-1]["multiple"] == 2


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(SIZES, "small", TINY)
    path = tmp_path / "found.json"
    cli.main(["bench", "planted", "--size", "small", "--seeds", "0", "--json", str(path), "--processes", "2"])
    found = json.loads(path.read_text())
    assert found["size"] == "small" and found["seeds"] == [0] and len(found["worlds"]) == 2
    said = capsys.readouterr().out
    for dictionary in ("seed", "default", "topk", "jumprelu", "random", "svd", "oracle"):
        assert sum(line.startswith(dictionary) for line in said.splitlines()) >= 2
        assert any(row["dictionary"] == dictionary for row in found["table"])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "choose planted"),
        (["plantd"], "did you mean 'planted'"),
        (["planted", "--size", "huge"], "--size"),
        (["planted", "--seeds", "1", "1"], "--seeds 1 1"),
        (["planted", "--seeds", "-1"], "--seeds"),
        (["planted", "--json", "/nowhere/at/all.json"], "/nowhere/at does not exist"),
        (["planted", "--sede", "1"], "unknown option '--sede'"),
        (["planted", "--processes", "0"], "processes"),
    ],
)
def test_bad_arguments_end_in_one_line(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["bench", *words])
    complaint = capsys.readouterr().err
    assert stop.value.code == 2 and said in complaint and complaint.count("\n") == 1


def test_a_size_that_is_none() -> None:
    with pytest.raises(UserError, match="--size vast: choose small, medium, large"):
        report.bench_planted("vast", [0], None, 1)
