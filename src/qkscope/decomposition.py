"""The decomposition: the artefact of one layer, on disk and applied.

    config.yaml                     one folder up: the resolved run, versions, and each layer's shape
    dictionaries.safetensors        both transcoders
    pairs.parquet                   kept pairs, strongest first

Reading needs no model. Every file is written under a temporary name and put in place in one step.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml
from pydantic import ValidationError
from torch import Tensor

from .config import RunConfig, build, one_line
from .dictionary import SparseTranscoder
from .errors import UserError
from .files import read_tensors, write_atomic, write_tensors
from .norm import Norm
from .pairs.active import Active
from .pairs.pair_map import Pairs, active_scores_by_head, rows
from .pattern import AttentionInputs, HeadPatterns, HeadSource, PatternSource, patterns_of
from .residual import Reading, ResidualTranscoder

if TYPE_CHECKING:
    from .explain.trace import Trace

SIDES = ("query", "key")
TENSORS = ("W_enc", "b_enc", "b_in", "W_dec", "b_out", "threshold")
PAIR_COLUMNS = {
    "query_feature": pa.int32(),
    "key_feature": pa.int32(),
    "head": pa.int16(),
    "strength": pa.float32(),
    "weight_strength": pa.float32(),
    "importance": pa.float32(),
    "rank": pa.int32(),
}


@dataclass(frozen=True)
class SiteShape:
    """Widths of a layer: residual D, query heads N, key-value heads G, head H; whether it has a rotary embedding; how
    features read the residual stream that were given rather than trained."""

    D: int
    N: int
    G: int
    H: int
    rotary: bool
    reads: Reading | None = None


@dataclass
class Decomposition:
    """Two dictionaries and the pairs kept between them."""

    layer: int
    shape: SiteShape
    query: SparseTranscoder
    key: SparseTranscoder
    pairs: Pairs
    strength_P: Tensor
    """What multiplies a_q·a_k before the scale; with a rotary embedding, a factor on M(i-j)."""
    weight_strength_P: Tensor
    """⟨W_dec_q, W_dec_k⟩ (at distance 0 with a rotary embedding)."""
    importance_P: Tensor
    """Nats of pattern KL a query row, to second order."""
    config: RunConfig
    folder: Path | None = None

    @property
    def residual(self) -> bool:
        """Whether it reads the residual stream, before the layer's norm, and not the attention's input."""
        return self.query.input_norm is not None

    @property
    def width_trained(self) -> dict[str, int]:
        """Features a side before tune dropped any."""
        if self.shape.reads is not None:
            return {"query": self.query.width, "key": self.key.width}
        return {"query": self.config.dictionary.width, "key": self.config.dictionary.key_width}

    # Applying

    def pattern_source(self, pairs: str = "kept") -> PatternSource:
        """The pattern for what an attention saw: "kept" by the pruned map, "all" by the transcoders."""
        by_head = self.head_source(pairs)
        return lambda inputs: by_head(inputs)(slice(0, self.shape.N))

    def head_source(self, pairs: str = "kept") -> HeadSource:
        """`pattern_source` some heads at a time, for long contexts."""
        if pairs not in ("kept", "all"):
            raise UserError(f"pairs={pairs!r}: choose 'kept' or 'all'")
        log_pattern = self.kept_by_head if pairs == "kept" else self.all_by_head
        return lambda inputs: patterns_of(log_pattern(inputs))

    def log_pattern_all(self, inputs: AttentionInputs) -> Tensor:
        """Log-pattern of the reconstructed queries and keys, [B, N, Q, K]."""
        return self.all_by_head(inputs)(slice(0, self.shape.N))

    def log_pattern_kept(self, inputs: AttentionInputs) -> Tensor:
        """Log-pattern of the pruned map, [B, N, Q, K]."""
        return self.kept_by_head(inputs)(slice(0, self.shape.N))

    def scores(self, inputs: AttentionInputs, pairs: Pairs | None = None, strength_P: Tensor | None = None) -> Tensor:
        """Capped scores of the kept pairs (or of others), [B, N, Q, K], before the mask."""
        return self.scores_by_head(inputs, pairs, strength_P)(slice(0, self.shape.N))

    @torch.no_grad()
    def all_by_head(self, inputs: AttentionInputs) -> HeadPatterns:
        """`log_pattern_all` some heads at a time."""
        x = self.x_of(inputs)
        q, k = self.query(x).view(inputs.q_BTNH.shape), self.key(x).view(inputs.k_BTGH.shape)
        return torch.no_grad()(inputs.rule.log_pattern_by_head(q, k))

    def kept_by_head(
        self, inputs: AttentionInputs, pairs: Pairs | None = None, strength_P: Tensor | None = None
    ) -> HeadPatterns:
        """`log_pattern_kept` (or that of other pairs) some heads at a time."""
        scores = self.scores_by_head(inputs, pairs, strength_P)
        return torch.no_grad()(lambda heads: inputs.rule.of_heads(heads).masked(scores(heads)).log_softmax(-1))

    @torch.no_grad()
    def scores_by_head(
        self, inputs: AttentionInputs, pairs: Pairs | None = None, strength_P: Tensor | None = None
    ) -> HeadPatterns:
        """`scores` some heads at a time."""
        x, pairs = self.x_of(inputs), self.pairs if pairs is None else pairs
        every_BT = torch.ones_like(inputs.real_BT)  # scores of padding too: what becomes of them is the mask's to say
        queries = Active.read(self.query, x.flatten(0, 1), every_BT, pairs.queries)
        keys = Active.read(self.key, x.flatten(0, 1), every_BT, pairs.keys)
        found = active_scores_by_head(
            pairs,
            self.strength_P if strength_P is None else strength_P,
            queries,
            keys,
            lambda: (rows(self.query, self.shape.N), rows(self.key, self.shape.G)),
            inputs.rule,
        )
        return torch.no_grad()(found)

    def trace(self, site: Any, prompt: str, head: int = 0) -> Trace:
        """One prompt in this layer: its patterns, and the pairs behind them (see explain/trace.py)."""
        from .explain.trace import trace  # a convenience that reaches up; nothing here depends on it

        return trace(self, site, prompt, head)

    def x_of(self, inputs: AttentionInputs) -> Tensor:
        """What the dictionaries read of what an attention saw, float32 [B, T, D]; `UserError` where it is not there."""
        if inputs.residual != self.residual:  # of the same width, so that nothing else would tell
            wanted = "the residual stream" if self.residual else "the attention's input"
            raise UserError(
                f"this decomposition of layer {self.layer} reads {wanted}, which the site does not hand over; "
                f"open it as AttentionSite(..., residual={self.residual})"
            )
        return inputs.x_BTD.float()

    def to(self, device: str | torch.device) -> Decomposition:
        self.query.to(device)
        self.key.to(device)
        for name in ("strength_P", "weight_strength_P", "importance_P"):
            setattr(self, name, getattr(self, name).to(device))
        p = self.pairs
        self.pairs = Pairs(p.query_P.to(device), p.key_P.to(device), p.head_P.to(device), p.n_query, p.n_key, p.n_heads)
        return self

    @property
    def report(self) -> dict[str, Any]:
        """What the run measured (report.json)."""
        path = (self.folder or Path()) / "report.json"
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"{path} cannot be read ({error}); qkscope evaluate writes it") from None

    # Reading and writing

    def save(self, folder: Path) -> None:
        """Write dictionaries.safetensors and pairs.parquet."""
        save_transcoders(folder / "dictionaries.safetensors", self.query, self.key)
        table = self.pair_table()
        write_atomic(folder / "pairs.parquet", lambda path: pq.write_table(table, path))
        self.folder = folder

    def pair_table(self) -> pa.Table:
        """Kept pairs by falling importance; -1 is a side's bias."""
        order = self.importance_P.argsort(descending=True, stable=True)
        query, key = self.pairs.query_P[order], self.pairs.key_P[order]
        columns = {
            "query_feature": query.where(query < self.pairs.n_query, -1),
            "key_feature": key.where(key < self.pairs.n_key, -1),
            "head": self.pairs.head_P[order],
            "strength": self.strength_P[order],
            "weight_strength": self.weight_strength_P[order],
            "importance": self.importance_P[order],
            "rank": torch.arange(len(order)),
        }
        return pa.table({name: pa.array(columns[name].cpu().numpy()).cast(kind) for name, kind in PAIR_COLUMNS.items()})

    @classmethod
    def load(cls, folder: str | Path) -> Decomposition:
        """Read one layer's artefact, e.g. `runs/gpt2/layer_10`; anything missing, cut short or misshapen is refused."""
        folder = Path(folder)
        layer, config, shape = _read_site(folder)
        narrowed = config.pairs.method == "tune"
        query, key = load_transcoders(folder / "dictionaries.safetensors", config, shape, narrowed=narrowed)
        pairs, table = _read_pairs(folder / "pairs.parquet", query.width, key.width, shape)
        return cls(layer, shape, query, key, pairs, *table, config, folder)


