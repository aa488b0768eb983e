"""The ways in which public code went silently wrong (METHOD, last section), one test each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from layers import (
    LAYERS,
    OFF,
    close,
    doubled,
    job_for,
    map_scores,
    pairs_of,
    some_decomposition,
    some_dictionary,
    some_inputs,
    some_sides,
)
from test_loop import OneNumber, fit, source
from texts import BOS, documents_of, rows_of, stream, take
from tiny import VOCABULARY, tiny_model
from torch import Tensor
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask

from qkscope.attention import AttentionSite, harvest, open_sites
from qkscope.config import RunConfig
from qkscope.data.documents import split_of
from qkscope.decomposition import Decomposition, SiteShape
from qkscope.dictionary import SparseTranscoder
from qkscope.evaluate import layer
from qkscope.evaluate import run as evaluation
from qkscope.evaluate import text as evaluation_text
from qkscope.evaluate.controls import svd_dictionaries
from qkscope.pairs.importance import see
from qkscope.pairs.mask import MaskJob
from qkscope.pairs.tune import MapJob
from qkscope.progress import Reporter
from qkscope.routing import IMPLEMENTATION
from qkscope.run_folder import write_config
from qkscope.training.objective import PatternTarget
from qkscope.training.start import side_statistics, start


@pytest.mark.parametrize("name", ["causal", "sliding", "half-split", "softcap", "sink"])
def test_1_no_row_learns_from_a_masked_key(name: str) -> None:
    """The loss of one row has a gradient of exactly zero in every key it cannot see, in both steps' kernels."""
    inputs = some_inputs(111, **LAYERS[name])
    row = 3
    hidden = ~inputs.rule.visible_BQK[0, row]
    assert hidden.sum() >= 3
    target = PatternTarget(inputs)
    target.__dict__["weight_BQ"] = torch.zeros(2, 7).index_fill(1, torch.tensor(row), 1.0)
    k = torch.randn_like(inputs.k_BTGH).requires_grad_()
    target.kl(torch.randn_like(inputs.q_BTNH), k)[0].backward()
    assert k.grad is not None and torch.all(k.grad[:, hidden] == 0) and k.grad[:, ~hidden].abs().max() > 1e-3
    scores = torch.randn(2, 4, 7, 7).mul(1e4).requires_grad_()  # larger than any finite fill
    target.mean(target.kl_rows(scores)).backward()
    assert scores.grad is not None and torch.all(scores.grad[:, :, row, hidden] == 0) and scores.grad.any()


def test_2_both_steps_encode_the_input_of_the_attention_module(monkeypatch: pytest.MonkeyPatch) -> None:
    """The residual is as wide as all heads together, so that another tensor would fit too."""
    inputs = some_inputs(112, d=16, groups=4)
    assert inputs.x_BTD.shape == inputs.q_BTNH.flatten(2).shape == inputs.k_BTGH.flatten(2).shape
    seen: list[Tensor] = []
    pre = SparseTranscoder.pre
    monkeypatch.setattr(SparseTranscoder, "pre", lambda self, x: (seen.append(x.detach()), pre(self, x))[1])
    dec, target = some_decomposition(inputs), PatternTarget(inputs)
    sides, live = some_sides(inputs), (torch.arange(10), torch.arange(9))
    step1 = job_for(inputs)
    uses = {
        "step 1": lambda: step1.loss(target, OFF),
        "tune": lambda: MapJob(0, "", *sides, dec.pairs, dictionary_rate=1.0, strength_rate=1.0).loss(target, OFF),
        "mask": lambda: MaskJob(0, "", *sides, live, 4, sparsity=0.0, rate=1.0).loss(target, OFF),
        "importance": lambda: see(inputs, *sides),
        "transcoders": lambda: dec.log_pattern_all(inputs),
        "pruned map": lambda: dec.log_pattern_kept(inputs),
    }
    for name, use in uses.items():
        seen.clear()
        use()
        assert len(seen) == 2, name  # once a side
        assert all(torch.equal(x.reshape(-1, 16), inputs.x_BTD.reshape(-1, 16)) for x in seen), name
    assert torch.equal(side_statistics([inputs])["key"].x_nD, inputs.x_BTD.reshape(-1, 16))


