"""qkscope: why does this attention head look there?

import qkscope as qk
run = qk.run(qk.RunConfig(model="openai-community/gpt2", layers=[10], data={"source": "..."}), out="runs/gpt2")
dec = qk.Decomposition.load("runs/gpt2/layer_10")
site = qk.AttentionSite.load("openai-community/gpt2", layer=10)
with site.replace_pattern(dec, pairs="kept"):
    logits = site.model(**tokens).logits
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .attention import AttentionSite
    from .config import RunConfig
    from .decomposition import Decomposition
    from .errors import UserError
    from .explain.intervene import Feature, Pair
    from .pipeline import Run, run

try:
    __version__ = version("qkscope")
except PackageNotFoundError:  # a checkout on the path, not installed
    __version__ = "0.0.0"

# Public names and where they live; looked up when first asked for, so that `qkscope --help` does not wait for torch.
_HOMES = {
    "AttentionSite": "attention",
    "Decomposition": "decomposition",
    "Feature": "explain.intervene",
    "Pair": "explain.intervene",
    "Run": "pipeline",
    "RunConfig": "config",
    "UserError": "errors",
    "run": "pipeline",
}

__all__ = ["AttentionSite", "Decomposition", "Feature", "Pair", "Run", "RunConfig", "UserError", "run"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'qkscope' has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
