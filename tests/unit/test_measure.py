"""What is measured of a layer: each variant on all of the text, and parts of it that are measured apart."""

from __future__ import annotations

from pathlib import Path
from pickle import UnpicklingError
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from layers import by_head
from test_examples import Letters
from test_faithful import a_layer
from texts import BOS, documents_of, write

from qkscope.attention import harvest
from qkscope.config import RunConfig
from qkscope.evaluate.controls import shuffled_pairs, untrained
from qkscope.evaluate.layer import SAMPLE_TOKENS, memory_of
from qkscope.evaluate.measure import CONTROLS, Sources, Sums, measure, sample_l0
from qkscope.evaluate.patterns import KLScore
from qkscope.evaluate.pieces import HELDOUT, Found, packed, unpacked
from qkscope.evaluate.report import figures
from qkscope.evaluate.text import text_of
from qkscope.tables.examples import Examples


def measured(name: str = "gpt2") -> dict[str, Any]:
    """A layer of a tiny model, four batches of text and what there is to be measured."""
    site, batches, dec = a_layer(name)
    batches = [*batches, *a_layer(name)[1][::-1]]
    for number, batch in enumerate(batches):
        batch.document_B.add_(10 * number)
    sample = [harvest([site], b.tokens_BT, b.real_BT)[0] for b in batches[:1]]
    return {"site": site, "batches": batches, "dec": dec, "sample": sample, "sources": Sources.of(dec, sample)}


def sums_of(layer: dict[str, Any], first: int, end: int) -> Sums:
    text, examples = layer["batches"][first:end], Examples(layer["dec"], 2, drawn=1, pairs=2)
    with torch.no_grad():
        return measure(layer["dec"], layer["site"], text, layer["sources"], examples)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_every_control_is_measured_on_all_of_the_text(name: str) -> None:
    layer = measured(name)
    site, dec = layer["site"], layer["dec"]
    report = figures(dec, sums_of(layer, 0, 4))
    patterns = {
        c: d.log_pattern_all for c, d in untrained(dec, layer["sample"], sample_l0(dec, layer["sample"])).items()
    }
    pairs, strength = shuffled_pairs(dec)
    patterns["shuffled"] = lambda inputs: inputs.rule.masked(dec.scores(inputs, pairs, strength)).log_softmax(-1)
    assert list(report["controls"]) == list(CONTROLS) and patterns.keys() == set(CONTROLS)
    for control, log_pattern in patterns.items():
        score = KLScore()
        with torch.no_grad():
            for batch in layer["batches"]:
                inputs = harvest([site], batch.tokens_BT, batch.real_BT)[0]
                score.add(inputs, by_head(log_pattern(inputs)))
        assert report["controls"][control]["pattern_kl"]["mean"] == pytest.approx(score.kl.mean, rel=1e-5)


@pytest.mark.parametrize("cuts", [(1, 3), (2, 2), (0, 4)])
def test_parts_that_are_handed_over_merge_to_the_whole(cuts: tuple[int, int], tmp_path: Path) -> None:
    """To the same figures, also where a part is empty."""
    layer = measured()
    whole, merged = sums_of(layer, 0, 4), Sums(Examples(layer["dec"], 2, drawn=1, pairs=2))
    for first, end in ((0, cuts[0]), cuts, (cuts[1], 4)):
        data = packed([Found((HELDOUT, 0, 1), sums_of(layer, first, end), 0.0)])
        assert len(data) < 500_000  # no decomposition goes with it
        merged.merge(unpacked(data)[0].value)
    assert figures(layer["dec"], merged) == figures(layer["dec"], whole)
    for sums, folder in ((merged, tmp_path / "merged"), (whole, tmp_path / "whole")):
        sums.examples.write(folder, Letters())
    for table in ("features", "examples", "pair_examples"):
        assert (tmp_path / "merged" / f"{table}.parquet").read_bytes() == (
            tmp_path / "whole" / f"{table}.parquet"
        ).read_bytes()


def test_nothing_else_is_unpacked() -> None:
    with pytest.raises(UnpicklingError, match="Weights only load failed"):
        unpacked(packed([Path("elsewhere")]))  # type: ignore[list-item]


def test_memory_is_counted_with_the_context_the_vocabulary_and_the_adversary() -> None:
    site: Any = a_layer()[0]
    heads, vocabulary = site.shape["N"], site.model.config.vocab_size

    def counted(**values: Any) -> int:
        return memory_of(site, RunConfig.model_validate(values))

    quiet = {"evaluation": {"adversary_steps": 0}}
    short, long = (counted(data={"context": context}, **quiet) for context in (256, 4096))
    mean = 4 * heads * (4096**2 - 256**2)
    logits = 2 * 4 * vocabulary * (4096 - 3072)
    masks = SAMPLE_TOKENS * (4096 - 256)
    least = mean + logits + masks
    assert least < long - short < least + 4 * 16 * 4096**2  # and patterns of one head
    assert counted(training={"batch_tokens": 1 << 20}, **quiet) == counted(training={"batch_tokens": 4096}, **quiet)
    gates = 4 * heads * 2401**2
    assert 5 * gates < counted() - counted(**quiet) < 8 * gates
    assert counted(dictionary={"width": 1 << 16}) == counted(**quiet)  # too large for an adversary


def test_batches_of_what_is_measured_are_no_larger_for_larger_steps(tmp_path: Path) -> None:
    texts = documents_of([200] * 400)
    config = RunConfig.model_validate({"training": {"batch_tokens": 1 << 16}})
    config = config.model_copy(update={"data": write(tmp_path / "text.jsonl", texts)})
    site: Any = SimpleNamespace(tokenizer=BOS)
    batches = list(text_of(site, config, "train", 30_000))
    assert max(batch.n_tokens for batch in batches) < 2 * 4096  # about 4,096, up to the end of a sequence
    assert sum(batch.n_tokens for batch in batches) >= 30_000
