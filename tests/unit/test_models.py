"""Loading a model: what loads, and one line for everything that a person can get wrong."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_model

from qkscope.attention import AttentionSite
from qkscope.errors import UserError
from qkscope.models import load_model, number_of_layers

MODEL = "models/babyllama-105"


@pytest.fixture
def folder(shared: Path, tmp_path: Path) -> Path:
    """A writable copy of a small model."""
    copy = tmp_path / "model"
    copy.mkdir()
    for file in (shared / MODEL).iterdir():
        shutil.copyfile(file, copy / file.name)
    return copy


def refusal(name: str | Path) -> str:
    """The one line that the model is refused with."""
    with pytest.raises(UserError) as caught:
        load_model(str(name))
    line = str(caught.value)
    assert line.startswith(f"--model {name}: ") and "\n" not in line and len(line) < 500, line
    return line


def test_loads_a_model_frozen_and_in_evaluation_mode(folder: Path) -> None:
    model, tokenizer = load_model(str(folder))
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    assert next(model.parameters()).dtype == torch.float32
    ids = tokenizer("Once upon a time", return_tensors="pt").input_ids
    assert model(input_ids=ids).logits.shape == (*ids.shape, 105)
    assert AttentionSite(model, tokenizer, layer=2).has_head


def test_loads_in_another_precision(folder: Path) -> None:
    assert next(load_model(str(folder), dtype="bfloat16")[0].parameters()).dtype == torch.bfloat16


def test_a_model_says_how_many_layers_it_has(folder: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").unlink()  # by its configuration alone
    assert number_of_layers(str(folder)) == number_of_layers("stories-llama") + 1 == 5
    with pytest.raises(UserError, match="no such folder"):
        number_of_layers(str(tmp_path / "none"))


def test_site_loads_by_folder(folder: Path) -> None:
    site = AttentionSite.load(str(folder), layer=1)
    assert site.layer == 1 and site.tokenizer is not None


def test_an_encoder_loads_without_a_head(folder: Path) -> None:
    for file in ("config.json", "model.safetensors"):
        (folder / file).unlink()
    tiny_model("bert").save_pretrained(folder)  # type: ignore[operator]
    model, _ = load_model(str(folder))
    assert type(model).__name__ == "BertModel"
    assert not AttentionSite(model, layer=0).has_head


def test_no_such_folder(tmp_path: Path) -> None:
    assert "no such folder" in refusal(tmp_path / "nowhere")


def test_a_file_in_the_place_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    assert "no such folder" in refusal(tmp_path / "file")


def test_folder_without_a_config(folder: Path) -> None:
    (folder / "config.json").unlink()
    assert "no config.json" in refusal(folder)


def test_empty_folder(tmp_path: Path) -> None:
    assert "no config.json" in refusal(tmp_path)


def test_config_that_is_no_json(folder: Path) -> None:
    (folder / "config.json").write_text("{")
    assert "cannot be loaded" in refusal(folder)


def test_folder_without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert "no weights" in refusal(folder)


def test_folder_without_a_tokenizer(folder: Path) -> None:
    for file in folder.glob("*token*"):
        file.unlink()
    assert "tokenizer" in refusal(folder)


def test_truncated_weights(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100_000])
    assert "cannot be loaded" in refusal(folder)


def test_empty_weights(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"")
    assert "cannot be loaded" in refusal(folder)


def test_weights_that_lack_a_tensor(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    lost = "model.layers.1.self_attn.q_proj.weight"
    del weights[lost]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert f"lack {lost!r} (1 tensors)" in refusal(folder)


def test_weights_of_another_shape(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["intermediate_size"] += 8
    (folder / "config.json").write_text(json.dumps(config))
    line = refusal(folder)
    assert "shape" in line and "mlp" in line


def test_unknown_architecture(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["model_type"] = "llamma_of_tomorrow"
    (folder / "config.json").write_text(json.dumps(config))
    assert "llamma_of_tomorrow" in refusal(folder)


def test_config_without_an_architecture(folder: Path) -> None:
    (folder / "config.json").write_text("{}")
    assert "cannot be loaded" in refusal(folder)


def test_a_hub_name_without_network() -> None:
    assert "nobody/no-such-model" in refusal("nobody/no-such-model")


def test_unknown_precision(folder: Path) -> None:
    for wrong in ("float33", "int8"):
        with pytest.raises(UserError, match=wrong):
            load_model(str(folder), dtype=wrong)


def test_unknown_device(folder: Path) -> None:
    with pytest.raises(UserError, match="nowhere"):
        load_model(str(folder), device="nowhere")
