"""report.json: the figures of one layer, made of what was added up over held-out text."""

from __future__ import annotations

from typing import Any

import torch

from ..decomposition import SIDES, Decomposition
from .measure import CHECK_TOKENS, CONTROLS, HISTOGRAM_EDGES, Sums


def in_brief(report: dict[str, Any]) -> str:
    """A report's headline as one line."""
    kl, l0 = report["pattern_kl"], [report["l0"][side]["mean"] for side in SIDES]
    said = f"L0 {l0[0]:.1f}/{l0[1]:.1f}, {report['pairs']['kept']:,} pairs, pattern KL {kl['map_pruned']['mean']:.4f}"
    said += f" (uniform {kl['uniform']['mean']:.3f})"
    if lost := report.get("ce_increase"):
        said += f", cross-entropy {lost['map_pruned']['mean']:+.4f}"
    if target := report.get("target"):
        said += "; the target is reached" if target["reached"] else "; the target is NOT reached"
    return said


def figures(dec: Decomposition, sums: Sums) -> dict[str, Any]:
    """The figures of one layer; of a model without a head none of its loss."""
    found = {side: sums.activity[side].report() for side in SIDES}
    report: dict[str, Any] = {
        "layer": dec.layer,
        "tokens": {"evaluated": sums.tokens, "sequences": sums.sequences},
        **{key: {side: found[side][key] for side in SIDES} for key in ("l0", "dead", "dense", "live")},
        "width": {"query": dec.query.width, "key": dec.key.width},
        "width_trained": dec.width_trained,
        "log10_density": {"edges": HISTOGRAM_EDGES, **{side: found[side]["log10_density"] for side in SIDES}},
        "pairs": _pair_report(dec, found, sums),
        "map_all_check": {"largest_log_pattern_difference": sums.check, "positions": CHECK_TOKENS},
    }
    by_variant = {name: score.report() for name, score in sums.scores.by_name.items()}
    for metric in ("pattern_kl", "top1", "absolute_error"):
        report[metric] = {name: by_variant[name][metric] for name in by_variant if name not in CONTROLS}
    controls = [name for name in CONTROLS if name in by_variant]
    report["controls"] = {name: {m: by_variant[name][m] for m in ("pattern_kl", "top1")} for name in controls}
    return report | (sums.patched.report() if sums.patched.ce else {})


def _pair_report(dec: Decomposition, found: dict[str, Any], sums: Sums) -> dict[str, Any]:
    """Kept pairs as shares: of all between the features that step 1 trained, and of those between what lives now.

    Each side's bias counts as a feature in both.
    """
    kept, heads = len(dec.pairs), dec.shape.N
    trained = dec.width_trained  # tune drops features with their last pair; a share is of what it began with
    total = (trained["query"] + 1) * (trained["key"] + 1) * heads
    live = (found["query"]["live"] + 1) * (found["key"]["live"] + 1) * heads
    bias_q, bias_k = dec.pairs.query_P == dec.pairs.n_query, dec.pairs.key_P == dec.pairs.n_key
    worth = dec.importance_P.sum().clamp(min=1e-30)
    return {
        "kept": kept,
        "total": total,
        "total_live": live,
        "share_of_total": kept / total,
        "share_of_live": kept / live,
        "active_per_score": sums.active.figure(),
        "with_query_bias": {"kept": int(bias_q.sum()), "importance": float(dec.importance_P[bias_q].sum() / worth)},
        "with_key_bias": {"kept": int(bias_k.sum()), "importance": float(dec.importance_P[bias_k].sum() / worth)},
        "per_head": torch.bincount(dec.pairs.head_P, minlength=heads).tolist(),
        "curve": [{"kept": round(share * kept), "pattern_kl": k.kl.figure()} for share, k in sums.curve.items()],
    }
