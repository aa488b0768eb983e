"""Everything a run can be told, as frozen models: one field, one meaning, one unit.

A `RunConfig` is what the command line parses, what Python passes to `qkscope.run`, and what stands resolved in an
artefact's `config.yaml`. An unknown key is refused with the nearest known one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from .errors import UserError, nearest

Activation = Literal["relu", "topk", "batchtopk", "jumprelu"]
Recipe = Literal["default", "seed"]
Dtype = Literal["float32", "bfloat16"]
Spread = Literal["auto", "layers", "text"]
PairMethod = Literal["tune", "refit", "importance", "mask"]


class Config(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class DataConfig(Config):
    """The text, and how it becomes sequences."""

    source: str | None = None
    """A .txt, .jsonl or .parquet file, the name of a Hugging Face dataset (streamed), or `embedded`: stories written as
    they are read, whose tokens have known roles. Empty with an embedded model: `embedded`."""
    text_column: str = "text"
    """Column or key that holds the text."""
    subset: str | None = None
    """Configuration name of a Hugging Face dataset."""
    split: str = "train"
    """Split of a Hugging Face dataset."""
    context: int = Field(default=256, ge=2)
    """Tokens a sequence, the BOS token included; a longer document becomes several sequences, never a shared one."""
    prepend_bos: bool = True
    """Start every sequence with the tokenizer's BOS token, where it has one."""
    heldout: float = Field(default=0.1, gt=0, lt=0.5)
    """Share of documents kept for the report; as many again choose between candidates (validation)."""


class DictionaryConfig(Config):
    """One pair of dictionaries. A field left empty takes the recipe's value."""

    features: str | None = None
    """Features to take in the place of trained ones; no other field but `centred` then has a say. A residual-stream SAE
    in SAELens's format, as a folder (cfg.json, sae_weights.safetensors) or on the Hugging Face hub (REPO or
    REPO/FOLDER); or directions, a .safetensors file with one matrix [F, D]. In it {layer} stands for the layer's
    number, {layer-1} for the one below."""
    centred: bool = False
    """features: the SAE was trained on a residual stream without each token's mean, as TransformerLens makes it for
    LayerNorm models (`center_writing_weights`). Where cfg.json says so, it is done anyway."""
    recipe: Recipe = "default"
    """`default`: BatchTopK, data-driven start, revival. `seed`: the published recipe with its faults mended."""
    width: int = Field(default=2400, ge=1)
    """Features on the query side."""
    width_key: int | None = Field(default=None, ge=1)
    """Features on the key side; empty: as many as on the query side."""
    k: float = Field(default=16, gt=0)
    """Average active features a query token (topk, batchtopk: exact; jumprelu: the target)."""
    k_key: float | None = Field(default=None, gt=0)
    """Average active features a key token; empty: as many as on the query side."""
    activation: Activation | None = None
    """relu, topk, batchtopk or jumprelu."""
    sparsity: float | None = Field(default=None, ge=0)
    """Weight of the sparsity penalty (relu: the root penalty; jumprelu: the pull of L0 to k)."""
    pair_sparsity: float | None = Field(default=None, ge=0)
    """Weight of the pair penalty: how far the pairs of a head move its scores, summed over all of them. More of it
    leaves fewer pairs to prune, at more KL while all are kept."""
    start: Literal["projection", "random", "kaiming"] | None = None
    """Encoder directions of inputs that were seen (projection) or at random, with decoder rows from the model's own
    projection of them; or both Kaiming uniform."""
    norm: Literal["score", "decoder"] | None = None
    """What batchtopk and jumprelu weigh an activation by: its effect on scores, or its decoder row's norm."""
    aux: float | None = Field(default=None, ge=0)
    """Weight of the auxiliary loss that revives dead features; 0: none."""
    anneal: float | None = Field(default=None, ge=1)
    """batchtopk and topk: training begins with this many times k active features and reaches k half way; 1: with k."""
    dead_after: int = Field(default=5_000, ge=1)
    """Tokens without firing after which a feature counts as dead for the auxiliary loss."""
    learning_rate: float | None = Field(default=None, gt=0)
    """Adam's peak rate. Empty, `default`'s falls with the root of the steps beyond 600."""
    beta2: float | None = Field(default=None, gt=0, lt=1)
    """Adam's memory of squared gradients. Sparse features see few tokens, and a shorter memory than Adam's usual 0.999
    lets their rates follow."""

    @model_validator(mode="after")
    def _k_within_width(self) -> DictionaryConfig:
        for side, k, width in (("", self.k, self.width), ("_key", self.key_k, self.key_width)):
            if k > width:
                raise ValueError(f"k{side} is {k:g}, more than the width of {width}; lower k{side} or raise the width")
            if self.activation == "topk" and k != round(k):
                raise ValueError(f"k{side} is {k:g}; topk needs a whole number (batchtopk takes any)")
        return self

    @property
    def key_width(self) -> int:
        return self.width if self.width_key is None else self.width_key

    @property
    def key_k(self) -> float:
        return self.k if self.k_key is None else self.k_key


