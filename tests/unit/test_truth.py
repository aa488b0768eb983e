"""Scores against known roles: labels stand where the text says, and the scores are what loops give."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from layers import close, some_decomposition, some_inputs, turn_matrix
from torch import Tensor

from qkscope.attention import AttentionSite, harvest
from qkscope.config import DataConfig
from qkscope.data import Batch, Sequences
from qkscope.data.stories import NAMES, story_of, token_roles
from qkscope.decomposition import SIDES, Decomposition
from qkscope.embedded.tokenizer import make_tokenizer
from qkscope.embedded.train import new_model
from qkscope.evaluate.heads import _mass, _without, different, head_roles
from qkscope.evaluate.labels import ROLE_LABELS, Labelled, StoryLabels
from qkscope.evaluate.truth import FeatureLabels, holds, label_features, linked_edges, score_pairs, truth_scores
from qkscope.kernels.row_kl import exp
from qkscope.pairs.pair_map import with_bias
from qkscope.pattern import AttentionInputs

SPANNED = ("surname", "giver", "indirect_object", "of_two", "again_of_two", "part")
CONTEXT = 64  # shorter than most stories: a document gives several sequences


class Words:
    """As much of `StoryLabels` as the scores ask for."""

    def __init__(self, n_roles: int, n_words: int) -> None:
        self.n_words = n_words
        self.names = [*(f"role {i}" for i in range(n_roles)), *(f"w{i}" for i in range(n_words))]
        self.names += [f"after w{i}" for i in range(n_words)]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return make_tokenizer(CONTEXT)


@pytest.fixture(scope="module")
def batches(tokenizer: Any) -> list[Batch]:
    config = DataConfig(source="embedded", context=CONTEXT)
    text = Sequences(config, tokenizer, "heldout", batch_tokens=512, seed=0, repeat=False, max_tokens=2000)
    return list(text)


# Labels ----------------------------------------------------------------------------------------------


def test_labels_stand_on_the_tokens_that_the_story_says(tokenizer: Any, batches: list[Batch]) -> None:
    labels = StoryLabels(tokenizer, batches)
    checked = later = 0
    for batch in batches:
        found = labels.of(batch)
        for b in range(len(batch.tokens_BT)):
            story = story_of(int(batch.document_B[b]))
            n = int(batch.real_BT[b].sum())
            ids = tokenizer(story.text)["input_ids"][int(batch.offset_B[b]) :][: n - 1]
            assert batch.tokens_BT[b, 1:n].tolist() == ids
            names = {story.text[s.start : s.end].split()[-1] for s in story.spans if "name" in s.roles}
            here = found.roles_BTR[b, :, NAMES.index("name")]
            for t in here.nonzero()[:, 0].tolist():
                word = tokenizer.decode(ids[t - 1]).strip()
                assert any(name.endswith(word) for name in names)
                checked += 1
            assert not found.roles_BTR[b, n:].any()
            assert found.roles_BTR[b, 0].nonzero()[:, 0].tolist()[0] == NAMES.index("bos")
            later += int(batch.offset_B[b] > 0)
            for t in (found.link_BT[b] >= 0).nonzero()[:, 0].tolist():
                assert int(found.link_BT[b, t]) < t
    assert checked > 100 and later > 3


def test_links_lead_to_what_the_story_says(tokenizer: Any, batches: list[Batch]) -> None:
    """Also in a document's later pieces, whose earlier tokens are out of sight."""
    labels = StoryLabels(tokenizer, batches)
    checked = later = 0
    for batch in batches:
        found = labels.of(batch)
        for b in range(len(batch.tokens_BT)):
            story, offset = story_of(int(batch.document_B[b])), int(batch.offset_B[b])
            offsets = tokenizer(story.text, return_offsets_mapping=True)["offset_mapping"]
            ends = {span.end: span for span in story.spans}
            for t in range(1, int(batch.real_BT[b].sum())):
                span = ends.get(offsets[offset + t - 1][1])
                if span is None or span.link < 0:
                    continue
                end = story.spans[span.link].end
                wanted = next(i for i, (_, e) in enumerate(offsets) if e == end) - offset + 1
                assert int(found.link_BT[b, t]) == (wanted if wanted >= 1 else -1)
                checked, later = checked + (wanted >= 1), later + (offset > 0 and wanted >= 1)
    assert checked > 100 and later > 10


