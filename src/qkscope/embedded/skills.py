"""What an embedded model can do, on held-out stories: the next token right where the text before decides it.

python -m qkscope.embedded.skills            # a table for each of the embedded models
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from ..config import DataConfig
from ..data.documents import Document, open_documents
from ..data.stories import NAMES, Story, story_of, token_roles, words
from ..evaluate.figures import ratio_figure

# name: role of the token to be predicted
SKILLS = {
    "indirect object": "indirect_object",
    "repeated phrase, from the second token on": "repeat",
    "closing bracket": "bracket_close",
    "closing quotation mark": "quote_close",
    "agreement": "verb",
    "next day's date": "next_day",
    "next day's number, in a diary": "next_day",
    "next day's number, elsewhere": "next_day",
    "list told over again": "list_again",
}
PAIRS = dict(words.BE) | dict(words.DOES) | {b: a for a, b in (*words.BE, *words.DOES)}
BATCH = 32


@torch.no_grad()
def skills(model: Any, tokenizer: Any, documents: int = 1000) -> dict[str, Any]:
    """Cross-entropy (nats a token) beside the corpus's own, and the share right of each skill, on held-out documents
    that fit the context; 95 % intervals over documents.

    Agreement: the right form of the verb is likelier than the other one. Elsewhere: the right token is the likeliest.
    """
    stories = open_documents(DataConfig(source="embedded")).stream("heldout", 0, 0)
    totals: dict[str, list[tuple[float, float]]] = {name: [] for name in ("cross-entropy", "corpus", *SKILLS)}
    for texts in _batches(_whole(stories, tokenizer), documents):
        encoded = tokenizer([s.text for s in texts], add_special_tokens=False, return_offsets_mapping=True)
        rows = [[tokenizer.bos_token_id, *ids] for ids in encoded["input_ids"]]
        longest = max(map(len, rows))
        ids = torch.tensor([row + [tokenizer.pad_token_id] * (longest - len(row)) for row in rows])
        log_probability = model(ids).logits[:, :-1].log_softmax(-1)
        right = log_probability.argmax(-1) == ids[:, 1:]
        nats = -log_probability.gather(2, ids[:, 1:, None])[..., 0]
        for b, story in enumerate(texts):
            t = len(rows[b]) - 1
            totals["cross-entropy"].append((float(nats[b, :t].sum()), t))
            totals["corpus"].append((story.nats, t))
            roles = token_roles(story.text, story.spans, encoded["offset_mapping"][b]).roles_TR
            for name, role in SKILLS.items():
                if name == "agreement":
                    good = _agreement(tokenizer, story, ids[b, 1:], log_probability[b], roles)
                else:
                    asked = roles[:, NAMES.index(role)]
                    if name == "indirect object":  # not the rest of a long name, nor a surname after its title
                        asked[1:] &= roles[:-1, NAMES.index("preposition")]
                    if "number" in name:
                        asked = asked & roles[:, NAMES.index("day_number")]
                        asked &= story.text.startswith("Diary") == ("diary" in name)
                    good = right[b, :t].numpy()[asked]
                totals[name].append((float(np.sum(good)), len(good)))
    found = {name: torch.tensor(values, dtype=torch.float64).unbind(1) for name, values in totals.items()}
    return {name: ratio_figure(sums, weights) for name, (sums, weights) in found.items()}


def _whole(documents: Iterator[Document], tokenizer: Any) -> Iterator[Story]:
    """The stories that fit into one context: of a story that is cut, `nats` says nothing."""
    for document in documents:
        if len(tokenizer(document.text)["input_ids"]) < tokenizer.model_max_length:
            yield story_of(document.index)


def _batches(stories: Iterator[Story], documents: int) -> Iterator[list[Story]]:
    for start in range(0, documents, BATCH):
        yield list(itertools.islice(stories, min(BATCH, documents - start)))


def _agreement(
    tokenizer: Any, story: Any, ids_T: torch.Tensor, log_probability_TV: torch.Tensor, roles_TR: np.ndarray
) -> list[bool]:
    found = []
    agreeing = roles_TR[:, NAMES.index("verb_singular")] | roles_TR[:, NAMES.index("verb_plural")]
    for t in np.flatnonzero(agreeing):
        word = tokenizer.decode([int(ids_T[t])])
        other = tokenizer.convert_tokens_to_ids("Ġ" + PAIRS[word.strip()])
        found.append(bool(log_probability_TV[t, ids_T[t]] > log_probability_TV[t, other]))
    return found


def main() -> None:
    from ..models import load_model
    from . import EMBEDDED_MODELS

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=list(EMBEDDED_MODELS), help="names or folders")
    parser.add_argument("--documents", type=int, default=1000)
    parser.add_argument("--json", default=None)
    args = parser.parse_args()
    found = {name: skills(*load_model(name), documents=args.documents) for name in args.models}
    for name, table in found.items():
        print(f"{name}, {args.documents} held-out documents")
        for skill, figure in table.items():
            low, high = figure["ci95"]
            print(f"  {skill:<44}{figure['mean']:.4f}  [{low:.4f}, {high:.4f}]")
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            file.write(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
