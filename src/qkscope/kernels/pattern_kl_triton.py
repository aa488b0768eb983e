"""The three pattern KLs of pattern_kl.py as Triton kernels, in the manner of flash attention.

Three passes, none of which leaves a [Q, K] in memory. The first goes over the keys of a block of queries and keeps,
online, each row's maximum, its sum of exponentials and Σ_j P_j (s_j - ŝ_j); from these follow the KLs and the
logarithms of the sums. The second goes over the same keys again for the gradient of the queries, the third over the
queries (of all heads that share a key head) of a block of keys for that of the keys. Where a block starts and ends
follows from its mask, so that a causal one halves the work. No atomic additions: the same input gives the same bits.

Products are those of float32 (three of TF32), or TF32 where `torch.set_float32_matmul_precision` allows it; all else is
float32. Head widths are filled up with zeros to a power of two. With TRITON_INTERPRET=1 the kernels run on a CPU.

Shapes as in attention.py. A leading 4 are the kinds of scores: q·k (the true ones), q̂·k̂, q̂·k and q·k̂.
"""

# pyright: reportCallIssue=false, reportArgumentType=false
# (the types of a kernel's launch and of what it computes with are known to Triton only)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .pattern_kl import Found, Parts

MASKED = tl.constexpr(-1e30)  # finite, as in pattern_kl.py; what a row adds up before it sees a key is scaled by 0


@triton.jit
def _rows(x, b, head, at, length, n_heads, H: tl.constexpr, WIDE: tl.constexpr):
    """Some positions' vectors of one head of x [B, T, n, H], zeros beyond its ends."""
    h = tl.arange(0, WIDE)
    place = ((b * length + at[:, None]) * n_heads + head) * H + h[None, :]
    return tl.load(x + place, mask=(at[:, None] < length) & (h[None, :] < H), other=0.0)


@triton.jit
def _scores(q, k, seen, CAP: tl.constexpr, PRECISION: tl.constexpr):
    """Capped and masked scores, and the cap's derivative."""
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    slope = tl.full(s.shape, 1.0, tl.float32)
    if CAP > 0:
        e = tl.exp(-2 / CAP * tl.abs(s))  # of what is never above 0: no overflow
        tanh = tl.where(s < 0, e - 1, 1 - e) / (1 + e)
        s = CAP * tanh
        slope = 1 - tanh * tanh
    return tl.where(seen, s, MASKED), slope


@triton.jit
def _seen(visible, b_mask, queries, keys, length):
    """Which of these keys each of these queries sees."""
    inside = (queries[:, None] < length) & (keys[None, :] < length)
    place = (b_mask * length + queries[:, None]) * length + keys[None, :]
    return tl.load(visible + place, mask=inside, other=0) > 0


@triton.jit
def _range(first, last, b_mask, at, length):
    """From the first to the last that any of these positions meets."""
    inside = at < length
    start = tl.min(tl.load(first + b_mask * length + at, mask=inside, other=length))
    stop = tl.max(tl.load(last + b_mask * length + at, mask=inside, other=0))
    return start, stop


@triton.jit
def _add(s, top, total):
    """One more block of scores: new maximum and sum, the exponentials, and what earlier sums are to be scaled by."""
    new = tl.maximum(top, tl.max(s, 1))
    e = tl.exp(s - new[:, None])
    scale = tl.exp(top - new)
    return new, total * scale + tl.sum(e, 1), e, scale


@triton.jit
def _difference(s, slope, log_sum, pattern):
    """∂KL/∂score of one kind."""
    return (tl.exp(s - log_sum[:, None]) - pattern) * slope


