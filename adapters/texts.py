"""Checks that no word of a text is lost unnoticed on its way to the text encoder.

The text path of IF's pipelines cleans captions by default. The cleaning was made for captions from
the web: it drops HTML tags, mentions, numbers that look like article ids, and all Chinese.
"""

import html
import logging
import os
import re
import unicodedata
import warnings
from collections.abc import Iterable, Iterator, Mapping
from difflib import SequenceMatcher
from functools import cache
from itertools import islice
from typing import TYPE_CHECKING
from urllib.parse import unquote_plus

from adapters.errors import UserError, listed, quote
from adapters.progress import Bar

if TYPE_CHECKING:
    from diffusers import IFPipeline
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

KEEP_IN_PYTHON = "clean_caption=False (--no-clean-caption on the command line)"
"""The setting that turns cleaning off outside a recipe."""

WORD = re.compile(r"[^\W_]+")
"""A word that cleaning must keep; quotes, punctuation and spaces may change."""

TAG = re.compile(r"</?(\w[\w-]*)[^<>]*>")
"""An HTML tag, with its name."""

WORDS_READ = 100
"""The number of a caption's words that are compared, more than the tokens the encoder reads."""

QUOTED_LENGTH = 80
"""The number of characters of a caption that a message quotes."""

LONGEST_TEXT = 10_000
"""The most letters of a text: the encoder reads some hundred words, and cleaning takes a time that
grows with the square of the length of a word."""

_said: set[str] = set()
"""Lost words that this process has named in a message, so as not to repeat them."""


def check_captions(captions: Mapping[str, str], *, clean_caption: bool, setting: str) -> None:
    """Refuse captions that cleaning empties, and warn once of words that the others lose.

    Each caption comes with its place, such as ``data.prompt``, for messages, which also name the
    setting that turns cleaning off.

    Raises:
        UserError: if a caption has only invisible characters or some that no text may have, or
            cleaning leaves no word of it.
    """
    for caption, place in captions.items():
        if caption and (flaw := find_flaw(caption)):
            raise UserError(f"The text of {place} {flaw}.")
    if not clean_caption:
        return
    lost: dict[str, tuple[str, ...]] = {}
    emptied = []
    for caption in filter(None, Bar(captions, "Checking captions", delay=2)):
        cleaned = clean(caption)
        if not cleaned or (WORD.search(caption) and not WORD.search(cleaned)):
            emptied.append(caption)
        elif words := find_lost_words(caption, cleaned):
            lost[caption] = words
    if emptied:
        others = f", nor of {len(emptied) - 1} more captions" if emptied[1:] else ""
        raise UserError(
            f"Cleaning captions as IF does leaves no word of {captions[emptied[0]]}"
            f" {_quote(emptied[0])}{others}; use other words, or keep these with {setting}."
        )
    _say("Cleaning drops", lost, captions, f"{setting} keeps them.")


def check_vocabulary(
    captions: Mapping[str, str], tokenizer: "PreTrainedTokenizerBase", *, clean_caption: bool
) -> None:
    """Warn once of words that the tokenizer does not know and maps to one and the same token."""
    words = {
        caption: dict.fromkeys(_words_and_symbols(clean(caption) if clean_caption else caption))
        for caption in captions
    }
    distinct = list(dict.fromkeys(word for own in words.values() for word in own))
    if not distinct:
        return
    tokens = tokenizer(distinct, add_special_tokens=False).input_ids
    unknown = {
        word for word, ids in zip(distinct, tokens, strict=True) if tokenizer.unk_token_id in ids
    }
    lost = {
        caption: tuple(word for word in own if word in unknown) for caption, own in words.items()
    }
    _say(
        "The tokenizer does not know",
        lost,
        captions,
        "to the model, all unknown words are one and the same.",
    )


def clean(caption: str) -> str:
    """Clean a caption as ``IFPipeline.encode_prompt(…, clean_caption=True)`` does."""
    with warnings.catch_warnings(action="ignore"):  # of captions that look like paths or addresses
        return _pipeline()._text_preprocessing(caption, clean_caption=True)[0]


