"""What one side's features fire on: statistics and examples of each.

What is notable:
- The strongest examples, at most one a sequence, so that one odd text cannot fill a feature's list. Of equal ones that
  of the earlier document comes first, and the earlier token of a sequence.
- Examples drawn from ranges of activation, so that a reader sees what weak activations are like too. A range is an
  octave below that of the feature's largest activation, the last one holds all that is weaker. Where the largest rises,
  the ranges move with what was drawn for them, which leaves a fair sample of each.
- Histograms have fixed bins, half an octave each, so parts of a text add up.
- The first token of a sequence (BOS) counts like any other: "attend to BOS" is a feature that layers do have.

Shapes: B sequences, T positions, F features of the side (f of a block), E firings, R bins, M examples, W = 2·window + 1
tokens of a window.
"""

from __future__ import annotations

import pyarrow as pa
import torch
from torch import Tensor

from ..data.sequences import Batch
from .best import Best
from .columns import array, lists, token_lists
from .firing import NO_TOKEN, Firing, hashed, sequence_numbers, window_tokens, windows
from .token_counts import TokenCounts

POSITION_BINS = 24  # of places in a sequence, each twice as wide as the one before: 0, 1-2, 3-6 ...
HISTOGRAM_EDGES = [2.0 ** (i / 2) for i in range(-32, 33)]  # of activations; what is outside counts at the end
RANGES = 4  # octaves of activation from the largest down, from which examples are drawn; the last is open below
STRONGEST = -1  # the range of the strongest examples
TOP_TOKENS = 10
MERGED_FEATURES = 1024  # at once
SILENT = -(1 << 20)  # the octave of a feature that has not fired


