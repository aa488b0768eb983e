"""What is measured on: a model of random weights, random text, and dictionaries as they are once they are sparse.

Shapes, not meanings: figures are of time and memory. Weights of queries and keys are scaled up, so that patterns are as
far from uniform as a trained model's; tokens follow Zipf's law, as those of text do.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging as transformers_logging

from ...attention import AttentionInputs, AttentionSite, harvest, open_sites
from ...config import DictionaryConfig, Dtype, TrainingConfig
from ...data.sequences import Batch
from ...decomposition import SiteShape
from ...parallel import kth_largest
from ...routing import plain_batches
from ...training.objective import Padding
from ...training.recipes import resolved
from ...training.start import SideStatistics, side_statistics, start
from ...training.step1 import Step1Job
from ...training.stream import Harvest
from ..workbench import Workbench

SCALE = 4.0  # of the weights of queries and keys: a pattern's entropy at 256 positions is then about 1.2 nats
DRAWN = 1 << 20  # tokens, read again from the first on when the last is reached: to draw takes longer than to read
DIVERSITY = 3.0  # Zipf's law with an offset: the n-th token's frequency is as 1 / (n + 3)


@dataclass(frozen=True)
class Size:
    """A shape and what may be spent on it; D is 64 a head."""

    context: int = 256
    width: int = 2400
    """Features a side."""
    k: float = 16
    batch_tokens: int = 2048
    pairs: int = 20_000
    """Pairs of our maps: the published masks left 25,000 to 51,000."""
    live: tuple[int, int] = (270, 466)
    """Query and key features that masks are over: those that lived at layer 10 of the published run."""
    sample_tokens: int = 2048
    """Tokens of ranking and selection."""
    judged_tokens: int = 512
    """Tokens of the evaluation."""
    heads: int = 12
    model_layers: int = 4
    layers: tuple[int, ...] = (1, 2, 3)
    """Those that are learned together; the middle one is what is done to one layer."""
    all_layers: bool = False
    """Whether all layers of the model are learned together too."""
    rotary: bool = False
    """A Llama of that shape in GPT-2's place."""
    vocabulary: int = 50_257
    repeats: int = 3
    mask_steps: int = 160
    """Steps of the published mask in the race (race.py)."""

    @property
    def layer(self) -> int:
        """The one that is measured alone."""
        return self.layers[len(self.layers) // 2]

    @property
    def step_tokens(self) -> int:
        """Tokens of a step."""
        return self.whole(self.batch_tokens)

    def whole(self, tokens: int) -> int:
        """As many tokens as whole sequences have, at least one."""
        return max(tokens // self.context, 1) * self.context


GPT2_SMALL: Any = {"model_layers": 12, "layers": (2, 6, 10)}  # the published layers
SIZES = {
    "small": Size(**GPT2_SMALL, all_layers=True),
    "batches": Size(batch_tokens=16_384, **GPT2_SMALL),
    "medium": Size(
        context=1024, width=24_576, k=32, batch_tokens=8192, pairs=100_000, live=(2400, 2400), sample_tokens=8192,
        judged_tokens=2048, mask_steps=600, **GPT2_SMALL,
    ),
    "wide": Size(width=100_000, k=32, pairs=100_000, **GPT2_SMALL),
    "large": Size(
        context=4096, width=24_576, k=32, batch_tokens=16_384, pairs=100_000, live=(2400, 2400), sample_tokens=16_384,
        judged_tokens=8192, mask_steps=600, **GPT2_SMALL,
    ),
}  # fmt: skip


class World:
    """One model, its layers that are learned, by number, and text for them; the published procedure's in float32."""

    def __init__(self, size: Size, device: torch.device, seed: int = 0, dtype: Dtype = "float32") -> None:
        self.size, self.device = size, device
        self.dtype: Dtype = dtype
        verbosity = transformers_logging.get_verbosity()
        transformers_logging.set_verbosity_error()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = (llama if size.rotary else gpt2)(size).to(device).eval().requires_grad_(False)
        transformers_logging.set_verbosity(verbosity)
        layers = range(size.model_layers) if size.all_layers else size.layers
        self.sites = self.plain = {site.layer: site for site in open_sites(model, None, layers)}
        if dtype == "bfloat16":
            self.sites = {site.layer: site for site in open_sites(deepcopy(model).bfloat16(), None, layers)}
        frequency = 1 / (torch.arange(size.vocabulary) + DIVERSITY)
        self.tokens = torch.multinomial(
            frequency, DRAWN, replacement=True, generator=torch.Generator().manual_seed(seed)
        )
        self.at = 0

    @property
    def site(self) -> AttentionSite:
        """The layer that is measured alone."""
        return self.sites[self.size.layer]

    @property
    def shape(self) -> SiteShape:
        """Of this layer."""
        return SiteShape(**self.site.shape, rotary=self.site.layout is not None, reads=None)

    def text(self, tokens: int) -> Batch:
        """The next random sequences of the size's context, at least one."""
        n = self.size.whole(tokens) // self.size.context
        place = torch.arange(self.at, self.at + n * self.size.context) % DRAWN
        self.at = (self.at + len(place)) % DRAWN
        tokens_BT, number = self.tokens[place].view(n, self.size.context), torch.arange(n)
        batch = Batch(tokens_BT, torch.ones_like(tokens_BT, dtype=torch.bool), number, torch.zeros_like(number))
        return batch.to(self.device)

    def read(self, batch: Batch) -> AttentionInputs:
        """What this layer's attention is handed."""
        with plain_batches():
            return harvest([self.site], batch.tokens_BT, batch.real_BT)[0]

    def workbench(self, tokens: int) -> Workbench:
        """This layer with its sample, for maps and their pruning."""
        sample = [self.read(self.text(self.size.batch_tokens)) for _ in range(max(tokens // self.size.batch_tokens, 1))]
        return Workbench(
            self.site.layer, self.shape, sample, lambda: RandomText(self, [self.site], tokens), TrainingConfig()
        )

    def statistics(self, layers: Sequence[int]) -> list[dict[str, SideStatistics]]:
        """Of each of these layers, on one batch."""
        batch = self.text(self.size.batch_tokens)
        seen = harvest([self.sites[layer] for layer in layers], batch.tokens_BT, batch.real_BT)
        return [side_statistics([inputs]) for inputs in seen]


@torch.no_grad()
def gpt2(size: Size) -> Any:
    """Random weights of this shape."""
    model: Any = GPT2LMHeadModel(
        GPT2Config(
            n_layer=size.model_layers, n_head=size.heads, n_embd=64 * size.heads, n_positions=size.context,
            vocab_size=size.vocabulary, bos_token_id=0, eos_token_id=0,
        )
    )  # fmt: skip
    for block in model.transformer.h:
        block.attn.c_attn.weight[:, : 2 * 64 * size.heads] *= SCALE
    return model


@torch.no_grad()
def llama(size: Size) -> Any:
    """The same with a rotary embedding."""
    model: Any = LlamaForCausalLM(
        LlamaConfig(
            num_hidden_layers=size.model_layers, num_attention_heads=size.heads, hidden_size=64 * size.heads,
            intermediate_size=4 * 64 * size.heads, max_position_embeddings=size.context, vocab_size=size.vocabulary,
        )
    )  # fmt: skip
    for block in model.model.layers:
        for projection in (block.self_attn.q_proj, block.self_attn.k_proj):
            projection.weight *= SCALE
    return model


class RandomText:
    """Endless harvests of a world's random text; its place is the world's, which all its texts share."""

    def __init__(self, world: World, sites: Sequence[AttentionSite], tokens: int) -> None:
        self.world, self.sites, self.tokens = world, sites, tokens

    def __next__(self) -> Harvest:
        batch = self.world.text(self.tokens)
        with plain_batches():
            seen = harvest(self.sites, batch.tokens_BT, batch.real_BT)
        layers = dict(zip([s.layer for s in self.sites], seen, strict=True))
        return Harvest(layers, batch, batch.tokens_BT.numel(), Padding(None))

    def state(self) -> dict[str, Any]:
        return {"at": self.world.at}

    def restore(self, state: dict[str, Any]) -> None:
        self.world.at = state["at"]


def job_of(
    layer: int, statistics: dict[str, SideStatistics], recipe: str, width: tuple[int, int], k: float
) -> Step1Job:
    """Step 1 of a layer as it is after its first steps: about k active features on either side, whatever the recipe."""
    values = {"recipe": recipe, "width": width[0], "width_key": width[1], "k": k}
    # A start from a few inputs of random text fires on these inputs alone.
    dictionary = DictionaryConfig(**values, start="random" if recipe == "default" else None)
    config = resolved(dictionary, TrainingConfig())
    query, key = (start(config, side, statistics[side], f"{recipe} {layer}", 0) for side in ("query", "key"))
    for side, transcoder in (("query", query), ("key", key)):
        if transcoder.activation == "relu":  # starts with every second feature active, and is sparse some steps later
            with torch.no_grad():
                pre = transcoder.pre(statistics[side].x_nD)
                transcoder.b_enc.sub_(kth_largest(pre, max(round(k * len(pre)), 1), pre.new_zeros(())))
    return Step1Job(layer, recipe, config, query, key)