@pytest.mark.parametrize("name", ["gpt2", "gpt2:unscaled", "granite", "gemma2", "opt"])
def test_3_the_scale_of_the_map_is_the_models_own(name: str) -> None:
    """Dictionaries that are exact give, through every pair, the pattern that the model itself reports."""
    model: Any = tiny_model(name)
    site = AttentionSite(model, None, layer=1)
    tokens = torch.randint(3, VOCABULARY, (12, 20), generator=torch.Generator().manual_seed(0))
    inputs = harvest([site], tokens, tokens > 0)[0]
    own = site._own_pattern(tokens, tokens > 0)
    dec = some_decomposition(inputs)
    sides = svd_dictionaries(dec, side_statistics([inputs]), {"query": 1e4, "key": 1e4})
    dec.query, dec.key = sides["query"].eval(), sides["key"].eval()
    close(dec.log_pattern_all(inputs).exp(), own, 1e-2)
    scores = map_scores(inputs, (dec.query, dec.key), pairs_of(inputs, (dec.query, dec.key)))
    close(inputs.rule.masked(scores).softmax(-1), own, 1e-2)


@pytest.mark.parametrize("activation", ["relu", "jumprelu", "batchtopk"])
def test_4_doubling_the_batch_changes_neither_loss_nor_gradients(activation: Any) -> None:
    inputs = some_inputs(114, padding=True)
    twice = doubled(inputs)
    found = []
    for batch in (inputs, twice):
        job = job_for(inputs, activation=activation, sparsity=0.2, aux=0.1, dead_after=10**9).eval()
        loss, _ = job.loss(PatternTarget(batch), OFF)
        loss.backward()
        found.append((loss.detach(), job.query.W_enc.grad, job.key.W_dec.grad, job.query.threshold.grad))
    for one, other in zip(*found, strict=True):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            close(other, one, 1e-5)
    if activation == "jumprelu":
        assert found[0][3] is not None


def test_5_the_output_bias_is_not_the_input_bias() -> None:
    """Widths are equal, so that a mix-up would run."""
    inputs = some_inputs(115, d=16, groups=4, batch=4, length=30)
    for side, s in side_statistics([inputs]).items():
        t = start(job_for(inputs, recipe="default", sparsity=0.0).config, side, s, "a", 0)
        assert t.b_in.shape == t.b_out.shape and (s.x_nD.mean(0) - s.out_nM.mean(0)).abs().max() > 0.3
        close(t.b_in.detach(), s.x_nD.mean(0), 1e-6)
        close(t.b_out.detach(), s.out_nM.mean(0), 1e-6)
        assert t.b_in.data_ptr() != t.b_out.data_ptr()


def test_6_the_final_rate_is_a_share_of_each_jobs_peak(tmp_path: Path) -> None:
    """Two jobs of one training whose peaks differ ten-thousandfold: so do all of their steps, down to the last."""
    jobs = [OneNumber(0, 1e-3), OneNumber(1, 10.0)]
    fit(tmp_path, jobs, warmup=0.0, decay=1.0)
    steps = [[a - b for a, b in zip(j.seen, [*j.seen[1:], float(j.weight.detach())], strict=True)] for j in jobs]
    assert [b / a for a, b in zip(*steps, strict=True)] == pytest.approx([1e4] * len(steps[0]), rel=1e-2)
    for job, moved in zip(jobs, steps, strict=True):
        assert moved[0] == pytest.approx(job.peak, rel=1e-4)
        assert 0.01 * job.peak < moved[-1] < 0.08 * job.peak


def test_7_no_sequence_holds_two_documents_and_the_stream_goes_on(tmp_path: Path) -> None:
    """Each document repeats a word of its own, so that a neighbour's would show; three times round the text."""
    texts = [" ".join([f"w{n}"] * (9 + n)) for n in range(40)]
    text = stream(source(tmp_path, texts), repeat=True)
    batches = take(text, 120)
    rows = rows_of([batch for batch, _ in batches])
    assert len(batches) == 120 and text.epoch >= 3
    bos = 1
    assert BOS.bos_token_id == bos and all({*tokens} == {bos, 5 + document} for document, _, tokens in rows)
    train = {n for n, t in enumerate(texts) if split_of(t, 0.1) == "train"}
    assert {document for document, _, _ in rows} == train


