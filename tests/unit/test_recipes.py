"""What a recipe fills in, and what it leaves to the person."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from qkscope.config import DictionaryConfig, TrainingConfig
from qkscope.dictionary import SparseTranscoder
from qkscope.training.recipes import ACTIVATION_SPARSITY, RECIPES, resolved
from qkscope.training.step1 import Step1Job

SHORT = TrainingConfig(tokens=1000, batch_tokens=500)


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_empty_field_is_filled(recipe: Any) -> None:
    empty = DictionaryConfig(recipe=recipe)
    found = resolved(empty, SHORT)
    assert {name: getattr(found, name) for name in RECIPES[recipe]} == RECIPES[recipe]
    assert all(getattr(empty, name) is None for name in RECIPES[recipe])  # these are what a recipe decides
    sides_alike = {"width_key", "k_key"}
    assert {n for n, v in found.model_dump().items() if v is None} == sides_alike | {"features"}
    assert resolved(found, SHORT) == found


def test_given_features_have_no_recipe() -> None:
    given = DictionaryConfig(features="somewhere")
    assert resolved(given, SHORT) == given


def test_the_seed_recipe_is_the_published_one() -> None:
    seed = resolved(DictionaryConfig(recipe="seed"), SHORT)
    assert (seed.activation, seed.start, seed.norm, seed.aux) == ("relu", "kaiming", "decoder", 0)
    assert seed.sparsity and seed.sparsity > 0


def test_the_default_recipe_has_no_penalty_and_revives() -> None:
    default = resolved(DictionaryConfig(), SHORT)
    assert (default.activation, default.start, default.sparsity) == ("batchtopk", "projection", 0)
    assert default.aux and default.aux > 0


@pytest.mark.parametrize(("steps", "share"), [(10, 1.0), (600, 1.0), (2400, 0.5), (60_000, 0.1)])
def test_defaults_rate_falls_with_the_root_of_the_steps(steps: int, share: float) -> None:
    training = TrainingConfig(tokens=steps * 512, batch_tokens=512)
    peak = RECIPES["default"]["learning_rate"]
    assert resolved(DictionaryConfig(), training).learning_rate == pytest.approx(share * peak)
    assert resolved(DictionaryConfig(learning_rate=0.1), training).learning_rate == 0.1
    seed = resolved(DictionaryConfig(recipe="seed"), training)
    assert seed.learning_rate == RECIPES["seed"]["learning_rate"]  # as published


@pytest.mark.parametrize("values", [{"aux": 0.0}, {"sparsity": 0.0, "recipe": "seed"}, {"learning_rate": 1e-5}])
def test_what_a_person_set_is_kept(values: dict[str, Any]) -> None:
    found = resolved(DictionaryConfig(**values), SHORT)
    assert {name: getattr(found, name) for name in values} == values


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("activation", ["relu", "topk", "batchtopk", "jumprelu"])
def test_an_activation_against_the_recipe_brings_its_own_sparsity(recipe: Any, activation: Any) -> None:
    found = resolved(DictionaryConfig(recipe=recipe, activation=activation), SHORT)
    assert found.sparsity == ACTIVATION_SPARSITY.get(activation, 0.0)
    assert bool(found.sparsity) is (activation in ("relu", "jumprelu"))  # the others have their L0 set exactly
    assert resolved(DictionaryConfig(recipe=recipe, activation=activation, sparsity=0.5), SHORT).sparsity == 0.5


@pytest.mark.parametrize("activation", ["batchtopk", "topk", "jumprelu", "relu"])
def test_annealing_ends_half_way_at_k(activation: Any) -> None:
    config = resolved(DictionaryConfig(width=40, k=2, k_key=10, activation=activation, anneal=8.0), SHORT)
    query, key = (SparseTranscoder(4, 40, 4, activation, k) for k in (2, 10))
    job = Step1Job(0, "", config, query, key)
    found = []
    for done in (0.0, 0.25, 0.5, 1.0):
        job.before_step(done)
        found.append((job.query.k, job.key.k))
    falls = [(16, 20), (32**0.5, 200**0.5), (2, 10), (2, 10)]  # never more than half of the width
    wanted = falls if activation in ("batchtopk", "topk") else [(2, 10)] * 4
    assert found == [pytest.approx(pair) for pair in wanted]


@pytest.mark.parametrize(("recipe", "beta2"), [("seed", 0.999), ("default", 0.98)])
def test_a_recipe_says_how_long_adam_remembers(recipe: Any, beta2: float) -> None:
    config = resolved(DictionaryConfig(recipe=recipe, width=8, k=2), SHORT)
    query, key = (SparseTranscoder(4, 8, 4, "batchtopk", 2) for _ in range(2))
    optimizer = torch.optim.Adam(Step1Job(0, "", config, query, key).parameter_groups())
    assert [group["betas"] for group in optimizer.param_groups] == [(0.9, beta2)]
