"""The recipes: what `default` and `seed` mean, field by field.

`seed` is the published recipe with its faults mended (METHOD, step 1): the baseline that everything is compared with.
`default` is ours; `qkscope bench quality` prints the two side by side.
"""

from __future__ import annotations

from typing import Any

from ..config import DictionaryConfig

RECIPES: dict[str, dict[str, Any]] = {
    "seed": {
        "activation": "relu",
        "sparsity": 0.03,
        "pair_sparsity": 0.0,
        "start": "kaiming",
        "norm": "decoder",
        "aux": 0.0,
        "anneal": 1.0,
        "learning_rate": 1e-2,
        "beta2": 0.999,
    },
    "default": {
        "activation": "batchtopk",
        "sparsity": 0.0,
        "pair_sparsity": 0.0,
        "start": "projection",
        "norm": "score",
        "aux": 1 / 32,
        "anneal": 1.0,
        "learning_rate": 8e-3,
        "beta2": 0.98,
    },
}

# What an activation needs when it is chosen against its recipe's own.
ACTIVATION_SPARSITY = {"relu": 0.03, "jumprelu": 0.3}


def resolved(config: DictionaryConfig) -> DictionaryConfig:
    """The configuration with every empty field filled from its recipe; as it is where nothing is trained."""
    if config.features is not None:
        return config
    values = dict(RECIPES[config.recipe])
    if config.activation is not None and config.activation != values["activation"]:
        values["sparsity"] = ACTIVATION_SPARSITY.get(config.activation, 0.0)
    return config.model_copy(update={name: v for name, v in values.items() if getattr(config, name) is None})
