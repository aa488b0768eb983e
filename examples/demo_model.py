"""Make a small language model, and the text it learned from, to try qkscope on without a download.

    python examples/demo_model.py .demo        # .demo/model and .demo/stories.parquet, under two minutes on two cores

Notable:
- The stories are written by a seeded grammar that gives attention something to do: names that come back, pronouns that
  agree, titles before names, lost things that are found, quotations, and indirect objects ("When Mary and John went to
  the market, John gave the lamp to Mary").
- A word is a token, with the space before it, so decoding gives the text back and every name is one token.
- The model is a plain GPT-2 of transformers (3 layers, learned positions), trained in this file with a visible loop.
- Some pairs of names never meet in a story; the indirect-object test uses only those, so it cannot be remembered.
- The model is written last and in one rename: a folder `model` is always a complete one, and is not made twice.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

# Shapes: B stories in a batch, T tokens.

STORIES = 24_000
HELD_OUT = 1_000  # stories at the end of the file that the model never sees
LENGTH = (60, 112)  # tokens a story, at least and at most
TOKEN = r" ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]"  # a word, a number or a mark, with the space before it
CONTEXT = 128
LAYERS, WIDTH, HEADS = 3, 128, 4
STEPS, BATCH, RATE, WARMUP = 1_300, 12, 4e-3, 60
BOS, UNKNOWN, PAD = "<bos>", "<unk>", "<pad>"

# --- Words -----------------------------------------------------------------------------------------------------------


def words(text: str) -> list[str]:
    return text.split()


SHE = words("""Mary Alice Emma Sarah Anna Kate Lucy Jane Ruth Clara Ella Grace Helen Irene Julia Laura Martha Nora Olive
Paula Rose Sofia Tess Vera""")
HE = words("""John Tom James Peter Paul Mark Luke Adam Ben Carl David Eric Frank George Henry Ivan Jack Kevin Leo Martin
Oscar Robert Simon Victor""")
NAMES = SHE + HE
SURNAMES = words("Hill Brown Stone Wood Baker Miller Fisher Potter Taylor Cook Marsh Reed Frost Lane Field West")
TITLES = {"Mr": "he", "Mrs": "she", "Miss": "she", "Sir": "he", "Lady": "she"}
PLACES = words("""market store school park garden station library museum river beach harbour forest farm mill church
bakery hospital kitchen theatre village castle bridge cafe zoo""")
THINGS = words("""lamp drink book ring letter basket ball hat key map coin flower cake ribbon knife violin blanket
candle mirror bottle box cup picture ticket ladder hammer kite pencil clock necklace sandwich""")
ADJECTIVES = words("small red blue green golden silver wooden heavy broken dusty round shiny strange lovely cheap")
MOODS = words("happy sad tired hungry proud angry cold lonely curious afraid")
GIVE = words("gave handed passed showed lent offered sold brought sent returned")
LIKE = words("liked wanted needed loved missed admired")
SAY = words("said answered whispered replied shouted")
ASK = words("asked cried wondered")
GO = words("went walked ran hurried drove")
TIMES = words("morning evening afternoon night day winter summer")
MONTHS = words("January February March April May June July August September October November December")
WEATHER = words("rain snow wind sun fog storm")
REST = words("sat slept waited rested sang read")


@dataclass(frozen=True)
class Someone:
    """A person of a story: what to call them, and the pronoun that agrees."""

    name: str
    pronoun: str

    @property
    def her(self) -> str:
        return {"she": "her", "he": "him"}[self.pronoun]

    @property
    def hers(self) -> str:
        return {"she": "her", "he": "his"}[self.pronoun]


def kept_apart(a: str, b: str) -> bool:
    """Whether two first names never meet in a story (one pair in sixteen), which leaves them for the test."""
    return (NAMES.index(a) + NAMES.index(b)) % 16 == 5


def cast(rng: Random, size: int) -> list[Someone]:
    """People with different names, no two of them kept apart."""
    names: list[str] = []
    while len(names) < size:
        name = rng.choice(NAMES)
        if name not in names and not any(kept_apart(name, other) for other in names):
            names.append(name)
    return [Someone(name, "she" if name in SHE else "he") for name in names]


# --- Sentences -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scene:
    """What the sentences of one story share, so that they refer back to each other."""

    a: Someone
    b: Someone
    c: Someone
    titled: Someone
    place: str
    elsewhere: str
    thing: str
    other: str
    adjective: str


def scene(rng: Random) -> Scene:
    a, b, c = cast(rng, 3)
    title = rng.choice(list(TITLES))
    place, elsewhere = rng.sample(PLACES, 2)
    thing, other = rng.sample(THINGS, 2)
    titled = Someone(f"{title} {rng.choice(SURNAMES)}", TITLES[title])
    return Scene(a, b, c, titled, place, elsewhere, thing, other, rng.choice(ADJECTIVES))


def indirect_object(rng: Random, first: str, second: str, giver: str, place: str, thing: str) -> str:
    """The sentence up to where the name of the receiver stands: of the two who came, the one who does not give."""
    article = rng.choice(["the", "a"])
    opening = rng.choice(
        [
            f"When {first} and {second} {rng.choice(GO)} to the {place},",
            f"After {first} and {second} met at the {place},",
            f"While {first} and {second} were at the {place},",
            f"Then {first} and {second} had a long talk at the {place}, and",
            f"Then {first} and {second} {rng.choice(GO)} to the {place}, and",
            f"{first} and {second} worked at the {place}, where",
        ]
    )
    verb = rng.choice([*GIVE, "decided to give", "wanted to give"])
    return f"{opening} {giver} {verb} {article} {thing} to"


def giving(rng: Random, s: Scene) -> str:
    people = rng.sample([s.a, s.b, s.c], 2)
    giver, receiver = rng.sample(people, 2)
    start = indirect_object(rng, people[0].name, people[1].name, giver.name, s.place, rng.choice([s.thing, s.other]))
    return f"{start} {receiver.name}."


def opening(rng: Random, s: Scene) -> str:
    return rng.choice(
        [
            f"One {rng.choice(TIMES)} {s.a.name} {rng.choice(GO)} to the {s.place} with {s.b.name}.",
            f"{s.a.name} and {s.b.name} lived near the {s.place}.",
            f"On {rng.choice(MONTHS)} {rng.randint(1, 28)} {s.a.name} met {s.b.name} at the {s.place}.",
            f"{s.a.name} had a {s.adjective} {s.thing}, and {s.b.name} had a {s.other}.",
            f"There was a {s.adjective} {s.thing} in the {s.place}, and {s.a.name} {rng.choice(LIKE)} it.",
        ]
    )


def finding(rng: Random, s: Scene) -> str:
    loser, finder = rng.sample([s.a, s.b, s.c], 2)
    return (
        f"{loser.name} lost the {s.thing} near the {s.elsewhere}. "
        f"{finder.name} found the {s.thing} near the {s.elsewhere} and gave it back to {loser.name}."
    )


def feeling(rng: Random, s: Scene) -> str:
    who = rng.choice([s.a, s.b, s.c])
    return (
        f"{who.name} was {rng.choice(MOODS)}, so {who.pronoun} {rng.choice(REST)} by the {s.elsewhere} "
        f"with {who.hers} {rng.choice([s.thing, s.other])}."
    )


def talking(rng: Random, s: Scene) -> str:
    asker, teller = rng.sample([s.a, s.b, s.titled], 2)
    question, answer = rng.choice(
        [
            (f"Where is my {s.thing}?", f"Your {s.thing} is at the {s.elsewhere},"),
            (f"Who has the {s.thing}?", f"I gave the {s.thing} to {s.c.name},"),
            (f"Do you like the {s.other}?", f"I do not like the {s.other},"),
            (f"Will you come to the {s.elsewhere}?", f"We will go to the {s.elsewhere} with {s.c.name},"),
        ]
    )
    return f'"{question}" {rng.choice(ASK)} {asker.name}. "{answer}" {rng.choice(SAY)} {teller.name}.'


def meeting(rng: Random, s: Scene) -> str:
    who = rng.choice([s.a, s.b])
    return rng.choice(
        [
            f"At the {s.place} {who.name} met {s.titled.name}, and {s.titled.pronoun} told {who.her} of the {s.thing}.",
            f"{s.titled.name} came from the {s.elsewhere} to see {who.name}. {who.name} thanked {s.titled.name}.",
            f"{who.name} bought a {s.other} from {s.titled.name}, and {s.titled.name} thanked {who.name}.",
        ]
    )


def weather(rng: Random, s: Scene) -> str:
    kind = rng.choice(WEATHER)
    return (
        f"The {kind} came in {rng.choice(MONTHS)}. "
        f"Because of the {kind}, {s.a.name} and {s.b.name} stayed at the {s.elsewhere}."
    )


def ending(rng: Random, s: Scene) -> str:
    return rng.choice(
        [
            f"At the end of the {rng.choice(TIMES)} {s.a.name} and {s.b.name} were {rng.choice(MOODS)}.",
            f"{s.c.name} never saw the {s.adjective} {s.thing} again.",
            f"After that, {s.titled.name} kept the {s.thing}, and {s.b.name} kept the {s.other}.",
        ]
    )


MIDDLE: list[Callable[[Random, Scene], str]] = [finding, feeling, talking, meeting, weather]


def story(rng: Random) -> str:
    """One story: five or six parts about one scene, two or three of them with an indirect object."""
    s = scene(rng)
    givings: list[Callable[[Random, Scene], str]] = [giving] * rng.choice([2, 2, 3])
    parts = rng.sample(MIDDLE, 2) + givings
    rng.shuffle(parts)
    parts = [giving if rng.random() < 0.4 else opening, *parts]
    if len(parts) < 6 and rng.random() < 0.5:
        parts.append(ending)
    return " ".join(part(rng, s) for part in parts)


def stories(count: int, seed: int) -> list[str]:
    """`count` different stories, each of them within LENGTH."""
    rng = Random(seed)
    found: dict[str, None] = {}
    while len(found) < count:
        text = story(rng)
        if LENGTH[0] <= len(re.findall(TOKEN, text)) <= LENGTH[1]:
            found[text] = None
    return list(found)


# --- Tokens ----------------------------------------------------------------------------------------------------------


def make_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A token a word, number or mark, each with the space before it; the words are those of `texts`."""
    split = pre_tokenizers.Split(Regex(TOKEN), behavior="isolated")
    known = {token for text in texts for token in re.findall(TOKEN, f" {text}")}
    vocabulary = {token: i for i, token in enumerate([BOS, UNKNOWN, PAD, *sorted(known)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Prepend(" ")  # the first word of a text is the token it is elsewhere
    tokenizer.pre_tokenizer = split
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=BOS,
        unk_token=UNKNOWN,
        pad_token=PAD,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[list[int]]:
    """The texts as tokens, each with BOS in front."""
    bos = tokenizer.convert_tokens_to_ids(BOS)
    return [[bos, *ids] for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]


def pad(rows: list[list[int]], value: int) -> Tensor:
    """Rows of different lengths as one tensor [B, T], filled up at the end."""
    length = max(map(len, rows))
    return torch.tensor([row + [value] * (length - len(row)) for row in rows])


def batches(rows: list[list[int]], seed: int) -> Iterator[list[list[int]]]:
    """Batches without end, in a new order each time round; stories of like length together, to pad less."""
    rng = Random(seed)
    while True:
        order = rng.sample(range(len(rows)), len(rows))
        pool = 16 * BATCH
        groups = []
        for start in range(0, len(order) - BATCH + 1, pool):
            near = sorted(order[start : start + pool], key=lambda i: len(rows[i]))
            groups += [near[i : i + BATCH] for i in range(0, len(near) - BATCH + 1, BATCH)]
        rng.shuffle(groups)
        yield from ([rows[i] for i in group] for group in groups)


# --- The model -------------------------------------------------------------------------------------------------------


def make_model(tokenizer: PreTrainedTokenizerFast) -> GPT2LMHeadModel:
    bos = tokenizer.convert_tokens_to_ids(BOS)
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=CONTEXT,
        n_embd=WIDTH,
        n_layer=LAYERS,
        n_head=HEADS,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=bos,
        eos_token_id=bos,
        pad_token_id=tokenizer.convert_tokens_to_ids(PAD),
        use_cache=False,
    )
    return GPT2LMHeadModel(config)


def losses(model: GPT2LMHeadModel, rows: list[list[int]]) -> Tensor:
    """Cross-entropy of every token of the rows after its BOS, in nats, as one long vector."""
    # Padding stands at the end, where causal attention cannot see it from a real token: no mask is needed.
    tokens_BT = pad(rows, 0)
    target_BT = pad(rows, -100)[:, 1:]
    logits_BTV = model(tokens_BT[:, :-1]).logits
    each = torch.nn.functional.cross_entropy(logits_BTV.flatten(0, 1), target_BT.flatten(), reduction="none")
    return each[target_BT.flatten() != -100]


def rate(step: int, steps: int) -> float:
    """A linear rise, then a cosine down to a twentieth."""
    if step < WARMUP:
        return RATE * (step + 1) / WARMUP
    return RATE * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * (step - WARMUP) / max(1, steps - WARMUP))))


