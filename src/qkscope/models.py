"""Load a Hugging Face model and its tokenizer, or say in one line why not; its layers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging as transformers_logging

from .embedded import EMBEDDED_MODELS
from .errors import UserError

CAUSAL_ENDINGS = ("ForCausalLM", "LMHeadModel")


def load_model(name: str, *, dtype: str = "float32", device: str = "cpu") -> tuple[nn.Module, Any]:
    """The model in evaluation mode, frozen, and its tokenizer.

    A model whose configuration names a causal language model gets its head; any other is loaded without one.
    `name` is one of the embedded models, a folder, or a model on the hub.
    Raises `UserError` for a folder that does not exist, has no weights, or holds weights of another shape, and for a
    precision or device that is not there.
    """
    number = getattr(torch, dtype, None)
    if not isinstance(number, torch.dtype) or not number.is_floating_point:
        raise UserError(f"no such precision: {dtype!r}; name float32, bfloat16 or float16")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {device!r} cannot be used here ({str(error).splitlines()[0][:80]})") from None
    with _reading(name) as source:
        config = AutoConfig.from_pretrained(source)
        kind: Any = AutoModelForCausalLM if _is_causal(config) else AutoModel
        # Tensors of another shape are let through and named below: transformers' own message names none.
        model, info = kind.from_pretrained(source, dtype=number, output_loading_info=True, ignore_mismatched_sizes=True)
        tokenizer = AutoTokenizer.from_pretrained(source)
    for key, found, wanted in sorted(info["mismatched_keys"]):
        raise UserError(
            f"--model {name}: {key!r} has shape {list(found)} and config.json says {list(wanted)}; they must match"
        )
    missing = sorted(info["missing_keys"])
    # An encoder's pooler is no part of any attention layer, and checkpoints of masked language models lack it.
    missing = [key for key in missing if not key.startswith("pooler.")]
    if missing:
        raise UserError(
            f"--model {name}: the weights lack {missing[0]!r} ({len(missing)} tensors); get the whole model"
        )
    return model.to(device).eval().requires_grad_(False), tokenizer


def number_of_layers(name: str) -> int:
    """How many layers a model's configuration says it has (of a hybrid, those without attention among them)."""
    with _reading(name) as source:
        count = getattr(AutoConfig.from_pretrained(source).get_text_config(), "num_hidden_layers", None)
    if count is None:
        raise UserError(f"--layers all: {name} does not say how many layers it has; name them")
    return count


@contextmanager
def _reading(name: str) -> Iterator[str]:
    """Where transformers finds a model; what goes wrong there is a `UserError`."""
    looks_local = name in EMBEDDED_MODELS or name.startswith((".", "/", "~")) or Path(name).exists()
    path = EMBEDDED_MODELS.get(name) or Path(name).expanduser()
    if looks_local and not path.is_dir():
        raise UserError(f"--model {name}: no such folder; name a folder with config.json, or a Hugging Face model")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield str(path) if looks_local else name
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
        raise UserError(f"--model {name}: {_reason(error, path if looks_local else None)}") from None


def blocks_through(model: nn.Module, part: nn.Module) -> list[nn.Module]:
    """The model's list of layers up to the one that a module is part of; empty where it is part of none."""
    path = next(name for name, module in model.named_modules() if module is part).split(".")
    for end in range(len(path) - 1, -1, -1):
        blocks = model.get_submodule(".".join(path[:end]))
        if isinstance(blocks, nn.ModuleList):
            return list(blocks)[: int(path[end]) + 1]
    return []


def _is_causal(config: Any) -> bool:
    architectures = config.architectures or []
    if architectures:
        return architectures[0].endswith(CAUSAL_ENDINGS)
    return config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


def _reason(error: Exception, folder: Path | None) -> str:
    if folder is not None and not (folder / "config.json").is_file():
        return "has no config.json; name the folder of a saved Hugging Face model"
    if folder is not None and not any(folder.glob("*.safetensors")) and not any(folder.glob("*.bin")):
        return "has no weights (no model.safetensors); get the whole model"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"cannot be loaded ({(lines or [type(error).__name__])[0][:200]})"