def test_before_and_after_are_the_neighbours_and_words_are_the_tokens(tokenizer: Any, batches: list[Batch]) -> None:
    labels = StoryLabels(tokenizer, batches)
    r = len(NAMES)
    several = [NAMES.index(n) for n in NAMES if "name" in n or "person" in n or n in SPANNED]
    one = [i for i in range(r) if i not in several]
    for batch in batches:
        found = labels.of(batch)
        here, before, after = found.roles_BTR[..., : 3 * r].split(r, -1)
        real = batch.real_BT
        assert torch.equal(before[:, :-1][real[:, :-1]][:, one], here[:, 1:][real[:, :-1]][:, one])
        assert torch.equal(after[:, 1:][real[:, 1:]], here[:, :-1][real[:, 1:]])
        assert not before[~real].any() and not after[~real].any()
        assert torch.equal(labels.tokens_W[found.word_BT], batch.tokens_BT)
        assert torch.equal(labels.tokens_W[found.word_before_BT][:, 1:], batch.tokens_BT[:, :-1])
    assert labels.names[: 3 * r] == ROLE_LABELS


def test_what_comes_next_is_known_where_it_begins(tokenizer: Any) -> None:
    """A title, or the first part of a long name, is where the person begins; and it leads where the name leads."""
    later = 0
    for number in range(150):
        story = story_of(number)
        offsets = tokenizer(story.text, return_offsets_mapping=True)["offset_mapping"]
        found = token_roles(story.text, story.spans, offsets)
        for span in story.spans:
            if "indirect_object" not in span.roles:
                continue
            last = next(i for i, (_, end) in enumerate(offsets) if end == span.end)
            t = last
            while not found.starts_TR[t, NAMES.index("indirect_object")]:
                t -= 1
            assert story.text[: offsets[t][0]].endswith((" to", " for"))
            assert (found.link_T[t : last + 1] == found.link_T[last]).all() and found.link_T[last] >= 0
            later += t < last
    assert later > 20


def test_two_roles_are_a_label_together_where_they_meet_often(tokenizer: Any, batches: list[Batch]) -> None:
    labels = StoryLabels(tokenizer, batches)
    found = torch.cat([labels.of(batch).roles_BTR.flatten(0, 1) for batch in batches])
    r = len(ROLE_LABELS)
    both = labels.names[r : found.shape[1]]
    assert len(labels.names) == found.shape[1] + 2 * labels.n_words and len(both) > 20
    for column, name in enumerate(both, start=r):
        own, neighbour = name.split(", ")
        assert own in NAMES and neighbour.split(" ")[0] in ("before", "after")
        one, other = (found[:, ROLE_LABELS.index(part)] for part in (own, neighbour))
        assert torch.equal(found[:, column], one & other)
        assert 30 <= int((one & other).sum()) < 0.95 * min(int(one.sum()), int(other.sum()))
    # ... and no such pair is left out.
    counts = [(int((found[:, a] & found[:, b]).sum()), int(found[:, a].sum()), int(found[:, b].sum()))
              for a in range(len(NAMES)) for b in range(len(NAMES), r)]  # fmt: skip
    assert len(both) == sum(n >= 30 and n < 0.95 * min(x, y) for n, x, y in counts)


# Features --------------------------------------------------------------------------------------------


class Coordinates:
    """A dictionary whose features are the coordinates of x."""

    def encode(self, x: Tensor) -> Tensor:
        return x.relu()


def labelled_text(seed: int, sequences: int = 40, length: int = 20, roles: int = 3) -> tuple[Tensor, Labelled, Tensor]:
    g = torch.Generator().manual_seed(seed)
    role = torch.rand(sequences, length, roles, generator=g) < 0.3
    word = torch.randint(5, (sequences, length), generator=g)
    before = torch.cat([word[:, :1], word[:, :-1]], 1)
    real = torch.ones(sequences, length, dtype=torch.bool)
    real[::3, 15:] = False
    role &= real[..., None]
    noise = torch.rand(sequences, length, generator=g)
    x = torch.stack([role[..., 1].float(), (word == 3) * (0.2 + noise), (before == 2).float(), noise, 0 * noise], -1)
    # Active by little where its role is not: a feature that is on from its level only.
    x[..., 0] += 0.1 * noise
    return x, Labelled(role, word, before, torch.full_like(word, -1)), real


