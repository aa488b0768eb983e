"""The small language models that ship with the package, so that the whole method runs and is checked anywhere.

Both learned from the embedded corpus (data/stories/), whose tokens have known roles, by `train.py`: `stories-gpt2` with
learned positions, `stories-llama` with a rotary embedding and grouped queries. `skills.py` says what they can do.
"""

from __future__ import annotations

from pathlib import Path

from ..config import RunConfig
from ..data.documents import EMBEDDED

FOLDER = Path(__file__).parent
EMBEDDED_MODELS = {name: FOLDER / name for name in ("stories-gpt2", "stories-llama")}
LAYERS = 4


def with_defaults(config: RunConfig) -> RunConfig:
    """Without a model the embedded one; with an embedded one, its own corpus and all of its layers."""
    model = config.model or "stories-gpt2"
    if model not in EMBEDDED_MODELS:
        return config
    data = config.data if config.data.source else config.data.model_copy(update={"source": EMBEDDED})
    layers = config.layers or "all"
    return config.model_copy(update={"model": model, "data": data, "layers": layers})