class SweepConfig(Config):
    """Values to combine: one pair of dictionaries for each combination, all trained on one pass over the text."""

    recipe: tuple[Recipe, ...] = ()
    width: tuple[int, ...] = ()
    k: tuple[float, ...] = ()
    activation: tuple[Activation, ...] = ()
    sparsity: tuple[float, ...] = ()


class TrainingConfig(Config):
    """Step 1's training, and what step 2's shares with it."""

    tokens: int = Field(default=2_000_000, ge=1)
    """Training tokens (padding not counted); the text is repeated in a new order where it ends before that."""
    reuse: int = Field(default=1, ge=1)
    """Steps that learn from each batch that the model has run on, of step 1 and of step 2's trainings: the model reads
    one in so many of the tokens. For models that cost more than their dictionaries (docs/speed.md)."""
    held_batches: int = Field(default=8, ge=1)
    """reuse: batches that are held at once and learned from in turn, over and over."""
    batch_tokens: int = Field(default=2048, ge=2)
    """Tokens a step, as whole sequences of `data.context`."""
    warmup: float = Field(default=0.05, ge=0, lt=1)
    """Share of the training over which the learning rate rises."""
    decay: float = Field(default=0.3, ge=0, le=1)
    """Share of the training over which the learning rate falls to a hundredth, at the end."""
    dtype: Dtype = "float32"
    """Type of the model's and the dictionaries' products; pattern, log-softmax and KL are float32 always. bfloat16 is
    faster on a GPU and on CPUs with AVX-512 BF16 or AMX, and the model takes half the memory."""
    device: str = "auto"
    """cpu, cuda, cuda:1 ...; auto: a GPU where there is one."""
    spread: Spread = "auto"
    """What several processes share (torchrun). layers: each trains layers and variants of its own, on all of the text;
    all must see the --out folder. text: each trains every dictionary, on its share of every batch. auto: layers, if all
    see the folder and more than half of the processes then have something to train."""
    seed: int = 0
    """Seed of the starts and of the order of the documents."""
    log_steps: int = Field(default=20, ge=1)
    """Steps between two lines of metrics.jsonl."""
    checkpoint_steps: int = Field(default=200, ge=1)
    """Steps between two checkpoints; a killed run goes on from the last one."""


class PairsConfig(Config):
    """Step 2: the pair map."""

    method: PairMethod | None = None
    """tune: prune in stages and train dictionaries and strengths through the sparse map. refit: rank once, train the
    strengths. importance: rank only. mask: the published trained mask (dense; for comparison). Empty: tune, or
    importance where dictionary.features are given."""
    count: int = Field(default=10_000, ge=1)
    """Pairs to keep, over all heads."""
    max_kl: float | None = Field(default=None, gt=0)
    """Keep the fewest pairs whose pattern KL on validation text stays under this (nats); `count` is then the most."""
    importance_tokens: int = Field(default=8192, ge=1)
    """Training tokens over which importance is averaged."""
    validation_tokens: int = Field(default=16_384, ge=1)
    """Validation tokens on which a selection is judged."""
    tokens: int = Field(default=1_000_000, ge=0)
    """Training tokens of refit, of the mask, or of all of tune's stages together."""
    stages: int = Field(default=4, ge=1)
    """tune: how many prunings lead to `count`."""
    first: float = Field(default=8.0, ge=1)
    """tune: the first stage keeps this many times the final count."""
    learning_rate: float = Field(default=4e-3, gt=0)
    """tune: Adam's peak rate for the dictionaries."""
    strength_rate: float = Field(default=1e-2, gt=0)
    """refit and tune: Adam's peak rate for the kept strengths, relative to each weight's own size."""
    dropped_sparsity: float = Field(default=1e-3, ge=0)
    """tune: weight of the pair penalty (see dictionary.pair-sparsity) on the pairs that are not kept, so that the
    dictionaries say of them what the map does: nothing."""
    mask_sparsity: float = Field(default=1e-6, ge=0)
    """mask: weight of the root penalty on the mask, a sum over its entries."""


class TargetConfig(Config):
    """What each layer is to reach, with its numbers chosen by the run: k of both sides by step 1, which is steered to a
    share of the bound, and the pairs by tune, which prunes for as long as validation text stays under it."""

    max_kl: float | None = Field(default=None, gt=0)
    """Pattern KL of the pruned map at the most, in nats."""
    max_ce: float | None = Field(default=None, gt=0)
    """Increase of the model's cross-entropy at the most, in nats a token, with the layer's pattern replaced."""
    share: float = Field(default=0.6, gt=0, lt=1)
    """Share of the bound that step 1 is steered to; the rest is left for pruning. More of it: fewer active features,
    more pairs."""

    @property
    def given(self) -> bool:
        return self.max_kl is not None or self.max_ce is not None


