"""AttentionSite: read and replace one layer's attention in any Hugging Face model.

transformers routes nearly every model's attention through one registry, in which qkscope has its own function
(routing.py), and so sees what each layer's attention sees: queries and keys, the mask, the scale, the soft cap and the
learned sinks. No architecture is named in this file.

What is notable:
- Queries and keys are handed over as they *enter* the rotary embedding (see rotary.py), so a feature means the same at
  every position. `PatternRule` (pattern.py) holds all that turns them into a pattern.
- A site checks itself when it is made: the pattern from its own q, k, mask and scale must equal the model's own.
- One forward pass serves any number of layers and stops after the last wanted one.
- Where it is asked to, a site hands over the residual stream, which the layer's block reads before its norm, as x.

Shapes: B sequences, T positions (Q as a query, K as a key), D residual width, N query heads, G key-value heads, H head
width. With learned sinks a pattern has one more column at the end, the sink's.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from .errors import UserError
from .models import blocks_through, load_model
from .pattern import AttentionInputs, HeadPatterns, HeadSource, PatternRule, PatternSource
from .rotary import RotaryCall, RotaryLayout
from .routing import IMPLEMENTATION, SUPPORTED, Stop, attention_modules, handlers, name_of, no_cache, random_tokens


class AttentionSite:
    """One layer's attention in a running model.

    Making one runs the model a few times on random tokens and raises `UserError` where the model does not route its
    attention through the registry, the layer does not exist, or the site's own pattern is not the model's.
    `residual`: hand over the residual stream before the layer's norm as x, for dictionaries that read it.
    `modules`: the model's attention modules, where they are known.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any = None,
        *,
        layer: int,
        residual: bool = False,
        modules: Sequence[nn.Module] = (),
    ) -> None:
        self.model, self.tokenizer, self.layer = model, tokenizer, layer
        self.modules = modules or attention_modules(model)
        if not 0 <= layer < len(self.modules):
            raise UserError(
                f"layer {layer} is out of range: the model has attention layers 0 to {len(self.modules) - 1}"
            )
        self.module = self.modules[layer]
        self.residual = False
        with self.lower_layers_once():
            self.layout = self._find_rotary()
            self.check()
        self.residual = residual

    @classmethod
    def load(
        cls, name: str, *, layer: int, dtype: str = "float32", device: str = "cpu", residual: bool = False
    ) -> AttentionSite:
        """Load a model by folder or name and open one of its layers."""
        model, tokenizer = load_model(name, dtype=dtype, device=device)
        return cls(model, tokenizer, layer=layer, residual=residual)

    @property
    def has_head(self) -> bool:
        """Whether the model predicts tokens (an encoder without a language-model head does not)."""
        return self.model.get_output_embeddings() is not None and not self.bidirectional  # type: ignore[operator]

    @cached_property
    def bidirectional(self) -> bool:
        return bool(self._probe().rule.visible_BQK[0].triu(1).any())

    @cached_property
    def shape(self) -> dict[str, int]:
        """Widths of the layer: D, N, G, H."""
        inputs = self._probe()
        _, _, n, h = inputs.q_BTNH.shape
        return {"D": inputs.x_BTD.shape[-1], "N": n, "G": inputs.k_BTGH.shape[2], "H": h}

    @contextmanager
    def replace_pattern(
        self, source: PatternSource | HeadSource | Any, pairs: str = "kept", *, residual: bool | None = None
    ) -> Iterator[None]:
        """While open, this layer's pattern is `source`'s: a function of `AttentionInputs`, or a `Decomposition`.

        A function gives the whole pattern, or some heads' at a time (`HeadPatterns`). Values, and everything else in
        the model, stay as they are. `pairs` is handed to a decomposition: "kept" (the pruned map) or "all" (the
        transcoders); it is handed the x that it reads, whatever the site is set to. What a function is handed,
        `residual` may say.
        """
        of_pairs = getattr(source, "head_source", None)
        pattern = of_pairs(pairs) if of_pairs else source
        with self._handle(lambda inputs: pattern(inputs), getattr(source, "residual", residual)):
            yield

    def intervene(self, dec: Any, ablate: Sequence[Any] = (), **edit: Any) -> Any:
        """While open, features and pairs of this layer's QK circuit are ablated, scaled or added: a context manager
        (see explain/intervene.py, where its options stand)."""
        from .explain.intervene import intervene  # a convenience that reaches up; nothing here depends on it

        return intervene(self, dec, ablate, **edit)

    @property
    def block(self) -> nn.Module:
        """The layer's block: what the residual stream goes into, of which the attention is a part."""
        found = blocks_through(self.model, self.module)
        if not found:
            raise UserError(f"{name_of(self.model)}: its layers are no list, so the residual stream is not found")
        return found[-1]

    @contextmanager
    def lower_layers_once(self) -> Iterator[None]:
        """While open, the blocks below this layer's run in the first pass only; later passes get what they put out.

        For passes on the same tokens, none of which changes anything below this layer or writes into what comes out of
        it; the first without gradients. A model that goes through its blocks several times a pass runs them each time.
        """
        below = blocks_through(self.model, self.module)[:-1]
        if not below:
            yield
            return
        passes, put_out = 0, []

        def begin(*_: Any) -> None:
            nonlocal passes
            passes += 1

        def once(block: nn.Module) -> Callable:
            forward = block.forward

            def run(*args: Any, **kwargs: Any) -> Any:
                if passes > 1 and len(put_out) == 1:
                    return put_out[0]  # for whichever block: what is above reads the last one alone
                out = forward(*args, **kwargs)
                if passes == 1 and block is below[-1]:
                    put_out.append(out)
                return out

            return run

        own = [vars(block).get("forward") for block in below]  # where a library put one, as for many devices
        hook = self.model.register_forward_pre_hook(begin)
        for block in below:
            block.forward = once(block)
        try:
            yield
        finally:
            hook.remove()
            for block, forward in zip(below, own, strict=True):
                del block.forward
                if forward is not None:
                    block.forward = forward

    @contextmanager
    def _handle(
        self, on_inputs: Callable[[AttentionInputs], Tensor | HeadPatterns | None], residual: bool | None = None
    ) -> Iterator[None]:
        residual = self.residual if residual is None else residual
        arguments: dict[str, Any] = {}
        signature = inspect.signature(self.module.forward)

        def enter(block: nn.Module, args: tuple, kwargs: dict) -> None:
            bound = inspect.signature(block.forward).bind_partial(*args, **kwargs).arguments
            arguments["residual"] = next(iter(bound.values()))

        def before(module: nn.Module, args: tuple, kwargs: dict) -> None:
            bound = signature.bind_partial(*args, **kwargs).arguments
            arguments.update(bound, **bound.get("kwargs", {}))

        def handler(
            module: nn.Module, q: Tensor, k: Tensor, value: Tensor, rule: PatternRule
        ) -> Tensor | HeadPatterns | None:
            q, k = q.float(), k.float()  # back in bfloat16, rotated back values would be rounded a second time
            if self.layout is not None:
                rotary = self.layout.rotary(*arguments["position_embeddings"])
                rule = replace(rule, rotary=rotary)
                q, k = rotary.unrotate(q), rotary.unrotate(k)
            x = arguments["residual" if residual else "hidden_states"]
            if x.shape[1] != k.shape[1]:
                raise UserError(
                    f"layer {self.layer} reads cached keys, whose inputs are gone; generate with use_cache=False"
                )
            real = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
            return on_inputs(AttentionInputs(x, q, k, rule, real, residual))

        if self.module in handlers:
            raise RuntimeError(f"layer {self.layer} is already being read or replaced")
        hooks = [self.module.register_forward_pre_hook(before, with_kwargs=True)]
        if residual:
            hooks.append(self.block.register_forward_pre_hook(enter, with_kwargs=True))
        handlers[self.module] = handler
        try:
            yield
        finally:
            del handlers[self.module]
            for hook in hooks:
                hook.remove()
            arguments.clear()

    @torch.no_grad()
    def _find_rotary(self) -> RotaryLayout | None:
        """The layout of the module's rotary function, by recording one call of it; None without one."""
        calls: list[RotaryCall] = []
        queries: list[Tensor] = []
        file = sys.modules[type(self.module).__module__].__dict__
        names = [n for n, f in file.items() if "apply_rotary" in n and callable(f)]
        tables: list[Any] = []

        def recorder(function: Callable) -> Callable:
            def record(*args: Any, **named: Any) -> Any:
                result = function(*args, **named)
                calls.append(RotaryCall(function, args, named, result))
                return result

            return record

        def handler(module: nn.Module, q: Tensor, k: Tensor, value: Tensor, rule: PatternRule) -> None:
            queries.append(q.transpose(1, 2))
            raise Stop

        def before(module: nn.Module, args: tuple, kwargs: dict) -> None:
            calls.clear()
            bound = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments
            tables.append(bound.get("position_embeddings", bound.get("kwargs", {}).get("position_embeddings")))

        originals = {n: file[n] for n in names}
        hook = self.module.register_forward_pre_hook(before, with_kwargs=True)
        handlers[self.module] = handler
        try:
            file.update({n: recorder(f) for n, f in originals.items()})
            self._forward(*random_tokens(self.model))
        except Stop:
            pass
        finally:
            file.update(originals)
            del handlers[self.module]
            hook.remove()
        if not calls:
            return None  # learned positions, or a layer without positions of its own
        layout = RotaryLayout.probe(calls[-1], queries[-1])
        if layout is None or not isinstance(tables[-1], tuple):
            raise UserError(
                f"{name_of(self.model)}: layer {self.layer} changes its queries after the rotary embedding, or keeps "
                f"the tables to itself; supported: {SUPPORTED}"
            )
        return layout

    def _forward(self, tokens_BT: Tensor, real_BT: Tensor) -> Any:
        return self.model(input_ids=tokens_BT, attention_mask=real_BT.long(), **no_cache(self.model))

    def _probe(self) -> AttentionInputs:
        tokens, real = random_tokens(self.model)
        return harvest([self], tokens, real)[0]

    @torch.no_grad()
    def check(self) -> None:
        """Refuse to go on unless this site's pattern is the model's own and replacing it takes effect."""
        tokens, real = random_tokens(self.model)
        with self.reading(lambda x: x[:, :1].expand_as(x).contiguous()):
            still = harvest([self], tokens, real)[0]
        # bfloat16 has 8 bits of mantissa: the model's own pattern is then good to about 1e-2.
        tolerance = 1e-3 if still.x_BTD.dtype == torch.float32 else 3e-2
        for y in (still.q_BTNH, still.k_BTGH):
            if not (y - y[:, :1]).abs().max() <= tolerance * y.abs().max():
                raise UserError(
                    f"{name_of(self.model)}: queries or keys at layer {self.layer} depend on the position in a way "
                    f"that is no rotary embedding known here; supported: {SUPPORTED}"
                )
        inputs = harvest([self], tokens, real)[0]
        with self.reading(lambda x: inputs.x_BTD):  # rounding in the layers below is no business of this check
            own = self._own_pattern(tokens, real)
        mine = inputs.log_pattern_BNQK.exp()[..., : own.shape[-1]]
        # Mass in the wrong place, mean over rows, in the worst head. Single rows of large scores are mostly rounding.
        worst = (mine - own).abs().sum(-1).transpose(1, 2)[real].mean(0).max().item() / 2
        if not worst <= tolerance:
            raise UserError(
                f"{name_of(self.model)}: the pattern at layer {self.layer} is off by {worst:.1e} from the model's own; "
                f"this architecture is not understood (supported: {SUPPORTED})"
            )
        plain = _first_output(self._forward(tokens, real))[real]
        with self.replace_pattern(lambda inputs: inputs.log_pattern_BNQK.exp()):
            same = _first_output(self._forward(tokens, real))[real]
        with self.replace_pattern(lambda inputs: torch.zeros_like(inputs.log_pattern_BNQK)):
            other = _first_output(self._forward(tokens, real))[real]
        # Routing of experts and deep stacks amplify rounding, so the patched output is compared to the ablated one.
        change, moved = (same - plain).float().norm(), (other - plain).float().norm()
        if not change <= 0.05 * moved or not moved > 0:
            raise UserError(
                f"{name_of(self.model)}: replacing the pattern at layer {self.layer} does not act as it should (the "
                f"true pattern moves the output by {change:.1e}, a zero pattern by {moved:.1e})"
            )

    @contextmanager
    def reading(self, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
        """While open, this layer reads `change(x)` in the place of its x [B, T, D]."""
        signature = inspect.signature(self.module.forward)

        def before(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            bound = signature.bind(*args, **kwargs)
            if "hidden_states" not in bound.arguments:
                raise UserError(f"{name_of(self.model)}: its attention takes no hidden_states; supported: {SUPPORTED}")
            bound.arguments["hidden_states"] = change(bound.arguments["hidden_states"])
            return bound.args, bound.kwargs

        hook = self.module.register_forward_pre_hook(before, with_kwargs=True)
        try:
            yield
        finally:
            hook.remove()

    def _own_pattern(self, tokens: Tensor, real: Tensor) -> Tensor:
        """The pattern that the model's own eager attention reports, float32 [B, N, Q, K]."""
        patterns: list[Tensor] = []

        def after(module: nn.Module, args: tuple, output: Any) -> None:
            if not isinstance(output, tuple) or not isinstance(output[1], Tensor):
                raise UserError(f"{name_of(self.model)}: its attention reports no pattern; supported: {SUPPORTED}")
            patterns.append(output[1])
            raise Stop

        hook = self.module.register_forward_hook(after)
        self.model.set_attn_implementation("eager")  # type: ignore[operator]
        try:
            with suppress(Stop):
                self._forward(tokens, real)
        finally:
            self.model.set_attn_implementation(IMPLEMENTATION)  # type: ignore[operator]
            hook.remove()
        return patterns[0].float()


def harvest(
    sites: Sequence[AttentionSite], tokens_BT: Tensor, real_BT: Tensor, residual: bool | None = None
) -> list[AttentionInputs]:
    """What each site's attention saw, in one forward pass that stops after the last of them.

    `residual` is for this pass, in the place of what each site is set to.
    """
    found: dict[int, AttentionInputs] = {}
    last = max(site.layer for site in sites)

    def taker(site: AttentionSite) -> Callable[[AttentionInputs], None]:
        def take(inputs: AttentionInputs) -> None:
            found[site.layer] = replace(inputs.detached(), real_BT=real_BT)
            if site.layer == last:
                raise Stop

        return take

    with torch.no_grad(), ExitStack() as stack:
        for site in sites:
            stack.enter_context(site._handle(taker(site), residual))
        with suppress(Stop):
            sites[0]._forward(tokens_BT, real_BT)
    return [found[site.layer] for site in sites]


def open_sites(
    model: nn.Module, tokenizer: Any, layers: Sequence[int], *, residual: bool = False
) -> list[AttentionSite]:
    """A site for each layer of one model."""
    modules = attention_modules(model)
    return [AttentionSite(model, tokenizer, layer=layer, residual=residual, modules=modules) for layer in layers]


def _first_output(output: Any) -> Tensor:
    """Logits, or the last hidden state of a model without a head."""
    return output.logits if getattr(output, "logits", None) is not None else output[0]