def some_text(seed: int) -> list[tuple[AttentionInputs, Labelled]]:
    x, labelled, real = labelled_text(seed)
    inputs = AttentionInputs(x, x, x, None, real)  # type: ignore[arg-type]
    return [(inputs, labelled)]


def test_features_get_the_label_they_follow() -> None:
    text = some_text(0)
    found = label_features(Coordinates(), [text[0][0]], text, Words(3, 5))  # type: ignore[arg-type]
    names = Words(3, 5).names
    assert [names[i] for i in found.label_F[:3].tolist()] == ["role 1", "w3", "after w2"]
    assert found.label_F[4] == -1  # it never fires
    close(found.f1_F[:3].double(), torch.ones(3).double())
    assert float(found.level_F[0]) > 0.1  # what is below is not counted
    assert float(found.f1_F[3]) < 0.5
    summary = found.summary()
    assert summary["live"] == 4 and summary["named"] == 0.75


def test_figures_are_those_of_the_half_the_label_was_not_chosen_on() -> None:
    """Sequences by turns: a feature that follows a role in the even ones only has nothing left in the odd ones."""
    text = some_text(1)
    inputs, labelled = text[0]
    x = inputs.x_BTD.clone()
    x[1::2, :, 0] = (~labelled.roles_BTR[1::2, :, 1]).float()
    inputs = AttentionInputs(x, x, x, None, inputs.real_BT)  # type: ignore[arg-type]
    found = label_features(Coordinates(), [inputs], [(inputs, labelled)], Words(3, 5))  # type: ignore[arg-type]
    assert found.label_F[0] == 1 and float(found.f1_F[0]) == 0


def test_precision_recall_and_f1_are_counted_by_hand() -> None:
    text = some_text(2)
    inputs, labelled = text[0]
    found = label_features(Coordinates(), [inputs], text, Words(3, 5))  # type: ignore[arg-type]
    label, level = int(found.label_F[3]), float(found.level_F[3])
    hit = on = there = 0
    for b in range(1, len(inputs.real_BT), 2):
        for t in range(inputs.real_BT.shape[1]):
            if not inputs.real_BT[b, t]:
                continue
            column = [*labelled.roles_BTR[b, t].tolist(), *[False] * 10]
            column[3 + int(labelled.word_BT[b, t])] = True
            column[8 + int(labelled.word_before_BT[b, t])] = True
            fires = float(inputs.x_BTD[b, t, 3]) > level
            hit, on, there = hit + (fires and column[label]), on + fires, there + column[label]
    assert float(found.precision_F[3]) == pytest.approx(hit / on)
    assert float(found.recall_F[3]) == pytest.approx(hit / there)
    assert float(found.f1_F[3]) == pytest.approx(2 * hit / (on + there))


def test_holds_knows_roles_words_and_what_came_before() -> None:
    _, labelled, _ = labelled_text(3)
    label = torch.tensor([1, 3 + 4, 3 + 5 + 2, -1])
    zero = torch.zeros(4)
    found = holds(FeatureLabels(label, zero, zero, zero, zero), labelled, n_words=5)
    assert torch.equal(found[..., 0], labelled.roles_BTR[..., 1])
    assert torch.equal(found[..., 1], labelled.word_BT == 4)
    assert torch.equal(found[..., 2], labelled.word_before_BT == 2)
    assert not found[..., 3].any() and found[..., 4].all()


# Pairs -----------------------------------------------------------------------------------------------