def save_transcoders(path: Path, query: SparseTranscoder, key: SparseTranscoder) -> None:
    """Both dictionaries in one safetensors file, thresholds on the plain norm."""
    tensors = {}
    for side, transcoder in zip(SIDES, (query, key), strict=True):
        tensors |= {f"{side}.{name}": getattr(transcoder, name) for name in TENSORS}
        tensors[f"{side}.threshold"] = transcoder.plain_threshold()
    if query.input_norm is not None:
        tensors |= {"norm.weight": query.input_norm.weight, "norm.bias": query.input_norm.bias}
    write_tensors(path, tensors)


def load_transcoders(
    path: Path, config: RunConfig, shape: SiteShape, *, narrowed: bool = False
) -> tuple[SparseTranscoder, SparseTranscoder]:
    """What `save_transcoders` wrote; a file that is missing, cut short or misshapen is a `UserError`.

    `narrowed`: fewer features than config.yaml says are right: tune drops those that no pair names.
    """
    tensors, _ = read_tensors(path)
    query, key = (_transcoder(tensors, side, path, config, shape, narrowed) for side in SIDES)
    return query, key


def read_run(folder: Path) -> dict[str, Any]:
    """The plain values of a run's config.yaml."""
    path = folder / "config.yaml"
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError:
        raise UserError(f"{path} is missing; {folder} is not a qkscope run") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is damaged ({str(error).splitlines()[0]})") from None
    if not isinstance(values, dict) or not isinstance(values.get("run"), dict):
        raise UserError(f"{path} is damaged (no 'run' in it)")
    return values


