"""A run's commands on a device that is not the CPU, without a GPU: nothing meets what lies elsewhere, and what is found
is what the CPU finds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from pretended import DEVICE, PretendedDevice
from small_runs import Said, report_of

from qkscope.data.sequences import Batch

LIGHT: dict[str, Any] = {
    "layers": 0,
    "training.tokens": 400,
    "training.checkpoint-steps": 100,
    "pairs.tokens": 400,
    "pairs.count": 12,
    "pairs.stages": 1,
    "pairs.importance-tokens": 100,
    "pairs.validation-tokens": 100,
    "dictionary.width": 8,
    "dictionary.k": 2,
    "evaluation.tokens": 60,
    "evaluation.examples": 2,
    "evaluation.adversary-steps": 1,
}
MORE: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "llama": {"training.reuse": 2},
    "gpt_oss": {"dictionary.recipe": "seed", "pairs.method": "mask"},
    "gemma2": {"dictionary.activation": "jumprelu", "dictionary.sparsity": 0.1, "pairs.method": "refit"},
}


@pytest.mark.parametrize("model", MORE)
def test_a_run_elsewhere_is_that_of_the_cpu(model: str, run: Callable[..., Path]) -> None:
    options = {**LIGHT, **MORE[model]}
    here = run(options, model=model, name="here")
    with PretendedDevice() as device:
        there = run({**options, "training.device": DEVICE.type}, model=model, name="there")
        assert device.waits  # of what a run waits for, some is certain
    one, two = (report_of(folder / "layer_0") for folder in (here, there))
    assert two == approximately(one)
    pairs = [pq.read_table(folder / "layer_0" / "pairs.parquet").to_pydict() for folder in (here, there)]
    for column in ("query_feature", "key_feature", "head"):
        assert pairs[0][column] == pairs[1][column]
    assert pairs[1]["strength"] == pytest.approx(pairs[0]["strength"], rel=1e-3, abs=1e-5)


@pytest.mark.parametrize(
    ("model", "command"), [("gpt2", "evaluate"), ("qwen3", "heads --distance"), ("gpt2", "compare")]
)
def test_what_follows_a_run(
    model: str, command: str, run: Callable[..., Path], call: Callable[[list[str]], Said]
) -> None:
    folder = str(run(LIGHT, model=model))
    name, *more = command.split()
    words = [name, folder, *more, *([folder] if name == "compare" else [])]
    here = call(words)
    with PretendedDevice() as device:
        there = call([*words, "--device", DEVICE.type])
    assert there.status == 0, there.lines
    assert device.waits and there.out == here.out


def test_what_lies_elsewhere_is_refused(run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """That the test above can fail: tokens that stay where they were made meet a model that is elsewhere."""
    monkeypatch.setattr(Batch, "to", lambda batch, device: batch)
    with PretendedDevice(), pytest.raises(RuntimeError, match="same device"):
        run({**LIGHT, "training.device": DEVICE.type})


def approximately(values: Any) -> Any:
    """A report's figures, however deep, up to rounding."""
    if isinstance(values, dict):
        return {key: approximately(value) for key, value in values.items()}
    if isinstance(values, list):
        return [approximately(value) for value in values]
    return pytest.approx(values, rel=1e-3, abs=1e-4) if isinstance(values, float) else values