def random_labels(inputs: AttentionInputs, dec: Decomposition) -> tuple[Labelled, dict[str, FeatureLabels]]:
    g = torch.Generator().manual_seed(5)
    shape = inputs.real_BT.shape
    role = torch.rand(*shape, 3, generator=g) < 0.5
    word = torch.randint(5, shape, generator=g)
    place = torch.arange(shape[1])
    link = (torch.randint(-1, shape[1], shape, generator=g)).minimum(place - 1)
    labelled = Labelled(role, word, word, link)
    found = {}
    for side, width in zip(SIDES, (dec.query.width, dec.key.width), strict=True):
        zero = torch.zeros(width)
        found[side] = FeatureLabels(torch.randint(-1, 13, (width,), generator=g), zero, zero, zero, zero)
    return labelled, found


@pytest.mark.parametrize("options", [{}, {"rotary": "half"}, {"rotary": "partial", "padding": True}, {"sink": True}])
def test_pair_shares_are_the_loop_over_queries_keys_and_pairs(options: dict[str, Any]) -> None:
    inputs = some_inputs(70, length=5, heads=2, groups=1, **options)
    dec = some_decomposition(inputs, widths=(4, 3))
    labelled, found = random_labels(inputs, dec)
    words: Any = Words(3, 5)
    scores = score_pairs(dec, dec.pairs, dec.strength_P, found, [(inputs, labelled)], words)
    link = labelled.link_BT.tolist()
    q_holds, k_holds = (holds(found[s], labelled, 5) for s in SIDES)
    acts_q, acts_k = (with_bias(t.encode(inputs.x_BTD)).detach().double() for t in (dec.query, dec.key))
    left = torch.cat([dec.query.W_dec, dec.query.b_out[None]]).unflatten(1, (2, -1)).detach().double()
    right = torch.cat([dec.key.W_dec, dec.key.b_out[None]]).unflatten(1, (1, -1)).detach().double()
    pattern = exp(inputs.log_pattern_BNQK)[..., :5].double()
    rotary, count = inputs.rule.rotary, int(inputs.real_BT[1].sum())
    for part in (scores.matching_P, scores.linked_P):
        assert float(part.max()) > 0 and len(set(part.tolist())) > 3
    for p in range(len(dec.pairs)):
        a, c, n = (int(x[p]) for x in (dec.pairs.query_P, dec.pairs.key_P, dec.pairs.head_P))
        variance = total = matched = linked = 0.0
        for b in (1,):  # labels are chosen on the sequences of even number
            turns = [turn_matrix(rotary, b, t, left.shape[-1]) for t in range(5)]
            for i in range(5):
                if not inputs.real_BT[b, i]:
                    continue
                delta = []
                for j in range(5):
                    m = 1.0 if rotary is None else float((turns[i] @ left[a, n]) @ (turns[j] @ right[c, 0]))
                    on = float(acts_q[b, i, a] * acts_k[b, j, c]) * bool(inputs.real_BT[b, j])
                    delta.append(float(dec.strength_P[p]) * inputs.rule.scaling * m * on)
                mean = sum(float(pattern[b, n, i, j]) * delta[j] for j in range(5))
                for j in range(5):
                    part = float(pattern[b, n, i, j]) * delta[j] * (delta[j] - mean)
                    total += part
                    matched += part * bool(q_holds[b, i, a] and k_holds[b, j, c])
                    linked += part * (link[b][i] == j or (i + 1 < 5 and link[b][i + 1] == j))
                    variance += float(pattern[b, n, i, j]) * (delta[j] - mean) ** 2
                variance += (1 - float(pattern[b, n, i].sum())) * mean**2  # the sink, where there is one
        assert total == pytest.approx(variance)
        assert float(scores.importance_P[p]) == pytest.approx(total / (2 * count), rel=1e-4, abs=1e-7)
        assert float(scores.matching_P[p]) == pytest.approx(matched / (2 * count), rel=1e-3, abs=1e-6)
        assert float(scores.linked_P[p]) == pytest.approx(linked / (2 * count), rel=1e-3, abs=1e-6)


def test_links_run_from_the_token_that_answers_and_from_the_one_before_it() -> None:
    edges = linked_edges(torch.tensor([[-1, -1, 0, -1], [-1, 0, -1, 2]]))
    assert edges.nonzero().tolist() == [[0, 1, 0], [0, 2, 0], [1, 0, 0], [1, 1, 0], [1, 2, 2], [1, 3, 2]]


