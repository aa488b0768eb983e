"""The small language models that ship with the package, so that the whole method runs and is checked anywhere.

`stories-gpt2` was trained by `train.py` on the embedded corpus (data/stories/), whose tokens have known roles;
`skills.py` says what it can do.
"""

from __future__ import annotations

from pathlib import Path

from ..config import RunConfig
from ..data.documents import EMBEDDED

FOLDER = Path(__file__).parent
EMBEDDED_MODELS = {"stories-gpt2": FOLDER / "stories-gpt2"}
LAYERS = 4


def with_defaults(config: RunConfig) -> RunConfig:
    """Without a model the embedded one; with an embedded one, its own corpus and all of its layers."""
    model = config.model or "stories-gpt2"
    if model not in EMBEDDED_MODELS:
        return config
    data = config.data if config.data.source else config.data.model_copy(update={"source": EMBEDDED})
    layers = config.layers or tuple(range(LAYERS))
    return config.model_copy(update={"model": model, "data": data, "layers": layers})