class EvaluationConfig(Config):
    """The report."""

    tokens: int = Field(default=65_536, ge=1)
    """Held-out tokens (fewer where the held-out documents end before)."""
    controls: bool = True
    """Measure the controls too: frozen random dictionaries, shuffled pairs, SVD of the model's own product."""
    adversary_steps: int = Field(default=160, ge=0)
    """Steps of the adversary that switches dropped pairs on to hurt the model's output; 0: no adversary."""
    examples: int = Field(default=12, ge=0)
    """Max-activating examples kept a feature."""
    drawn_examples: int = Field(default=2, ge=0)
    """Examples kept a feature from each of four ranges of its activation."""
    pair_examples: int = Field(default=4, ge=0)
    """Places kept a pair: where in the text it does most to the pattern."""


class RunConfig(Config):
    """One run: a model, its layers, the text, and both steps."""

    model: str | None = None
    """A Hugging Face model: its folder or its name; or the embedded stories-gpt2 (the default) or
    stories-llama."""
    layers: tuple[int, ...] | Literal["all"] = ()
    """Layers to decompose, in one pass over the text; or `all` of the model's, as empty means with an embedded one."""
    data: DataConfig = DataConfig()
    dictionary: DictionaryConfig = DictionaryConfig()
    sweep: SweepConfig = SweepConfig()
    training: TrainingConfig = TrainingConfig()
    pairs: PairsConfig = PairsConfig()
    target: TargetConfig = TargetConfig()
    evaluation: EvaluationConfig = EvaluationConfig()

    @property
    def numbers(self) -> list[int]:
        """The layers in order, each once; not of a configuration that still says `all`."""
        assert self.layers != "all", "a run says which layers these are (pipeline.py)"
        return sorted(set(self.layers))

    @model_validator(mode="after")
    def _given_or_trained(self) -> RunConfig:
        if self.dictionary.features is None:
            if self.dictionary.centred:
                raise ValueError("dictionary.centred is about dictionary.features, which are not given")
            return self
        alone = "with dictionary.features no dictionary is trained; leave it out"
        for name, field in DictionaryConfig.model_fields.items():
            value = getattr(self.dictionary, name)
            if name not in ("features", "centred") and value != field.default:
                raise ValueError(f"dictionary.{name} is {value!r}: {alone}")
        for name, values in self.sweep.model_dump().items():
            if values:
                raise ValueError(f"sweep.{name}: {alone}")
        if self.target.given:
            raise ValueError(f"target: {alone}")
        if self.pairs.method == "tune":
            raise ValueError("pairs.method is 'tune', which trains dictionaries: choose importance, refit or mask")
        return self


def with_method(config: RunConfig) -> RunConfig:
    """With the way to choose pairs filled in: features that are given are not tuned."""
    if config.pairs.method is not None:
        return config
    method = "tune" if config.dictionary.features is None else "importance"
    return config.model_copy(update={"pairs": config.pairs.model_copy(update={"method": method})})


def known_keys(model: type[BaseModel] = RunConfig, prefix: str = "") -> list[str]:
    """Every key of the configuration in its dotted form, e.g. `dictionary.width`."""
    keys = []
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            keys += [f"{prefix}{name}", *known_keys(kind, f"{prefix}{name}.")]
        else:
            keys.append(prefix + name)
    return keys


def build(values: dict[str, Any], where: str = "the configuration") -> RunConfig:
    """A `RunConfig` from plain values, or a `UserError` that names the first key that does not fit."""
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        raise UserError(f"{where}: {one_line(error)}") from None


def one_line(error: ValidationError) -> str:
    """The first complaint of a pydantic error, with the dotted key and the value."""
    errors = [(_key(e["loc"]), e) for e in error.errors()]
    key, first = errors[0]
    if first["type"] == "extra_forbidden":
        known = known_keys()
        last = {k.rsplit(".", 1)[-1]: k for k in reversed(known)}
        name = key.rsplit(".", 1)[-1]
        hint = f" (did you mean {last[name]!r}?)" if name in last else nearest(key, known) or nearest(name, last)
        return f"unknown key {key!r}{hint}"
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "value_error":
        return f"{key}: {message}" if key else message
    messages = dict.fromkeys(e["msg"] for other, e in errors if other == key)  # one for each type that it may be of
    return f"{key} is {first['input']!r}: {', or '.join(m[0].lower() + m[1:] for m in messages)}"


def _key(place: tuple[int | str, ...]) -> str:
    """Dotted, without the type that a value was tried as."""
    return ".".join(str(part) for part in place if not str(part).startswith(("tuple[", "literal[")))


def read_config(path: Path) -> dict[str, Any]:
    """The plain values of a YAML file, or a `UserError`."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--config {path}: {error.strerror}; name a YAML file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"--config {path}: not YAML ({str(error).splitlines()[0]})") from None
    if not isinstance(values, dict):
        raise UserError(f"--config {path}: holds {type(values).__name__}, not keys and values")
    return values