# The whole of it -------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["stories-gpt2", "stories-llama"])
def site(request: Any, tokenizer: Any) -> AttentionSite:
    torch.manual_seed(0)
    return AttentionSite(new_model(request.param, tokenizer).eval().requires_grad_(False), tokenizer, layer=1)


def seen(site: AttentionSite, batches: Sequence[Batch]) -> tuple[StoryLabels, list[tuple[AttentionInputs, Labelled]]]:
    labels = StoryLabels(site.tokenizer, batches)
    return labels, [(harvest([site], b.tokens_BT, b.real_BT)[0], labels.of(b)) for b in batches]


def test_every_control_gets_the_same_scores(site: AttentionSite, batches: list[Batch]) -> None:
    labels, text = seen(site, batches[:2])
    inputs = text[0][0]
    dec = some_decomposition(inputs, share=0.05, widths=(12, 10))
    summary, details = truth_scores(dec, [inputs], text, labels, {"query": 3.0, "key": 3.0})
    assert list(summary) == ["decomposition", "shuffled", "random", "svd", "residual"]
    for name, scores in summary.items():
        assert all(-0.1 <= scores["pairs"][share] <= 1.1 for share in ("matching", "linked", "mostly_linked"))
        for side in SIDES if name != "shuffled" else ():
            assert {"live", "f1_mean", "f1_median", "named", "f1_by_importance"} == set(scores[side])
            assert 0 <= scores[side]["f1_mean"] <= 1
    assert [len(details["features"][s]) for s in SIDES] == [12, 10]
    alone, _ = truth_scores(dec, [inputs], text, labels, {"query": 3.0, "key": 3.0}, with_controls=False)
    assert alone == {"decomposition": summary["decomposition"]}
    worth = [p["importance"] for p in details["pairs"]]
    assert len(worth) == len(dec.pairs) and worth == sorted(worth, reverse=True)


def test_heads_are_known_by_what_the_loss_gains_without_their_attention(
    site: AttentionSite, batches: list[Batch]
) -> None:
    _, text = seen(site, batches[:1])
    tables = head_roles(site, [(batches[0], *text[0])])
    assert [t["head"] for t in tables] == list(range(8))
    for table in tables:
        rows = table["role_pairs"]
        assert rows and all(0 <= r["uniform"] < r["attention"] <= 1 for r in rows)
        gains = [r["ce_increase"]["mean"] for r in rows]
        assert gains == sorted(gains, reverse=True)
    inputs, labelled = text[0]
    query, key = ROLE_LABELS.index("name"), ROLE_LABELS.index("after sentence_end")
    pattern, without = exp(inputs.log_pattern_BNQK), _without(labelled, 2, query, key)(inputs)
    banned = labelled.roles_BTR[..., query][:, :, None] & labelled.roles_BTR[..., key][:, None]
    assert banned.any() and not without[:, 2][banned].any()
    others = [n for n in range(8) if n != 2]
    assert torch.equal(without[:, others], pattern[:, others])
    rows = banned.any(-1) & batches[0].real_BT
    close(without[:, 2].sum(-1)[rows].double(), torch.ones(int(rows.sum())).double())
    kept = pattern[:, 2].masked_fill(banned, 0)
    close(without[:, 2][rows], (kept / kept.sum(-1, keepdim=True))[rows], 1e-5)


def test_role_pairs_that_say_the_same_are_tried_once() -> None:
    above = torch.tensor([[5.0, 4.0, 1.0], [3.0, 0.0, 2.0], [0.0, 0.0, 0.0]])
    alike = torch.eye(3, dtype=torch.bool)
    assert different(above, alike, 3) == [(0, 0), (0, 1), (1, 0)]
    alike[0, 1] = alike[1, 0] = True  # labels 0 and 1 are nearly the same tokens
    assert different(above, alike, 3) == [(0, 0), (1, 2), (2, 0)]