def train(model: GPT2LMHeadModel, rows: list[list[int]], steps: int, seed: int) -> None:
    """AdamW on batches of whole stories, with a line of progress now and then."""
    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim != 2]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.98))
    source = batches(rows, seed)
    tokens, mark = 0, time.perf_counter()
    model.train()
    for step in range(steps):
        batch = next(source)
        for group in optimizer.param_groups:
            group["lr"] = rate(step, steps)
        each = losses(model, batch)
        each.mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        tokens += each.numel()
        if (step + 1) % 50 == 0 or step + 1 == steps:
            now = time.perf_counter()
            print(
                f"step {step + 1:5d}/{steps}  loss {each.mean().item():.3f}  {tokens / (now - mark):,.0f} tokens/s",
                flush=True,
            )
            tokens, mark = 0, now
    model.eval()


# --- What it learned -------------------------------------------------------------------------------------------------


@torch.no_grad()
def held_out_loss(model: GPT2LMHeadModel, rows: list[list[int]]) -> float:
    """Mean cross-entropy of the rows, in nats a token."""
    return torch.cat([losses(model, rows[i : i + BATCH]) for i in range(0, len(rows), BATCH)]).mean().item()


def unigram_entropy(rows: list[list[int]]) -> float:
    """The least cross-entropy that a model without context could have on the rows, in nats a token."""
    counts = Counter(token for row in rows for token in row[1:])
    total = sum(counts.values())
    return -sum(n / total * math.log(n / total) for n in counts.values())