class FeatureExamples:
    """Statistics, the `strongest` best examples and `drawn` from each range for the features of one side so far."""

    def __init__(self, width: int, strongest: int, drawn: int, window: int, salt: int, device: torch.device) -> None:
        self.window, self.salt = window, salt
        self.tokens = 0
        self.fired_F = torch.zeros(width, dtype=torch.int64, device=device)
        self.sum_F = torch.zeros(width, dtype=torch.float64, device=device)
        self.square_F = torch.zeros(width, dtype=torch.float64, device=device)
        self.max_F = torch.zeros(width, device=device)
        self.bin_sum_FR = torch.zeros(width, POSITION_BINS, dtype=torch.float64, device=device)
        self.bin_tokens_R = torch.zeros(POSITION_BINS, dtype=torch.float64, device=device)
        self.histogram_FR = torch.zeros(width, len(HISTOGRAM_EDGES) - 1, dtype=torch.int64, device=device)
        self.token_counts = TokenCounts(width, device)
        self.octave_F = torch.full((width,), SILENT, dtype=torch.int64, device=device)  # of the largest activation
        kept = {
            "document": ((), torch.int64),
            "position": ((), torch.int32),
            "activation": ((), torch.float32),
            "tokens": ((2 * window + 1,), torch.int32),
            "activations": ((2 * window + 1,), torch.float32),
        }
        self.strongest = Best(width, strongest, kept, device)
        self.drawn = Best(width * RANGES, drawn, kept, device)

    def add(self, batch: Batch, here: slice, acts_BTf: Tensor, firing: Firing) -> None:
        """Count one block of features of a batch: their activations, zero at padding, and where they fire."""
        length = acts_BTf.shape[1]
        feature, at = firing.feature_E, firing.token_E % length
        value = firing.value_E.double()
        self.fired_F.index_add_(0, feature, torch.ones_like(feature))
        self.sum_F.index_add_(0, feature, value)
        self.square_F.index_add_(0, feature, value.square())
        self.bin_sum_FR.view(-1).index_add_(0, feature * POSITION_BINS + _position_bin(at), value)
        bins = feature * self.histogram_FR.shape[1] + _histogram_bin(firing.value_E)
        self.histogram_FR.view(-1).index_add_(0, bins, torch.ones_like(feature))
        largest_Bf, at_Bf = acts_BTf.max(1)
        self.max_F[here] = torch.maximum(self.max_F[here], largest_Bf.amax(0))
        numbers_B = sequence_numbers(batch)
        row, offset = (largest_Bf > 0).nonzero(as_tuple=True)
        self.strongest.add(
            offset + here.start,
            largest_Bf[row, offset],
            numbers_B[row],
            lambda index: self._example(batch, here, acts_BTf, row[index], at_Bf[row, offset][index], offset[index]),
        )
        self._raise_octaves(here, _octave(self.max_F[here]))
        row, place = firing.token_E // length, self._places(batch, firing)
        self.drawn.add(
            feature * RANGES + (self.octave_F[feature] - _octave(firing.value_E)).clamp(max=RANGES - 1),
            torch.ones_like(firing.value_E),
            place,
            lambda index: self._example(batch, here, acts_BTf, row[index], at[index], feature[index] - here.start),
        )

    def add_whole(self, batch: Batch, firing: Firing) -> None:
        """Count, once for all of a batch's blocks, its tokens and on which of them features fire."""
        self.tokens += batch.n_tokens
        places = torch.arange(batch.tokens_BT.shape[1], device=batch.tokens_BT.device)
        self.bin_tokens_R.index_add_(0, _position_bin(places), batch.real_BT.double().sum(0))
        token_E = batch.tokens_BT.flatten()[firing.token_E]
        self.token_counts.add(firing.feature_E, token_E, firing.value_E, self._places(batch, firing))

    def _places(self, batch: Batch, firing: Firing) -> Tensor:
        """A hash of each firing: of its feature and its place in the text."""
        length = batch.tokens_BT.shape[1]
        number_E = sequence_numbers(batch)[firing.token_E // length]
        return hashed(number_E, firing.token_E % length, firing.feature_E * 2 + self.salt)

    def _example(
        self, batch: Batch, here: slice, acts_BTf: Tensor, row_E: Tensor, at_E: Tensor, offset_E: Tensor
    ) -> dict[str, Tensor]:
        span_EW, inside_EW = windows(batch, row_E, at_E, self.window)
        acts_EW = acts_BTf[row_E[:, None], span_EW, offset_E[:, None]].masked_fill(~inside_EW, 0)
        return {
            "document": batch.document_B[row_E],
            "position": batch.positions(row_E, at_E).int(),
            "activation": acts_EW[:, self.window],
            "tokens": window_tokens(batch, row_E, at_E, self.window),
            "activations": acts_EW,
        }

    def _raise_octaves(self, here: slice, octave_f: Tensor) -> None:
        """Move what was drawn for the features whose largest activation is in a higher octave now."""
        rise_f = octave_f - self.octave_F[here]
        moved = (rise_f > 0).nonzero()[:, 0]
        self.drawn.move(*_ranges_below(moved + here.start, rise_f[moved]))
        self.octave_F[here] = torch.maximum(self.octave_F[here], octave_f)

    def merge(self, other: FeatureExamples) -> None:
        """Take in what another gathered on other text."""
        self.tokens += other.tokens
        for name in ("fired_F", "sum_F", "square_F", "bin_sum_FR", "bin_tokens_R", "histogram_FR"):
            getattr(self, name).add_(getattr(other, name))
        self.max_F = torch.maximum(self.max_F, other.max_F)
        self.token_counts.merge(other.token_counts)
        for start in range(0, len(self.fired_F), MERGED_FEATURES):
            here = slice(start, min(start + MERGED_FEATURES, len(self.fired_F)))
            self._raise_octaves(here, other.octave_F[here])
            feature = torch.arange(here.start, here.stop, device=self.max_F.device)
            ranges, below = _ranges_below(feature, self.octave_F[here] - other.octave_F[here])
            self.strongest.merge(other.strongest, feature, feature)
            self.drawn.merge(other.drawn, ranges, below)

    def by_position(self) -> Tensor:
        """Share of an activation's variance over tokens that lies between positions, [F]."""
        mean_F = self.sum_F / max(self.tokens, 1)
        whole = self.square_F - self.tokens * mean_F.square()
        between = (self.bin_sum_FR.square() / self.bin_tokens_R.clamp(min=1)).sum(1) - self.tokens * mean_F.square()
        return (between / whole.clamp(min=1e-30)).clamp(0, 1)

    def used_tokens(self) -> set[int]:
        """The tokens that the tables hold."""
        kept = [best.take().payload["tokens"].unique() for best in (self.strongest, self.drawn)]
        used = {token for tokens in kept for token in tokens.tolist()}
        return used - {NO_TOKEN} | set(self.token_counts.top(TOP_TOKENS)[1].unique().tolist())

    def statistics(self, texts: dict[int, str]) -> dict[str, pa.Array]:
        """Columns of features.parquet, a row for each feature."""
        reached = int((self.bin_tokens_R > 0).sum())  # bins fill from the first on
        profile_FR = (self.bin_sum_FR / self.bin_tokens_R.clamp(min=1))[:, :reached]
        feature_Z, token_Z, count_Z, mean_Z = self.token_counts.top(TOP_TOKENS)
        sizes_F = torch.bincount(feature_Z, minlength=len(self.fired_F))
        return {
            "density": array(self.fired_F / max(self.tokens, 1), pa.float32()),
            "mean_activation": array(self.sum_F / self.fired_F.clamp(min=1), pa.float32()),
            "max_activation": array(self.max_F, pa.float32()),
            "live": array(self.fired_F > 0, pa.bool_()),
            "by_position": array(self.by_position(), pa.float32()),
            "positions": _rows(profile_FR, pa.float32()),
            "histogram": _rows(self.histogram_FR, pa.int64()),
            "top_tokens": lists(sizes_F, pa.array([texts[token] for token in token_Z.tolist()], pa.string())),
            "top_token_counts": lists(sizes_F, array(count_Z, pa.int64())),
            "top_token_activations": lists(sizes_F, array(mean_Z, pa.float32())),
            "token_share": array(0.5**self.token_counts.level_F, pa.float32()),
        }

    def examples(self, texts: dict[int, str]) -> dict[str, pa.Array]:
        """Columns of examples.parquet, by feature, range and rank."""
        strongest, drawn = self.strongest.take(), self.drawn.take()
        feature = torch.cat([strongest.place, drawn.place // RANGES])
        ranges = torch.cat([torch.full_like(strongest.place, STRONGEST), drawn.place % RANGES])
        order = (feature * (RANGES + 1) + ranges).argsort(stable=True)
        rank = torch.cat([strongest.rank, drawn.rank])
        got = {name: torch.cat([strongest.payload[name], drawn.payload[name]])[order].cpu() for name in drawn.payload}
        inside = got["tokens"] != NO_TOKEN
        return {
            "feature": array(feature[order], pa.int32()),
            "range": array(ranges[order], pa.int8()),
            "rank": array(rank[order], pa.int32()),
            "activation": array(got["activation"], pa.float32()),
            "document": array(got["document"], pa.int64()),
            "position": array(got["position"], pa.int32()),
            "center": array(inside[:, : self.window].sum(1), pa.int32()),
            "tokens": token_lists(got["tokens"], texts),
            "activations": lists(inside.sum(1), array(got["activations"][inside], pa.float32())),
        }


def _ranges_below(feature_U: Tensor, octaves_U: Tensor) -> tuple[Tensor, Tensor]:
    """The groups of all ranges of some features, and those so many octaves below."""
    ranges = torch.arange(RANGES, device=feature_U.device)
    below = (ranges + octaves_U[:, None]).clamp(max=RANGES - 1)
    return tuple((feature_U[:, None] * RANGES + r).flatten() for r in (ranges, below))  # type: ignore[return-value]


def _octave(acts: Tensor) -> Tensor:
    """⌊log2⌋ of activations, int64, exactly."""
    return (torch.frexp(acts).exponent.long() - 1).masked_fill(acts <= 0, SILENT)


def _histogram_bin(acts_E: Tensor) -> Tensor:
    """The bin of each activation, an octave's upper half apart from its lower, exactly."""
    mantissa, exponent = torch.frexp(acts_E)
    half_octave = 2 * (exponent.long() - 1) + (mantissa >= 0.5**0.5)
    return (half_octave + 32).clamp(0, len(HISTOGRAM_EDGES) - 2)


def _position_bin(place: Tensor) -> Tensor:
    return (place + 1).log2().long().clamp(max=POSITION_BINS - 1)


def _rows(values_FR: Tensor, kind: pa.DataType) -> pa.Array:
    """A list column whose lists are equally long."""
    sizes = torch.full((len(values_FR),), values_FR.shape[1], dtype=torch.int64)
    return lists(sizes, array(values_FR.flatten(), kind))
