"""The models that ship with the package: what is on disk, what they can do, and the training that made them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from qkscope.config import DataConfig, RunConfig
from qkscope.embedded import EMBEDDED_MODELS, LAYERS, train, with_defaults
from qkscope.embedded.skills import SKILLS, skills
from qkscope.embedded.tokenizer import make_tokenizer
from qkscope.files import read_tensors
from qkscope.models import load_model
from qkscope.pipeline import with_layers

MOST_BYTES = 8 << 20


@pytest.mark.parametrize("name", EMBEDDED_MODELS)
def test_a_model_ships_small_and_in_half_precision(name: str) -> None:
    weights = EMBEDDED_MODELS[name] / "model.safetensors"
    assert sum(p.stat().st_size for p in EMBEDDED_MODELS[name].iterdir()) < MOST_BYTES
    with safe_open(weights, "pt") as file:
        assert {file.get_tensor(key).dtype for key in file.keys()} == {torch.float16}  # noqa: SIM118
    assert not (EMBEDDED_MODELS[name] / "training.safetensors").exists()


@pytest.mark.parametrize("name", EMBEDDED_MODELS)
def test_a_model_loads_by_name_and_by_transformers_alone(name: str) -> None:
    model, tokenizer = load_model(name)
    assert not model.training and next(model.parameters()).dtype == torch.float32
    plain = AutoModelForCausalLM.from_pretrained(EMBEDDED_MODELS[name], dtype=torch.float32).eval()
    ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer("Once Mary and John lived in Kelso.")["input_ids"]]])
    assert torch.equal(model(ids).logits, plain(ids).logits)
    assert plain.config.num_hidden_layers == LAYERS
    same = AutoTokenizer.from_pretrained(EMBEDDED_MODELS[name])
    assert same.get_vocab() == make_tokenizer(train.CONTEXT).get_vocab()


@pytest.mark.parametrize("name", EMBEDDED_MODELS)
def test_a_model_can_do_what_its_card_says(name: str) -> None:
    card = json.loads((EMBEDDED_MODELS[name] / "skills.json").read_text())["skills"]
    found = skills(*load_model(name), documents=200)
    assert set(found) == {"cross-entropy", "corpus", *SKILLS} == set(card)
    for skill, figure in found.items():
        low, high = figure["ci95"]
        assert low - 0.02 <= card[skill]["mean"] <= high + 0.02, skill


def test_without_a_model_the_embedded_one_is_used() -> None:
    config = with_defaults(RunConfig())
    assert (config.model, config.data.source, config.layers) == ("stories-gpt2", "embedded", "all")
    assert with_layers(config).numbers == [0, 1, 2, 3]
    chosen = with_defaults(RunConfig(layers=(2,), data=DataConfig(source="own.txt")))
    assert (chosen.data.source, chosen.layers) == ("own.txt", (2,))
    other = RunConfig(model="gpt2")
    assert with_defaults(other) == other


class Killed(Exception):
    """Stands for a kill."""


@pytest.mark.parametrize("name", EMBEDDED_MODELS)
def test_training_goes_on_after_a_kill_to_the_same_weights(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "skills", lambda model, tokenizer: {})
    budget: dict[str, Any] = {"tokens": 1000, "batch_tokens": 256, "seed": 1, "save_seconds": -1.0}
    train.train(name, tmp_path / "whole", **budget)
    written = train.write_tensors

    def once(path: Path, tensors: Any, metadata: Any) -> None:
        written(path, tensors, metadata)
        raise Killed

    monkeypatch.setattr(train, "write_tensors", once)
    with pytest.raises(Killed):
        train.train(name, tmp_path / "killed", **budget)
    assert read_tensors(tmp_path / "killed" / "training.safetensors")[1]["step"] == 1
    monkeypatch.setattr(train, "write_tensors", written)
    train.train(name, tmp_path / "killed", **budget)
    whole, killed = (read_tensors(tmp_path / f / "model.safetensors")[0] for f in ("whole", "killed"))
    assert whole.keys() == killed.keys() and all(torch.equal(whole[k], killed[k]) for k in whole)
    card = json.loads((tmp_path / "killed" / "skills.json").read_text())
    assert card["name"] == name and card["tokens"] >= 1000