@dataclass(frozen=True)
class ReceiverScore:
    """The slot after "to", on prompts with two names that never met in training."""

    top1: float
    """Share of prompts where the receiver is the most likely of all words."""
    preferred: float
    """Share of prompts where the receiver is more likely than the giver; by chance 0.5."""
    name: float
    """Share of prompts where the most likely word is one of the two names."""


@torch.no_grad()
def receiver_score(model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, count: int, seed: int) -> ReceiverScore:
    """How well the model names the receiver, and not the giver, in `count` prompts."""
    rng = Random(seed)
    pairs = [(a, b) for a in NAMES for b in NAMES if a != b and kept_apart(a, b)]
    prompts, names = [], []
    for _ in range(count):
        first, second = rng.choice(pairs)
        giver, receiver = rng.sample([first, second], 2)
        prompts.append(indirect_object(rng, first, second, giver, rng.choice(PLACES), rng.choice(THINGS)))
        names.append([tokenizer.convert_tokens_to_ids(f" {name}") for name in (receiver, giver)])
    rows = encode(tokenizer, prompts)
    last = torch.tensor([len(row) - 1 for row in rows])
    logits_BV = model(pad(rows, 0)).logits[torch.arange(count), last]
    answer = torch.tensor(names)
    best = logits_BV.argmax(-1)
    receiver_B, giver_B = logits_BV.gather(1, answer).unbind(1)
    return ReceiverScore(
        top1=(best == answer[:, 0]).float().mean().item(),
        preferred=(receiver_B > giver_B).float().mean().item(),
        name=(best[:, None] == answer).any(1).float().mean().item(),
    )