def _read_site(folder: Path) -> tuple[int, RunConfig, SiteShape]:
    if not folder.is_dir():
        raise UserError(f"{folder} does not exist; name a run's layer folder, e.g. runs/gpt2/layer_10")
    values = read_run(folder.parent)
    name = folder.resolve().name
    config = build(values["run"], str(folder.parent / "config.yaml"))
    try:
        layer = int(name.removeprefix("layer_"))
        site = dict(values["sites"][layer])
        reads = site.pop("reads", None)
        shape = SiteShape(**site, reads=None if reads is None else Reading.model_validate(reads))
    except ValidationError as error:
        raise UserError(f"{folder.parent / 'config.yaml'}: layer {layer}: reads: {one_line(error)}") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{folder.parent / 'config.yaml'} says nothing of {name}") from None
    return layer, config, shape


def _transcoder(
    tensors: dict[str, Tensor], side: str, path: Path, config: RunConfig, shape: SiteShape, narrowed: bool
) -> SparseTranscoder:
    query = side == "query"
    reads = shape.reads
    trained = width = config.dictionary.width if query else config.dictionary.key_width
    if reads is not None:
        trained = width = reads.width
    found = tensors.get(f"{side}.W_enc")
    if narrowed and found is not None and found.ndim == 2:
        width = max(min(trained, found.shape[1]), 1)
    asking = "config.yaml asks" if width == trained else f"config.yaml and {side}.W_enc ask"
    out = (shape.N if query else shape.G) * shape.H
    wanted = {
        "W_enc": (shape.D, width),
        "b_enc": (width,),
        "b_in": (shape.D,),
        "W_dec": (width, out),
        "b_out": (out,),
        "threshold": (width,),
    }
    wanted = {f"{side}.{name}": size for name, size in wanted.items()}
    if reads is not None:
        wanted |= {"norm.weight": (shape.D,), "norm.bias": (shape.D,)}
    for name, size in wanted.items():
        tensor = tensors.get(name)
        if tensor is None:
            raise UserError(f"{path} has no {name}")
        if tuple(tensor.shape) != size:
            raise UserError(f"{path}: {name} has shape {tuple(tensor.shape)}, {asking} for {size}")
        if not tensor.is_floating_point():
            raise UserError(f"{path}: {name} holds {str(tensor.dtype).removeprefix('torch.')}, not float32")
        if bool(tensor.isnan().any()):
            raise UserError(f"{path}: {name} holds NaN")
    if reads is not None:
        norm = Norm(reads.norm, tensors["norm.weight"], tensors["norm.bias"], reads.eps)
        transcoder: SparseTranscoder = ResidualTranscoder(shape.D, out, reads, norm)
    else:
        assert config.dictionary.activation is not None
        k = config.dictionary.k if query else config.dictionary.key_k
        transcoder = SparseTranscoder(shape.D, width, out, config.dictionary.activation, k)
    with torch.no_grad():
        for name in TENSORS:
            getattr(transcoder, name).copy_(tensors[f"{side}.{name}"])
    return transcoder.eval().requires_grad_(False)


def _read_pairs(path: Path, n_query: int, n_key: int, shape: SiteShape) -> tuple[Pairs, tuple[Tensor, Tensor, Tensor]]:
    try:
        table = pq.read_table(path)
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path} is damaged ({str(error).splitlines()[0][:120]})") from None
    for name, kind in PAIR_COLUMNS.items():
        if name not in table.column_names or table.schema.field(name).type != kind:
            raise UserError(f"{path} has no column {name} of type {kind}")
        if table[name].null_count:
            raise UserError(f"{path}: column {name} has missing values")
    query, key, head = (torch.from_numpy(table[n].to_numpy().copy()).long() for n in list(PAIR_COLUMNS)[:3])
    inside = (query >= -1) & (query < n_query) & (key >= -1) & (key < n_key) & (head >= 0) & (head < shape.N)
    if not bool(inside.all()):
        row = int((~inside).nonzero()[0])
        raise UserError(f"{path}: row {row} names a feature or head that the dictionaries do not have")
    query, key = query.where(query >= 0, torch.tensor(n_query)), key.where(key >= 0, torch.tensor(n_key))
    order = ((head * (n_query + 1) + query) * (n_key + 1) + key).argsort()
    strength, weight, importance = (
        torch.from_numpy(table[n].to_numpy().copy())[order] for n in list(PAIR_COLUMNS)[3:6]
    )
    return Pairs(query[order], key[order], head[order], n_query, n_key, shape.N), (strength, weight, importance)
