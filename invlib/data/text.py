"""Text to attack and to train on: a vocabulary, sentences that no training saw, words to numbers and back.

A text is lower-case words and punctuation marks, each a token; quotation marks, figures and hyphens fall
away. Source of the words and sentences: the six novels of Jane Austen, in the public domain.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from invlib.data.datasets import data_folder, resource
from invlib.errors import ConfigError, DataError
from invlib.settings import Count, checked

NAME, SLUG = "Austen", "austen"
TITLE = "six novels of Jane Austen (public domain)"
PAD, UNKNOWN = "<pad>", "<unk>"
_TOKEN = re.compile(r"<pad>|<unk>|\b(?:mr|mrs|dr|st)\.|[a-z]+(?:'[a-z]+)*|--|[.,;:!?]")
_TRAINING = f"{SLUG}_train.txt"


def tokens(text: str) -> list[str]:
    """Return the words and punctuation marks of a text, in lower case.

    >>> tokens("Mr. Darcy's well-known letter!")
    ['mr.', "darcy's", 'well', 'known', 'letter', '!']
    """
    return _TOKEN.findall(checked("text", text, str).lower())


@cache
def vocabulary() -> tuple[str, ...]:
    """Return the 2,000 tokens that the shipped text model knows, by number.

    Number 0 is ``<pad>`` and 1 ``<unk>``, which stands for every other word; then the most frequent come
    first.

    Raises:
        DataError: The file is missing or corrupt.

    Taught in: chapter 6
    """
    words = tuple(_lines("vocabulary.txt"))
    if words[:2] != (PAD, UNKNOWN) or len(set(words)) != len(words):
        raise DataError(f"vocabulary.txt starts {words[:2]}; expected {PAD}, {UNKNOWN} and different words")
    return words


def sentences(least: int = 1, most: int = 32) -> list[str]:
    """Return sentences that the shipped text model was not trained on, all of whose words it knows.

    Args:
        least: Tokens that a sentence has at least, the full stop counted.
        most: Tokens that it has at most.

    Raises:
        ConfigError: No sentence is that long.
        DataError: The file is missing or corrupt.

    Taught in: chapter 6
    """
    checked("sentences least", least, Count)
    checked("sentences most", most, Count)
    found = [line for line in _lines("sentences.txt") if least <= len(tokens(line)) <= most]
    if not found:
        raise ConfigError(f"no sentence has {least} to {most} tokens; expected a range within 4 to 32")
    return found


def encode(text: str | Sequence[str], length: int | None = None) -> Tensor:
    """Return the numbers of a text's tokens in `vocabulary`.

    Args:
        text: A text, or several.
        length: Tokens in the result: a longer text loses its first ones, and before a shorter one comes
            ``<pad>``, so that the last one stays last. None takes the text's own, of several the longest's.

    Returns:
        int64 (T,), for several texts (N, T).

    Raises:
        ConfigError: A text has no token.

    Taught in: chapter 6
    """
    checked("encode length", length, Count | None)
    number = {word: index for index, word in enumerate(vocabulary())}
    rows = [[number.get(token, 1) for token in tokens(one)] for one in _several(text)]
    if not rows or not all(rows):
        raise ConfigError(f"text is {text!r}; expected at least one word or punctuation mark in each text")
    size = max(map(len, rows)) if length is None else length
    padded = torch.tensor([[0] * (size - len(row)) + row[-size:] for row in rows])
    return padded[0] if isinstance(text, str) else padded


def decode(numbers: Tensor | Sequence[int]) -> str:
    """Return the text of tokens by number, int (T,), with ``<pad>`` left out.

    >>> decode(encode("She was not there, but I was."))
    'she was not there, but i was.'

    Raises:
        ConfigError: The numbers are not one text's, or outside the vocabulary.
    """
    words, given = vocabulary(), torch.as_tensor(numbers)
    if given.ndim != 1 or given.is_floating_point() or given.is_complex():
        raise ConfigError(f"tokens are {given.dtype} {tuple(given.shape)}; expected integers (T,)")
    if len(given) and not (int(given.min()) >= 0 and int(given.max()) < len(words)):
        raise ConfigError(
            f"tokens run from {int(given.min())} to {int(given.max())}; expected 0 to {len(words) - 1}"
        )
    joined = " ".join(words[index] for index in given.tolist() if index)
    return re.sub(r" ([.,;:!?])", r"\1", joined)


def training_text(root: str | os.PathLike[str] | None = None) -> Tensor:
    """Return the text that the shipped model was trained on as one row of numbers, int64 (T,).

    Args:
        root: The folder of the file that ``data/make_text.py --training`` writes, before ``INVLIB_DATA``.

    Raises:
        DataError: The file is missing or has too little text.
    """
    path = data_folder(root) / _TRAINING
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path} cannot be read ({type(error).__name__}); make it from the novels with "
            f"python data/make_text.py --training {path.parent}, and set INVLIB_DATA to that folder"
        ) from error
    if len(tokens(text)) < 1000:
        raise DataError(f"{path} has {len(tokens(text))} tokens; expected a text of 1,000 or more")
    return encode(text)


def _several(text: str | Sequence[str]) -> list[str]:
    return [text] if isinstance(text, str) else list(checked("encode text", text, str | Sequence[str]))


def _lines(name: str) -> list[str]:
    path: Path = resource(name)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    if not lines or not all(lines):
        raise DataError(f"{path} is empty or has an empty line; expected text in every line")
    return lines
