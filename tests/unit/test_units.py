"""Units: the factorisation against dense formulas, planted units found again, ranks and names."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from layers import some_decomposition, some_inputs
from torch import Tensor

from qkscope.errors import UserError
from qkscope.explain import units
from qkscope.explain.entries import Entries
from qkscope.explain.names import FeatureNames

A, B, N = 12, 10, 5


def entries_of(x_ABN: Tensor) -> Entries:
    """The positive entries of a dense tensor."""
    head, a, b = x_ABN.permute(2, 0, 1).nonzero(as_tuple=True)
    return Entries(a[None], b[None], head, x_ABN[a, b, head].double()[None], *x_ABN.shape)


def noise(seed: int, share: float = 0.4) -> Entries:
    g = torch.Generator().manual_seed(seed)
    x = torch.rand(A, B, N, generator=g, dtype=torch.float64) ** 2
    return entries_of(x * (torch.rand(A, B, N, generator=g) < share))


def planted() -> tuple[Tensor, list[Tensor]]:
    """Three units that overlap in features and heads: weights and factors, each column of sum 1."""
    g = torch.Generator().manual_seed(4)
    masks = [torch.zeros(n, 3) for n in (A, B, N)]
    for r in range(3):
        masks[0][4 * r : 4 * r + 5, r] = 1
        masks[1][3 * r : 3 * r + 4, r] = 1
        masks[2][r : r + 3, r] = 1
    factors = [mask * (0.2 + torch.rand(mask.shape, generator=g)) for mask in masks]
    return torch.tensor([0.5, 0.3, 0.2]).double(), [(f / f.sum(0)).double() for f in factors]


def dense(weight: Tensor, factors: list[Tensor]) -> Tensor:
    return torch.einsum("r,ar,br,nr->abn", weight, *factors)


def of(found: units.Units) -> tuple[Tensor, list[Tensor]]:
    return found.weight_R, [found.query_AR, found.key_BR, found.head_NR]


@pytest.mark.parametrize("rank", [1, 2, 5])
def test_loss_is_that_of_the_dense_tensor_with_its_zeros(rank: int) -> None:
    entries = noise(0)
    found = units.factorise(entries, rank, restarts=2, steps=25)
    model = dense(*of(found))
    assert float(model.sum()) == pytest.approx(1)
    assert all(torch.allclose(f.sum(0), torch.ones(rank).double()) and bool((f >= 0).all()) for f in of(found)[1])
    x = torch.zeros(A, B, N, dtype=torch.float64)
    x[entries.query_SP[0], entries.key_SP[0], entries.head_P] = entries.worth_SP[0] / entries.worth_SP.sum()
    # The general divergence Σ x log(x/m) - x + m, zeros and all.
    wanted = torch.xlogy(x, x) - torch.xlogy(x, model.clamp(min=1e-300)) - x + model
    assert found.loss == pytest.approx(float(wanted.sum()), abs=1e-12)
    independent = torch.einsum("a,b,n->abn", x.sum((1, 2)), x.sum((0, 2)), x.sum((0, 1)))
    assert found.total == pytest.approx(
        float((torch.xlogy(x, x) - torch.xlogy(x, independent.clamp(min=1e-300))).sum())
    )
    assert found.explained == (pytest.approx(0, abs=1e-9) if rank == 1 else pytest.approx(1 - found.loss / found.total))


def test_loss_never_rises() -> None:
    for seed in range(4):
        losses: list[Tensor] = []
        found = units.factorise(noise(seed), 6, restarts=3, steps=120, seed=seed, losses=losses)
        falls = torch.stack(losses)
        assert falls.shape[1] == 3 and bool((falls.diff(dim=0) <= 1e-12).all())
        assert found.loss == float(falls[-1].min()) < float(falls[0].min())


def test_it_ends_where_dense_multiplicative_updates_stand_still() -> None:
    """Lee and Seung's update of each factor, for the general divergence, on the dense tensor."""
    entries = noise(1)
    found = units.factorise(entries, 2, restarts=1, steps=3000)
    x = torch.zeros(A, B, N, dtype=torch.float64)
    x[entries.query_SP[0], entries.key_SP[0], entries.head_P] = entries.worth_SP[0] / entries.worth_SP.sum()
    weight, factors = of(found)
    ratio = x / dense(weight, factors).clamp(min=1e-300)
    names = ("a", "b", "n")
    for i, name in enumerate(names):
        others = [(n, f) for j, (n, f) in enumerate(zip(names, factors, strict=True)) if j != i]
        spec = f"abn,{others[0][0]}r,{others[1][0]}r->{name}r"
        update = torch.einsum(spec, ratio, others[0][1], others[1][1])  # divided by the others' sums, which are 1
        scaled = factors[i] * update
        torch.testing.assert_close(scaled, factors[i], rtol=0, atol=5e-3)