@triton.jit
def _sums(
    q, k, q_hat, k_hat, visible, first, last, sink, kl, log_sums,
    length, n_heads, n_groups, per_mask,
    H: tl.constexpr, WIDE: tl.constexpr, CAP: tl.constexpr, SINK: tl.constexpr, PRECISION: tl.constexpr,
    BQ: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Pass 1, for a block of queries of one head: `kl` [3, B, N, Q] and `log_sums` [4, B, N, Q]."""
    n, b = tl.program_id(1) % n_heads, (tl.program_id(1) // n_heads).to(tl.int64)
    g, b_mask = n * n_groups // n_heads, b * per_mask
    queries = tl.program_id(0) * BQ + tl.arange(0, BQ)
    true_q = _rows(q, b, n, queries, length, n_heads, H, WIDE)
    hat_q = _rows(q_hat, b, n, queries, length, n_heads, H, WIDE)
    top = tl.full([BQ], MASKED, tl.float32)
    total = tl.zeros([BQ], tl.float32)
    if SINK:  # a key that all four kinds see, with the same score
        top, total = tl.zeros([BQ], tl.float32) + tl.load(sink + n), total + 1.0
    top_0, top_1, top_2, top_3 = top, top, top, top
    total_0, total_1, total_2, total_3 = total, total, total, total
    moved_1, moved_2, moved_3 = tl.zeros([BQ], tl.float32), tl.zeros([BQ], tl.float32), tl.zeros([BQ], tl.float32)
    start, stop = _range(first, last, b_mask, queries, length)
    for at in range(start, stop, BK):
        keys = at + tl.arange(0, BK)
        seen = _seen(visible, b_mask, queries, keys, length)
        true_k = _rows(k, b, g, keys, length, n_groups, H, WIDE)
        hat_k = _rows(k_hat, b, g, keys, length, n_groups, H, WIDE)
        s_0, _ = _scores(true_q, true_k, seen, CAP, PRECISION)
        s_1, _ = _scores(hat_q, hat_k, seen, CAP, PRECISION)
        s_2, _ = _scores(hat_q, true_k, seen, CAP, PRECISION)
        s_3, _ = _scores(true_q, hat_k, seen, CAP, PRECISION)
        top_0, total_0, e, scale = _add(s_0, top_0, total_0)
        top_1, total_1, _, _ = _add(s_1, top_1, total_1)
        top_2, total_2, _, _ = _add(s_2, top_2, total_2)
        top_3, total_3, _, _ = _add(s_3, top_3, total_3)
        moved_1 = moved_1 * scale + tl.sum(e * (s_0 - s_1), 1)
        moved_2 = moved_2 * scale + tl.sum(e * (s_0 - s_2), 1)
        moved_3 = moved_3 * scale + tl.sum(e * (s_0 - s_3), 1)
    inside = queries < length
    each = tl.num_programs(1).to(tl.int64) * length
    place = tl.program_id(1).to(tl.int64) * length + queries
    tl.store(log_sums + place, top_0 + tl.log(total_0), mask=inside)
    tl.store(log_sums + each + place, top_1 + tl.log(total_1), mask=inside)
    tl.store(log_sums + 2 * each + place, top_2 + tl.log(total_2), mask=inside)
    tl.store(log_sums + 3 * each + place, top_3 + tl.log(total_3), mask=inside)
    # Differences of maxima first: what large scores have in common cancels before it is rounded.
    tl.store(kl + place, moved_1 / total_0 + (top_1 - top_0) + tl.log(total_1 / total_0), mask=inside)
    tl.store(kl + each + place, moved_2 / total_0 + (top_2 - top_0) + tl.log(total_2 / total_0), mask=inside)
    tl.store(kl + 2 * each + place, moved_3 / total_0 + (top_3 - top_0) + tl.log(total_3 / total_0), mask=inside)


@triton.jit
def _to_queries(
    q, k, q_hat, k_hat, visible, first, last, weight, log_sums, grad,
    part_0, part_1, length, n_heads, n_groups, per_mask,
    H: tl.constexpr, WIDE: tl.constexpr, CAP: tl.constexpr, PRECISION: tl.constexpr,
    BQ: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Pass 2, for a block of queries of one head: gradient in q̂."""
    n, b = tl.program_id(1) % n_heads, (tl.program_id(1) // n_heads).to(tl.int64)
    g, b_mask = n * n_groups // n_heads, b * per_mask
    queries = tl.program_id(0) * BQ + tl.arange(0, BQ)
    inside = queries < length
    true_q = _rows(q, b, n, queries, length, n_heads, H, WIDE)
    hat_q = _rows(q_hat, b, n, queries, length, n_heads, H, WIDE)
    each = tl.num_programs(1).to(tl.int64) * length
    place = tl.program_id(1).to(tl.int64) * length + queries
    log_0 = tl.load(log_sums + place, mask=inside, other=0.0)
    log_1 = tl.load(log_sums + each + place, mask=inside, other=0.0)
    log_2 = tl.load(log_sums + 2 * each + place, mask=inside, other=0.0)
    found = tl.zeros([BQ, WIDE], tl.float32)
    start, stop = _range(first, last, b_mask, queries, length)
    for at in range(start, stop, BK):
        keys = at + tl.arange(0, BK)
        seen = _seen(visible, b_mask, queries, keys, length)
        true_k = _rows(k, b, g, keys, length, n_groups, H, WIDE)
        hat_k = _rows(k_hat, b, g, keys, length, n_groups, H, WIDE)
        s_0, _ = _scores(true_q, true_k, seen, CAP, PRECISION)
        s_1, slope_1 = _scores(hat_q, hat_k, seen, CAP, PRECISION)
        s_2, slope_2 = _scores(hat_q, true_k, seen, CAP, PRECISION)
        pattern = tl.exp(s_0 - log_0[:, None])
        both = part_0 * _difference(s_1, slope_1, log_1, pattern)
        query_only = part_1 * _difference(s_2, slope_2, log_2, pattern)
        found += tl.dot(both, hat_k, input_precision=PRECISION)
        found += tl.dot(query_only, true_k, input_precision=PRECISION)
    found *= tl.load(weight + b * length + queries, mask=inside, other=0.0)[:, None]
    h = tl.arange(0, WIDE)
    place = ((b * length + queries[:, None]) * n_heads + n) * H + h[None, :]
    tl.store(grad + place, found, mask=inside[:, None] & (h[None, :] < H))


@triton.jit
def _to_keys(
    q, k, q_hat, k_hat, visible, first, last, weight, log_sums, grad,
    part_0, part_2, length, n_heads, n_groups, per_mask,
    H: tl.constexpr, WIDE: tl.constexpr, CAP: tl.constexpr, PRECISION: tl.constexpr,
    BQ: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Pass 3, for a block of keys of one key head: gradient in k̂."""
    g, b = tl.program_id(1) % n_groups, (tl.program_id(1) // n_groups).to(tl.int64)
    b_mask, n_each = b * per_mask, n_heads // n_groups
    keys = tl.program_id(0) * BK + tl.arange(0, BK)
    true_k = _rows(k, b, g, keys, length, n_groups, H, WIDE)
    hat_k = _rows(k_hat, b, g, keys, length, n_groups, H, WIDE)
    each = tl.num_programs(1).to(tl.int64) * n_each * length
    found = tl.zeros([BK, WIDE], tl.float32)
    start, stop = _range(first, last, b_mask, keys, length)
    for n in range(g * n_each, (g + 1) * n_each):
        for at in range(start, stop, BQ):
            queries = at + tl.arange(0, BQ)
            inside = queries < length
            seen = _seen(visible, b_mask, queries, keys, length)
            true_q = _rows(q, b, n, queries, length, n_heads, H, WIDE)
            hat_q = _rows(q_hat, b, n, queries, length, n_heads, H, WIDE)
            place = (b * n_heads + n) * length + queries
            log_0 = tl.load(log_sums + place, mask=inside, other=0.0)
            log_1 = tl.load(log_sums + each + place, mask=inside, other=0.0)
            log_3 = tl.load(log_sums + 3 * each + place, mask=inside, other=0.0)
            w = tl.load(weight + b * length + queries, mask=inside, other=0.0)[:, None]
            s_0, _ = _scores(true_q, true_k, seen, CAP, PRECISION)
            s_1, slope_1 = _scores(hat_q, hat_k, seen, CAP, PRECISION)
            s_3, slope_3 = _scores(true_q, hat_k, seen, CAP, PRECISION)
            pattern = tl.exp(s_0 - log_0[:, None])
            both = part_0 * _difference(s_1, slope_1, log_1, pattern)
            key_only = part_2 * _difference(s_3, slope_3, log_3, pattern)
            found += tl.dot(tl.trans(both), hat_q * w, input_precision=PRECISION)
            found += tl.dot(tl.trans(key_only), true_q * w, input_precision=PRECISION)
    h = tl.arange(0, WIDE)
    place = ((b * length + keys[:, None]) * n_groups + g) * H + h[None, :]
    tl.store(grad + place, found, mask=(keys[:, None] < length) & (h[None, :] < H))


def fused(
    q_BTNH: Tensor,
    k_BTGH: Tensor,
    q_hat_BTNH: Tensor,
    k_hat_BTGH: Tensor,
    visible_BQK: Tensor,
    weight_BQ: Tensor,
    sink_N: Tensor | None,
    softcap: float | None,
    parts: Parts,
    *,
    gradients: bool,
) -> Found:
    """What `pattern_kl.blocked` gives."""
    batch, length, n_heads, width = q_BTNH.shape
    n_groups = k_BTGH.shape[2]
    wide = max(triton.next_power_of_2(width), 16)
    side = max(min(2048 // wide, 32), 16)  # queries and keys of a block: larger ones do not fit a GPU's registers
    vectors = [y.contiguous() for y in (q_BTNH, k_BTGH, q_hat_BTNH, k_hat_BTGH)]
    visible = visible_BQK.contiguous().view(torch.uint8)
    weight = weight_BQ.contiguous().float()
    kl = vectors[0].new_empty(3, batch, n_heads, length)
    log_sums = vectors[0].new_empty(4, batch, n_heads, length)
    shape = length, n_heads, n_groups, int(len(visible) > 1)
    fixed = {
        "H": width,
        "WIDE": wide,
        "CAP": softcap or 0.0,
        "PRECISION": "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32",
        "BQ": side,
        "BK": side,
        "num_warps": 4,
        "num_stages": 2,
        "enable_fp_fusion": True,
    }
    n_blocks = triton.cdiv(length, side)
    by_query = *vectors, visible, *_spans(visible)
    sink = weight if sink_N is None else sink_N.contiguous()  # any pointer, where there is none
    with torch.cuda.device_of(q_BTNH):
        _sums[n_blocks, batch * n_heads](*by_query, sink, kl, log_sums, *shape, SINK=sink_N is not None, **fixed)
        kl_3 = (kl * weight[:, None]).sum((1, 2, 3))
        if not gradients:
            return kl_3, None, None
        grad_q, grad_k = torch.empty_like(vectors[2]), torch.empty_like(vectors[3])
        _to_queries[n_blocks, batch * n_heads](*by_query, weight, log_sums, grad_q, parts[0], parts[1], *shape, **fixed)
        by_key = *vectors, visible, *_spans(visible.mT)
        _to_keys[n_blocks, batch * n_groups](*by_key, weight, log_sums, grad_k, parts[0], parts[2], *shape, **fixed)
    return kl_3, grad_q, grad_k


def _spans(visible: Tensor) -> tuple[Tensor, Tensor]:
    """Of each row of bytes [..., Q, K] where it is first not zero, and where it no longer is, int32 [..., Q]."""
    first, after = visible.argmax(-1), visible.shape[-1] - visible.flip(-1).argmax(-1)
    return first.int().contiguous(), after.int().contiguous()
