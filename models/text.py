"""The text side of the embedded cascade: its tokenizer, and every caption of the world as tokens.

The vocabulary has the world's words, and single characters, so that any text can be tokenised.
"""

import string

import torch
from torch import Tensor
from transformers import T5Tokenizer

from models.world import BACKGROUNDS, FORMS, THINGS, fill, words

MAX_TOKENS = 77
SPACE = "▁"
"""SentencePiece's mark for the beginning of a word."""
WORD_SCORE, CHARACTER_SCORE = -1.0, -20.0
"""The unigram model's log probabilities; the low one for characters keeps known words whole."""


def make_tokenizer() -> T5Tokenizer:
    """Build a T5 tokenizer of the world's vocabulary: <pad> 0, </s> 1, <unk> 2, words, letters."""
    characters = [SPACE, *string.ascii_letters, *string.digits, *string.punctuation]
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    vocabulary += [(SPACE + word, WORD_SCORE) for word in words()]
    vocabulary += [(character, CHARACTER_SCORE) for character in characters]
    return T5Tokenizer(vocab=vocabulary, extra_ids=0, model_max_length=MAX_TOKENS)


def tokenize(tokenizer: T5Tokenizer, texts: list[str]) -> Tensor:
    """Turn texts into token ids, [len(texts), T] int64, padded to the model's length."""
    batch = tokenizer(texts, padding="max_length", max_length=MAX_TOKENS, truncation=True)
    return torch.tensor(batch["input_ids"])


def caption_table(tokenizer: T5Tokenizer) -> Tensor:
    """Tokenize every caption of the world: [forms, things, backgrounds, T] int16."""
    texts = [
        fill(form.text, thing, background)
        for form in FORMS
        for thing in range(len(THINGS))
        for background in range(len(BACKGROUNDS))
    ]
    ids = tokenize(tokenizer, texts).short()
    return ids.view(len(FORMS), len(THINGS), len(BACKGROUNDS), MAX_TOKENS)
