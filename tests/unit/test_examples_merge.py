"""Parts of a text that are gathered apart, in any order and in blocks of any size, give what one pass gives."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layers import some_decomposition, some_inputs
from test_examples import Letters
from test_pair_examples import a_batch, acts_of
from torch.utils._python_dispatch import TorchDispatchMode

from qkscope.data.sequences import Batch
from qkscope.decomposition import Decomposition
from qkscope.pattern import AttentionInputs
from qkscope.tables import firing, token_counts
from qkscope.tables.best import Best
from qkscope.tables.examples import Examples
from qkscope.tables.feature_examples import FeatureExamples
from qkscope.tables.token_counts import TokenCounts

LAYER: dict[str, Any] = {"batch": 3, "length": 9, "rotary": "half", "softcap": 2.0, "padding": True}
SUMS = ("density", "mean_activation", "by_position", "positions", "top_token_activations")
Seen = tuple[Batch, AttentionInputs]


def text(count: int = 8) -> tuple[Decomposition, list[Seen]]:
    """Batches of one random layer; some have the same inputs in other documents, so that there are ties."""
    seen = [(a_batch(some_inputs(0, **LAYER), seed), some_inputs(seed // 2, **LAYER)) for seed in range(count)]
    return some_decomposition(seen[0][1]), seen


def gathered(dec: Decomposition, seen: list[Seen]) -> Examples:
    examples = Examples(dec, 3, window=2, drawn=2, pairs=2, pair_window=1)
    for batch, inputs in seen:
        examples.add(batch, acts_of(dec, inputs), inputs)
    return examples


def tables(examples: Examples, folder: Path) -> dict[str, list[dict[str, Any]]]:
    examples.write(folder, Letters())
    names = ("features", "examples", "pair_examples")
    return {name: pq.read_table(folder / f"{name}.parquet").to_pylist() for name in names}


def require_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    """All equal; sums of activations to float32."""
    for row, wanted in zip(one["features"], other["features"], strict=True):
        for name in SUMS:
            assert row[name] == pytest.approx(wanted[name], rel=1e-6, abs=1e-6)
        assert {k: v for k, v in row.items() if k not in SUMS} == {k: v for k, v in wanted.items() if k not in SUMS}
    assert one["examples"] == other["examples"] and one["pair_examples"] == other["pair_examples"]


@pytest.mark.parametrize("seed", range(4))
def test_merged_parts_are_as_one_pass(tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_counts, "TOKENS_KEPT", 50)
    dec, seen = text()
    whole = tables(gathered(dec, seen), tmp_path / "whole")
    assert len({row["range"] for row in whole["examples"]}) == 5 and whole["pair_examples"]
    assert {row["token_share"] for row in whole["features"]} >= {1.0, 0.5}
    rng = random.Random(seed)
    rng.shuffle(seen)
    cuts = sorted(rng.sample(range(1, len(seen)), 2))
    parts = [gathered(dec, seen[low:high]) for low, high in zip([0, *cuts], [*cuts, len(seen)], strict=True)]
    rng.shuffle(parts)
    parts[1].merge(parts[2])
    parts[0].merge(parts[1])
    require_same(tables(parts[0], tmp_path / "merged"), whole)


def test_what_does_not_fit_is_not_merged() -> None:
    dec, _ = text(1)
    other = some_decomposition(some_inputs(0, **LAYER), share=0.3)
    for wrong in (Examples(dec, 3), Examples(other, 2)):
        with pytest.raises(ValueError, match="another decomposition or with other options"):
            Examples(dec, 2).merge(wrong)


def test_blocks_of_features_do_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dec, seen = text(4)
    whole = tables(gathered(dec, seen), tmp_path / "whole")
    for elements in (1, 3 * 9 * 4):  # one feature at a time, four
        monkeypatch.setattr(firing, "BLOCK_ELEMENTS", elements)
        require_same(tables(gathered(dec, seen), tmp_path / str(elements)), whole)


class Largest(TorchDispatchMode):
    """The largest tensor that an operation allocates, in bytes; what stood before does not count."""

    def __init__(self, known: list[torch.Tensor]) -> None:
        super().__init__()
        self.known = {t.untyped_storage().data_ptr() for t in known}
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in self.known:
                self.bytes = max(self.bytes, t.untyped_storage().nbytes())
        return out


def test_no_copy_of_all_activations(monkeypatch: pytest.MonkeyPatch) -> None:
    """For 20,000 features and 512 tokens (41 MB of activations), nothing larger than a block is allocated."""
    monkeypatch.setattr(firing, "BLOCK_ELEMENTS", 1 << 17)
    g = torch.Generator().manual_seed(0)
    acts = torch.zeros(8, 64, 20_000)
    acts.scatter_(2, torch.randint(20_000, (8, 64, 16), generator=g), torch.rand(8, 64, 16, generator=g))
    side = FeatureExamples(20_000, 1, 1, 1, 0, acts.device)
    parts = [side, side.strongest, side.drawn, side.token_counts]
    kept = [t for part in parts for t in vars(part).values() if isinstance(t, torch.Tensor)]
    kept += [*side.strongest.payload.values(), *side.drawn.payload.values()]
    batch = a_batch(some_inputs(batch=8, length=64))
    with torch.no_grad(), Largest([acts, *kept]) as largest:
        for here, acts_BTf, fires in firing.blocks(acts, batch.real_BT):
            side.add(batch, here, acts_BTf, fires)
            side.add_whole(batch, fires)
    assert (1 << 17) * 4 <= largest.bytes < 8 * (1 << 17) < acts.nbytes // 16
    assert int(side.fired_F.sum()) == int((acts > 0).sum())


ENTRIES = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(0, 10**6)), max_size=40)


@settings(deadline=None)
@given(ENTRIES, st.integers(1, 4), st.integers(1, 5))
def test_best_are_the_best(entries: list[tuple[int, int, int]], most: int, parts: int) -> None:
    """Groups 0 to 3, scores from 0, ties that differ; remembered is each entry's number."""
    entries = list({tie: (group, score, tie) for group, score, tie in entries}.values())
    best, other = (Best(4, most, {"number": ((), torch.int64)}, torch.device("cpu")) for _ in range(2))
    for part in range(parts):
        some = list(enumerate(entries))[part::parts]
        numbers = torch.tensor([n for n, _ in some], dtype=torch.int64)
        group, score, tie = torch.tensor([e for _, e in some], dtype=torch.int64).view(-1, 3).T
        into = other if part % 2 else best
        into.add(group, score.float(), tie, lambda index, numbers=numbers: {"number": numbers[index]})
    best.merge(other, torch.arange(4), torch.arange(4))
    for g in range(4):
        ranked = sorted((-score, tie, n) for n, (group, score, tie) in enumerate(entries) if group == g and score)[
            :most
        ]
        got = best.take(torch.tensor([g]))
        assert list(zip(got.score.tolist(), got.tie.tolist(), got.payload["number"].tolist(), strict=True)) == [
            (-score, tie, n) for score, tie, n in ranked
        ]


def test_counts_of_many_tokens_are_fair_estimates() -> None:
    """A feature that fires on 3,000 tokens, one of them every fifth time: a sample in bounded memory says so."""
    g = torch.Generator().manual_seed(1)
    counts = TokenCounts(2, torch.device("cpu"))
    token = torch.randint(10, 3010, (50_000,), generator=g)
    token[::5] = 7
    feature = torch.zeros_like(token)
    feature[-20:] = 1  # fires seldom: counted exactly
    token[-20:] = 8
    value = torch.where(token == 7, 2.0, 1.0)
    for part in torch.arange(len(token)).split(7_000):
        counts.add(feature[part], token[part], value[part], firing.hashed(part))
        assert len(counts.key_Z) <= token_counts.TOKENS_KEPT + 2 * 20
    feature_R, token_R, count_R, mean_R = counts.top(1)
    assert (feature_R.tolist(), token_R.tolist(), mean_R.tolist()) == ([0, 1], [7, 8], [2.0, 1.0])
    assert int(count_R[0]) == pytest.approx(10_000, rel=0.35) and int(count_R[1]) == 20
    assert counts.level_F[0] > 0 == counts.level_F[1]