@pytest.mark.parametrize("name", ["gpt2", "llama", "gpt_oss", "mistral"])
def test_8_the_registered_attention_has_a_mask(name: str) -> None:
    """Neither a later token nor padding changes what stands before, whether or not a layer is being read."""
    assert ALL_MASK_ATTENTION_FUNCTIONS[IMPLEMENTATION] is eager_mask
    model: Any = tiny_model(name)
    site = AttentionSite(model, None, layer=0)
    tokens = torch.randint(3, VOCABULARY, (2, 19), generator=torch.Generator().manual_seed(1))
    real = torch.ones_like(tokens, dtype=torch.bool)
    real[1, :6] = False
    changed = tokens.clone()
    changed[0, 11:], changed[1, :6] = 3, 3  # the future of one sequence, the padding of the other
    for kept in (None, lambda inputs: inputs.log_pattern_BNQK.exp()):
        logits = []
        for words in (tokens, changed):
            with torch.no_grad():
                if kept is None:
                    logits.append(site._forward(words, real).logits)
                else:
                    with site.replace_pattern(kept):
                        logits.append(site._forward(words, real).logits)
        close(logits[1][0, :11], logits[0][0, :11], 1e-4)
        close(logits[1][1, 6:], logits[0][1, 6:], 1e-4)
        assert (logits[1][0, 11:] - logits[0][0, 11:]).abs().max() > 0.1


def test_9_the_output_bias_is_added_once() -> None:
    """With no feature active every head's score is ⟨b_q, b_k⟩ of that head alone, in the transcoders and in the map."""
    inputs = some_inputs(119, d=16, groups=4)
    sides = some_dictionary(16, 9, 16, 0), some_dictionary(16, 8, 16, 1)
    for side in sides:
        side.b_enc.data.fill_(-1e6)
    q, k = (side.b_out.detach().view(4, 4) for side in sides)
    wanted = (inputs.rule.scaling * (q * k).sum(1))[None, :, None, None].expand(2, 4, 7, 7)
    assert wanted.abs().max() > 0.02
    q, k = sides[0](inputs.x_BTD).view_as(inputs.q_BTNH), sides[1](inputs.x_BTD).view_as(inputs.k_BTGH)
    close(inputs.rule.scores(q, k).detach(), wanted)
    close(map_scores(inputs, sides, pairs_of(inputs, sides)), wanted)


class Measured(Exception):
    """Ends an evaluation when it has been handed its text."""


def test_9_metrics_come_from_heldout_documents_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = documents_of([20] * 120)
    values = {
        "data": source(tmp_path, texts).model_dump(),
        "model": "tiny",
        "layers": [0],
        "dictionary": {"width": 9, "width_key": 8, "k": 3, "activation": "batchtopk"},
        "training": {"batch_tokens": 100},
        "evaluation": {"adversary_steps": 0},
    }
    config = RunConfig.model_validate(values)
    site = open_sites(tiny_model("gpt2"), BOS, [0])[0]
    tokens = torch.randint(5, 55, (2, 16))
    dec = some_decomposition(harvest([site], tokens, tokens > 0)[0])
    folder = tmp_path / "run"
    shape = SiteShape(**site.shape, rotary=False)  # type: ignore[arg-type]
    write_config(folder, config, {0: {**site.shape, "rotary": False}}, "cpu")
    dec.save(folder / "layer_0")
    assert Decomposition.load(folder / "layer_0").shape == shape
    seen: list[int] = []
    asked: list[tuple[str, bool]] = []

    def measure(dec: Any, site: Any, heldout: Any, sources: Any, examples: Any) -> None:
        seen.extend(int(d) for batch in heldout for d in batch.document_B)
        raise Measured

    sequences = evaluation_text.Sequences

    def asking(config: Any, tokenizer: Any, split: Any, **options: Any) -> Any:
        asked.append((split, options["repeat"]))
        return sequences(config, tokenizer, split, **options)

    monkeypatch.setattr(layer, "measure", measure)
    monkeypatch.setattr(evaluation_text, "Sequences", asking)
    with pytest.raises(Measured):
        evaluation.evaluate_run({"": folder}, [site], Reporter(quiet=True))
    heldout = [n for n, t in enumerate(texts) if split_of(t, 0.1) == "heldout"]
    assert len(heldout) >= 4 and sorted({*seen}) == heldout
    assert sorted(asked) == [("heldout", False), ("train", False)]  # each document once; starts and means from training