def test_planted_units_are_found() -> None:
    weight, factors = planted()
    found = units.factorise(entries_of(dense(weight, factors) * 7.5), 3, restarts=4, steps=2000)
    assert found.loss < 1e-4 * found.total
    assert found.weight_R.tolist() == pytest.approx([0.5, 0.3, 0.2], abs=0.02)  # sorted by weight, as planted
    for got, wanted in zip(of(found)[1], factors, strict=True):
        assert bool((torch.cosine_similarity(got, wanted, dim=0) > 0.995).all())


def test_units_found_again_are_those_of_the_other_restarts() -> None:
    """Restart 1 has the units of restart 0 in another order, restart 2 one of them and a stranger."""
    _, factors = planted()
    two, third = [f[:, :2] for f in factors], [f[:, 2:] for f in factors]
    restarts = tuple(
        torch.stack([f, f.flip(1) * 3, torch.cat([f[:, :1], g], 1)], 1) for f, g in zip(two, third, strict=True)
    )
    stranger = 1.0
    for f in factors:
        stranger *= float(torch.cosine_similarity(f[:, 1], f[:, 2], dim=0))
    first = 1.0
    for f in factors:
        first *= float(torch.cosine_similarity(f[:, 1], f[:, 0], dim=0))
    assert first > 0 and stranger < 0.5
    again = units._again(restarts, 0)
    assert again.tolist() == pytest.approx([1.0, (1 + max(first, stranger)) / 2])
    assert bool(units.factorise(noise(2), 2, restarts=1).again_R.isnan().all())


def test_parts_are_the_products() -> None:
    entries = noise(3)
    found = units.factorise(entries, 4, steps=5)
    parts = found.parts(entries)
    for p in range(0, len(entries), 7):
        a, b, n = int(entries.query_SP[0, p]), int(entries.key_SP[0, p]), int(entries.head_P[p])
        for r in range(4):
            product = found.weight_R[r] * found.query_AR[a, r] * found.key_BR[b, r] * found.head_NR[n, r]
            assert parts[p, r] == pytest.approx(float(product))