def find_lost_words(caption: str, cleaned: str) -> tuple[str, ...]:
    """Find the distinct words of a caption that cleaning drops, in lower case.

    Case, punctuation, quotes, spaces, HTML entities and closed HTML tags do not count.

    Example:
        >>> from adapters.texts import clean, find_lost_words
        >>> caption = "A <b>photo</b> of “j0hn”, dog &amp; cat #3"
        >>> find_lost_words(caption, clean(caption))
        ('j0hn', '#3')
    """
    chunks = _plain_text(caption).split()
    words = [(word, chunk) for chunk in chunks for word in WORD.findall(chunk)][:WORDS_READ]
    kept = WORD.findall(cleaned)[:WORDS_READ]
    matcher = SequenceMatcher(None, [word for word, _ in words], kept, autojunk=False)
    dropped = [
        chunk.strip("\"'.,:;!?()[]*")
        for edit, start, end, _, _ in matcher.get_opcodes()
        if edit in ("delete", "replace")
        for _, chunk in words[start:end]
    ]
    return tuple(dict.fromkeys(dropped))


def find_flaw(text: str) -> str | None:
    """Say what is wrong with a text that shows nothing or cannot be written; ``None``: nothing.

    Example:
        >>> from adapters.texts import find_flaw
        >>> find_flaw(" ")
        'has no visible character (found SPACE); write some text'
    """
    if not text:
        return "is empty; write some text"
    if len(text) > LONGEST_TEXT:
        return f"has {len(text):,} letters, more than {LONGEST_TEXT:,}; shorten it"
    if "\0" in text:
        return f"has a NUL character (in {_quote(text)}); leave it out"
    if any(unicodedata.category(character) == "Cs" for character in text):  # a lone surrogate
        return f"has a byte that is not UTF-8 (in {_quote(text)}); write it again in UTF-8"
    if all(unicodedata.category(character)[0] in "CZ" for character in text):
        names = (unicodedata.name(character, f"U+{ord(character):04X}") for character in text)
        found = listed(dict.fromkeys(names), 3)
        return f"has no visible character (found {found}); write some text"
    return None


@cache
def _pipeline() -> "IFPipeline":
    """Build a pipeline without components, which cleans captions as any other does."""
    from diffusers import IFPipeline

    return IFPipeline(*[None] * 7, requires_safety_checker=False)


def _plain_text(caption: str) -> str:
    """Decode a caption as cleaning does, in lower case, without closed HTML tags."""
    import ftfy
    from bs4.builder import HTMLTreeBuilder

    never_closed = HTMLTreeBuilder.DEFAULT_EMPTY_ELEMENT_TAGS or set()  # such as <br>
    text = html.unescape(html.unescape(unquote_plus(unquote_plus(caption))))
    text = ftfy.fix_text(text).lower().replace("\\n", " ")
    closed = {tag[1] for tag in TAG.finditer(text) if tag[0].startswith("</")} | never_closed
    return TAG.sub(lambda tag: "" if tag[1] in closed else tag[0], text)


def _words_and_symbols(text: str) -> Iterator[str]:
    """Yield the words of a text, and each of its symbols, such as emoji."""
    yield from WORD.findall(text.lower())
    yield from (character for character in text if unicodedata.category(character) == "So")


def _say(
    what: str, lost: Mapping[str, Iterable[str]], captions: Mapping[str, str], advice: str
) -> None:
    """Log newly lost words, in the first process of a launch only so that they are logged once."""
    lost = {caption: words for caption, words in lost.items() if words}
    new = dict.fromkeys(word for words in lost.values() for word in words if word not in _said)
    if not new:
        return
    _said.update(new)
    examples = [
        f"{captions[caption]} {_quote(caption)}"
        for caption, words in lost.items()
        if not new.keys().isdisjoint(words)
    ]
    if os.environ.get("RANK", "0") == "0":
        logger.warning(
            "%s %s in %d of %d captions, such as %s; %s",
            *(what, listed(map(repr, new)), len(lost), len(captions)),
            *("; ".join(islice(examples, 3)), advice),
        )


def _quote(caption: str) -> str:
    return repr(caption if len(caption) <= QUOTED_LENGTH else f"{caption[:QUOTED_LENGTH]}…")


def check_texts(texts: Iterable[object]) -> None:
    """Raise a UserError if one of the texts is not a string, or cannot be written.

    It may be empty, as negative prompts often are.
    """
    for text in texts:
        if not isinstance(text, str):
            raise UserError(f"A prompt must be a string (got {quote(text)}); give one or several.")
        if text and (flaw := find_flaw(text)):
            raise UserError(f"A prompt {flaw}.")
