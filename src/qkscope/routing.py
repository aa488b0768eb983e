"""transformers' registry of attention functions: qkscope's own function in it, and the modules that call it.

An unregistered mask name would mean no mask, so the eager mask is registered with the function. What a call is handed
becomes a `PatternRule`; a handler that stands for the calling module may then answer with a pattern of its own.

Shapes: B sequences, T positions (Q as a query, K as a key), N query heads.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask

from .errors import UserError
from .pattern import HeadPatterns, PatternRule, head_blocks, patterns_of

IMPLEMENTATION = "qkscope"
SUPPORTED = (
    "gpt2, gpt_neox, llama, qwen2, qwen3, gemma, gemma2, gemma3, mistral, phi, phi3, olmo2, olmo3, opt, granite, "
    "cohere2, starcoder2, deepseek_v3, gpt_oss, bert"
)


class Stop(Exception):
    """Ends a forward pass after the last wanted layer."""


@dataclass
class Lengths:
    """The longest sequences at which a module was found causal, and the shortest at which not, beyond a window."""

    causal: int = 0
    other: int = sys.maxsize

    def tell(self, length: int) -> bool:
        """Whether it is known of this length."""
        return length <= self.causal or length >= self.other

    def note(self, length: int, *, causal: bool) -> None:
        if causal:
            self.causal = max(self.causal, length)
        else:
            self.other = min(self.other, length)


Handler = Callable[[nn.Module, Tensor, Tensor, Tensor, PatternRule], Tensor | HeadPatterns | None]
handlers: weakref.WeakKeyDictionary[nn.Module, Handler] = weakref.WeakKeyDictionary()
_lengths: weakref.WeakKeyDictionary[nn.Module, Lengths] = weakref.WeakKeyDictionary()
_plain: ContextVar[bool] = ContextVar("plain", default=False)
_seen: list[nn.Module] | None = None  # while a list, every attention module that is called is noted in it


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The registered attention function; q, k, v are [B, heads, T, H] and the result [B, T, N, H]."""
    if _seen is not None:
        _seen.append(module)
    handler = handlers.get(module)
    if handler is None and softcap is None and s_aux is None:
        # Fused kernels then skip what no query sees; few do by a mask.
        if _is_causal(module, attention_mask, query, key):
            attention_mask, kwargs["is_causal"] = None, True
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    rule = PatternRule(
        visible_BQK=_visible(attention_mask, query, key),
        scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
        softcap=softcap,
        sink_N=s_aux,
    )
    q, k = query.transpose(1, 2), key.transpose(1, 2)
    pattern = handler(module, q, k, value, rule) if handler else None
    if pattern is None:
        pattern = patterns_of(rule.log_pattern_by_head(q, k))
    value = value.repeat_interleave(query.shape[1] // value.shape[1], dim=1)
    if isinstance(pattern, Tensor):
        pattern = _of_keys(pattern, value)
        return (pattern @ value).transpose(1, 2).contiguous(), pattern
    blocks = head_blocks(q, k)
    out = torch.cat([_of_keys(pattern(heads), value) @ value[:, heads] for heads in blocks], 1)
    return out.transpose(1, 2).contiguous(), None


def _of_keys(pattern: Tensor, value: Tensor) -> Tensor:
    """Without the sink, which takes mass and carries no value; in the values' type."""
    return pattern[..., : value.shape[2]].to(value.dtype)


@contextmanager
def plain_batches() -> Iterator[None]:
    """While open, sequences are padded on the right or not at all, and what a layer sees follows from the length alone.

    A mask need not be looked at then, which a GPU's host would wait for, where the module's longer ones were causal or
    its shorter ones were not.
    """
    token = _plain.set(True)
    try:
        yield
    finally:
        _plain.reset(token)


def _is_causal(module: nn.Module, mask: Tensor | None, query: Tensor, key: Tensor) -> bool:
    """Whether every query sees itself and all keys before it, but for padding on the right: what a padded query sees
    is of no account. In `plain_batches` found out once for a length."""
    if mask is None or mask.shape[2] != mask.shape[3] or not len(mask):
        return False
    if not _plain.get():
        return _looks_causal(mask, query, key)
    known, length = _lengths.setdefault(module, Lengths()), mask.shape[2]
    if not known.tell(length):
        known.note(length, causal=_looks_causal(mask, query, key))
    return length <= known.causal


def _looks_causal(mask: Tensor, query: Tensor, key: Tensor) -> bool:
    """`_is_causal` by the mask itself; found out once for one, which layers share."""
    if not hasattr(mask, "is_causal"):
        visible = _visible(mask, query, key)
        real_B1K = visible[:, -1:]  # the last query of a causal mask sees all that is no padding
        on_the_right = (real_B1K[..., 1:] <= real_B1K[..., :-1]).all()
        causal = visible == (torch.ones_like(visible[:1]).tril() & real_B1K)
        mask.is_causal = bool(causal.all() & on_the_right)  # type: ignore[attr-defined]
    return mask.is_causal  # type: ignore[attr-defined]


def _visible(mask: Tensor | None, query: Tensor, key: Tensor) -> Tensor:
    """bool [B or 1, Q, K] of the additive mask that the model made; None means that every key is visible."""
    n_query, n_key = query.shape[2], key.shape[2]
    if mask is None:
        return torch.ones(1, n_query, n_key, dtype=torch.bool, device=query.device)
    mask = mask[..., :n_key]
    visible = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    visible = visible[:, 0]
    # A padded query may see no key at all; it counts nowhere, but its softmax must stay finite.
    return visible | ~visible.any(-1, keepdim=True)


AttentionInterface.register(IMPLEMENTATION, _attention)
AttentionMaskInterface.register(IMPLEMENTATION, eager_mask)


def attention_modules(model: nn.Module) -> list[nn.Module]:
    """The modules that call the registered function, in the order of the forward pass."""
    global _seen
    if getattr(model.config, "is_encoder_decoder", False):
        raise UserError(f"{name_of(model)} is an encoder-decoder model, which is not supported; supported: {SUPPORTED}")
    tokens, real = random_tokens(model)
    _seen = seen = []
    try:
        model.set_attn_implementation(IMPLEMENTATION)  # type: ignore[operator]
        with torch.no_grad():
            model(input_ids=tokens, attention_mask=real.long(), **no_cache(model))
    except ValueError as error:  # transformers refuses an implementation that the architecture does not take
        raise UserError(
            f"{name_of(model)} does not route its attention through transformers' registry "
            f"({str(error).splitlines()[0][:120]}); supported: {SUPPORTED}"
        ) from None
    finally:
        _seen = None
    if not seen:
        raise UserError(
            f"{name_of(model)} does not route its attention through transformers' registry; supported: {SUPPORTED}"
        )
    return list(dict.fromkeys(seen))


def random_tokens(model: nn.Module) -> tuple[Tensor, Tensor]:
    """Two sequences of random tokens [2, 24], the second padded on the right; the same every time."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    tokens = torch.randint(vocabulary, (2, 24), generator=generator)
    real = torch.ones_like(tokens, dtype=torch.bool)
    real[1, 17:] = False
    device = next(model.parameters()).device
    return tokens.to(device), real.to(device)


def no_cache(model: nn.Module) -> dict[str, bool]:
    return {"use_cache": False} if hasattr(model.config, "use_cache") else {}


def name_of(model: nn.Module) -> str:
    return str(getattr(model.config, "model_type", type(model).__name__))