def test_the_seed_decides() -> None:
    one, same, other = (units.factorise(noise(5), 4, steps=40, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(one.query_AR, same.query_AR) and one.loss == same.loss
    assert not torch.equal(one.query_AR, other.query_AR)


# The rank


@pytest.mark.parametrize(
    ("excess", "rank"),
    [([0.1, 0.2, 0.19, 0.3], 8), ([0.1, 0.28, 0.3, 0.29], 3), ([0.3, 0.1, 0.0, 0.0], 2), ([-0.1, -0.2, 0.0, -0.3], 4)],
)
def test_chosen_rank(excess: list[float], rank: int) -> None:
    rows = [{"rank": r, "explained": 0.4 + e, "chance": [0.3, 0.5]} for r, e in zip((2, 3, 4, 8), excess, strict=True)]
    assert units.chosen_rank(rows) == rank


def test_blocks_ask_for_as_many_units() -> None:
    """Four blocks of random importance, each of features and a head of its own, are four units."""
    g = torch.Generator().manual_seed(0)
    x = torch.zeros(24, 24, 4, dtype=torch.float64)
    for r in range(4):
        x[6 * r : 6 * r + 6, 6 * r : 6 * r + 6, r] = 0.2 + torch.rand(6, 6, generator=g, dtype=torch.float64)
    x *= torch.rand(24, 24, 4, generator=g) < 0.7
    x += 0.02 * (torch.rand(24, 24, 4, generator=g) < 0.1)
    rows = units.explained_by_rank(entries_of(x), (2, 3, 4, 6, 8))
    assert units.chosen_rank(rows) == 4, rows


# Names, and all of it


def folder_with(path: Path, truth: bool = True) -> Path:
    """A layer's folder with examples of three features a side, and labels of the first two."""
    rows = [
        {"side": side, "feature": f, "range": -1, "rank": r, "tokens": ["x", token, "y"], "center": 1}
        for side in ("query", "key")
        for f, tokens in enumerate([[" a", " a", " b"], [" c"], [" d", " d", " e", "\n"]])
        for r, token in enumerate(tokens)
    ]
    rows += [{**rows[0], "range": 2, "rank": r, "tokens": ["x", " weak", "y"]} for r in range(9)]
    pq.write_table(pa.Table.from_pylist(rows), path / "examples.parquet")
    if truth:
        known = [{"label": "name", "f1": 0.9}, {"label": "comma", "f1": 0.3}, None]
        (path / "truth.json").write_text(json.dumps({"features": {"query": known, "key": known}}))
    return path


def test_features_are_named_by_labels_where_they_say_more(tmp_path: Path) -> None:
    names = FeatureNames(folder_with(tmp_path))
    assert names.of("query", 0) == "q0 name"
    assert names.of("key", 1) == "k1 “␣c”"  # its label is a bad one
    assert names.of("key", 2) == "k2 “␣d”, “␣e”, “⏎”"
    assert names.of("query", -1) == "bias" and names.of("query", 9) == "q9"
    assert names.of_group("query", [(0, 0.6), (1, 0.2), (2, 0.2)]) == "name"
    assert names.of_group("query", [(0, 0.3), (1, 0.1), (2, 0.6)]) == "“␣d”, “␣e”, “⏎”"
    assert names.of_group("key", [(9, 1.0)]) == "unnamed"


def test_names_without_labels_or_examples(tmp_path: Path) -> None:
    assert FeatureNames(folder_with(tmp_path, truth=False)).of("query", 0) == "q0 “␣a”, “␣b”"
    (tmp_path / "examples.parquet").unlink()
    assert FeatureNames(tmp_path).of("query", 0) == "q0"
    (tmp_path / "examples.parquet").write_text("no parquet")
    with pytest.raises(UserError, match=r"examples\.parquet is damaged"):
        FeatureNames(tmp_path).of("query", 0)


def test_describe_lists_what_leads(tmp_path: Path) -> None:
    dec = some_decomposition(some_inputs())
    found, unit_P = units.describe(dec, FeatureNames(folder_with(tmp_path)), rank=3)
    json.dumps(found, allow_nan=False)
    entries = Entries.of(dec)
    best = units.factorise(entries, 3)
    assert found["rank"] == 3 and found["explained"] == best.explained and len(found["chance"]) == units.DRAWS
    p = dec.pairs
    two = (p.query_P < p.n_query) & (p.key_P < p.n_key)
    assert torch.equal(unit_P >= 0, two) and torch.equal(unit_P[two], best.parts(entries).argmax(1))
    for r, unit in enumerate(found["units"]):
        assert unit["pairs"] == int((unit_P == r).sum()) and unit["share"] == float(best.weight_R[r])
        for name, kind, factor in (
            ("query_features", "feature", best.query_AR),
            ("key_features", "feature", best.key_BR),
            ("heads", "head", best.head_NR),
        ):
            ranked = sorted(((float(v), -i) for i, v in enumerate(factor[:, r])), reverse=True)
            listed = [(row["share"], -row[kind]) for row in unit[name]]
            assert listed == ranked[: len(listed)]
            assert sum(v for v, _ in listed) >= 0.8 or len(listed) == 5
            assert sum(v for v, _ in listed[:-1]) < 0.8
    with pytest.raises(UserError, match="--rank 0"):
        units.describe(dec, FeatureNames(tmp_path), rank=0)
