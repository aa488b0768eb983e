"""The embedded models' tokenizer: a word is a token, with the space before it; any other text falls back to bytes.

Names of several tokens are in `data/stories/words.py`. Decoding gives every text back.
"""

from __future__ import annotations

import re
from collections import Counter

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ..data.stories import story_of, words

PIECE = r" ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]|\s"  # a word, a number, a mark, each with the space before it
SAMPLE = 4000  # documents whose words make the vocabulary: every word of the grammar is in them
BOS, PAD, UNKNOWN = "<bos>", "<pad>", "<unk>"
WORD_SCORE, BYTE_SCORE = -1.0, -20.0  # log-probabilities: the fewest pieces win, bytes only where nothing else is


def make_tokenizer(context: int) -> PreTrainedTokenizerFast:
    """The tokenizer, made from the corpus itself; always the same one."""
    counts = Counter(piece for i in range(SAMPLE) for piece in re.findall(PIECE, story_of(i).text))
    long = {f"{space}{name}" for name in words.LONG_NAMES for space in ("", " ")}
    parts = {f" {parts[0]}" for parts in words.LONG_NAMES.values()}
    parts |= {part for parts in words.LONG_NAMES.values() for part in parts[1:]}
    pieces = sorted({*(p for p in counts if p not in long), *parts}, key=lambda p: (-counts[p], p))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    as_bytes = [byte_level.pre_tokenize_str(piece)[0][0] for piece in pieces]
    single = sorted(set(pre_tokenizers.ByteLevel.alphabet()) - set(as_bytes))
    vocabulary = [(UNKNOWN, -100.0), (BOS, 0.0), (PAD, 0.0)]
    vocabulary += [(p, WORD_SCORE) for p in as_bytes] + [(b, BYTE_SCORE) for b in single]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(  # type: ignore[assignment]
        [pre_tokenizers.Split(Regex(PIECE), "isolated"), byte_level]
    )
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, pad_token=PAD, unk_token=UNKNOWN, model_max_length=context,
        clean_up_tokenization_spaces=False,
    )  # fmt: skip