def test_what_a_row_may_not_attend_to_goes_to_its_rest_and_a_sink_keeps_its_own() -> None:
    inputs = some_inputs(3, length=5, sink=True)
    role = torch.zeros(*inputs.real_BT.shape, len(ROLE_LABELS), dtype=torch.bool)
    role[:, 3, 0] = role[:, 1:3, 1] = True  # from position 3 to 1 and 2
    role[:, 2, 2] = role[:, 4, 3] = True  # from position 2 to what it cannot see
    nothing = torch.zeros(inputs.real_BT.shape, dtype=torch.int64)
    labelled = Labelled(role & inputs.real_BT[..., None], nothing, nothing, nothing)
    pattern = exp(inputs.log_pattern_BNQK)
    without = _without(labelled, 1, 0, 1)(inputs)
    others = [row for row in range(5) if row != 3]
    assert torch.equal(without[:, 0], pattern[:, 0]) and torch.equal(without[:, 1, others], pattern[:, 1, others])
    row, before = without[0, 1, 3], pattern[0, 1, 3]
    assert float(row[1]) == float(row[2]) == 0
    close(row[:5].sum(), before[:5].sum(), 1e-6)  # the sink's column is left alone
    close(row[5:], before[5:], 1e-6)
    close(row[0] / row[3], before[0] / before[3], 1e-5)
    assert torch.equal(_without(labelled, 1, 2, 3)(inputs), pattern)


def test_a_row_without_a_rest_is_spread_and_one_without_another_key_is_left(
    site: AttentionSite, batches: list[Batch]
) -> None:
    _, text = seen(site, batches[:1])
    inputs, labelled = text[0]
    all_labels = Labelled(torch.ones_like(labelled.roles_BTR), *(labelled.word_BT,) * 3)
    pattern = exp(inputs.log_pattern_BNQK)
    assert torch.equal(_without(all_labels, 0, 0, 0)(inputs), pattern)  # there is nothing else
    first = torch.zeros_like(labelled.roles_BTR)
    first[:, :, 0] = True
    first[:, :2, 1] = True
    length = inputs.real_BT.shape[1]
    log_pattern = torch.full_like(inputs.log_pattern_BNQK, -torch.inf)
    log_pattern[..., 0] = 0  # all attention on the first position
    fixed = SimpleNamespace(log_pattern_BNQK=log_pattern, rule=inputs.rule, real_BT=inputs.real_BT)
    without = _without(Labelled(first, *(labelled.word_BT,) * 3), 2, 0, 1)(fixed)  # type: ignore[arg-type]
    assert torch.equal(without[:, 2, :2], exp(log_pattern)[:, 2, :2])
    real = int(inputs.real_BT[0].sum())
    for i in range(2, real):
        wanted = torch.zeros(length).scatter(0, torch.arange(2, i + 1), 1 / (i - 1))
        close(without[0, 2, i, :length], wanted, 1e-6)


def test_attention_between_labels_is_the_loop_over_queries_and_keys() -> None:
    inputs = some_inputs(4, length=4, padding=True)
    g = torch.Generator().manual_seed(0)
    role = torch.rand(*inputs.real_BT.shape, len(ROLE_LABELS), generator=g) < 0.3
    role &= inputs.real_BT[..., None]
    nothing = torch.zeros(inputs.real_BT.shape, dtype=torch.int64)
    found = _mass(inputs, Labelled(role, nothing, nothing, nothing))
    pattern = exp(inputs.log_pattern_BNQK)
    for query, key in ((0, 1), (1, 0), (2, 2), (5, 3)):
        own = even = 0.0
        for b in range(len(role)):
            for i in range(4):
                for j in range(i + 1):
                    if inputs.real_BT[b, i] and role[b, i, query] and role[b, j, key]:
                        own += float(pattern[b, 1, i, j])
                        even += 1 / int(inputs.rule.visible_BQK[b % len(inputs.rule.visible_BQK), i].sum())
        assert float(found[0, 1, query, key]) == pytest.approx(own, rel=1e-5)
        assert float(found[1, 1, query, key]) == pytest.approx(even, rel=1e-5)


def test_what_opens_a_sequence_need_not_be_bos(tokenizer: Any, batches: list[Batch]) -> None:
    labels = StoryLabels(tokenizer, batches)
    tokens = batches[0].tokens_BT.clone()
    tokens[:, 0] = tokens[0, 5]  # as a CLS token is
    other = labels.of(replace(batches[0], tokens_BT=tokens))
    assert torch.equal(other.roles_BTR, labels.of(batches[0]).roles_BTR)