# --- Files -----------------------------------------------------------------------------------------------------------


def write_stories(texts: list[str], path: Path) -> None:
    """One parquet file with the column `text`, there whole or not at all."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        pq.write_table(pa.table({"text": texts}), partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_model(model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, path: Path) -> None:
    """The folder that `from_pretrained` reads, there whole or not at all."""
    partial = Path(tempfile.mkdtemp(prefix=".model-", dir=path.parent))
    try:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        partial.chmod(0o755)
        partial.rename(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Make a small language model and the text it learned from.")
    parser.add_argument("folder", type=Path, help="where model/ and stories.parquet go")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stories", type=int, default=STORIES)
    parser.add_argument("--steps", type=int, default=STEPS)
    args = parser.parse_args()
    if args.stories < 2 * HELD_OUT:
        parser.error(f"--stories is {args.stories}; at least {2 * HELD_OUT} are needed")
    text_path, model_path = args.folder / "stories.parquet", args.folder / "model"
    if model_path.exists() and text_path.exists():
        print(f"{model_path} and {text_path} are there already; remove {args.folder} to make them anew")
        return
    start = time.perf_counter()
    args.folder.mkdir(parents=True, exist_ok=True)
    texts = stories(args.stories, args.seed)
    write_stories(texts, text_path)
    print(f"{text_path}: {len(texts):,} stories, for example:\n  {texts[0]}")
    if model_path.exists():
        print(f"{model_path} is there already; remove it to train anew")
        return

    torch.manual_seed(args.seed)
    tokenizer = make_tokenizer(texts)
    rows = encode(tokenizer, texts)
    learned, held_out = rows[:-HELD_OUT], rows[-HELD_OUT:]
    model = make_model(tokenizer)
    lengths = [len(row) for row in rows]
    print(
        f"{sum(lengths):,} tokens, {min(lengths)} to {max(lengths)} a story, {len(tokenizer)} words; "
        f"{model.num_parameters():,} parameters, {args.steps} steps of {BATCH} stories"
    )
    train(model, learned, args.steps, args.seed)
    score = receiver_score(model, tokenizer, 2_000, args.seed + 1)
    write_model(model, tokenizer, model_path)
    print(
        f"held-out cross-entropy {held_out_loss(model, held_out):.3f} nats a token "
        f"(without context: {unigram_entropy(held_out):.3f})\n"
        f"indirect object, two names that never met: the right word {score.top1:.3f}, one of the two names "
        f"{score.name:.3f}, receiver before giver {score.preferred:.3f} (chance 0.500)\n"
        f"{model_path} written after {time.perf_counter() - start:.0f} s"
    )


if __name__ == "__main__":
    main()
