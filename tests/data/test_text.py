"""Text: tokens and back, what the shipped sentences are, and what is said when a file is bad."""

from __future__ import annotations

import importlib.util
import struct
import zlib
from pathlib import Path
from types import ModuleType

import pytest
import torch

from invlib import data
from invlib.data import text
from invlib.errors import ConfigError, DataError


def script() -> ModuleType:
    path = data.resource("vocabulary.txt").with_name("make_text.py")
    spec = importlib.util.spec_from_file_location("make_text", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_tokens_are_words_marks_and_titles() -> None:
    found = text.tokens('"Mr. Knightley--you\'ve _not_ 3 well-known. (St. James!)"')
    assert found == ["mr.", "knightley", "--", "you've", "not", "well", "known", ".", "st.", "james", "!"]


def test_vocabulary_is_2000_different_words_the_frequent_ones_first() -> None:
    words = data.vocabulary()
    assert len(words) == len(set(words)) == 2000
    assert words[:7] == ("<pad>", "<unk>", ",", ".", "the", "to", "and")


def test_sentences_are_known_words_and_come_back_from_their_numbers() -> None:
    found = data.sentences()
    assert len(found) == len(set(found)) > 500
    for sentence in found:
        numbers = data.encode(sentence)
        assert 4 <= len(numbers) <= 32
        assert numbers.min() > 1
        assert data.decode(numbers) == sentence
        assert sentence[-1] in ".!?"
    assert set(data.sentences(6, 6)) == {s for s in found if len(data.encode(s)) == 6}


def test_text_files_are_small() -> None:
    assert sum(data.resource(f"{name}.txt").stat().st_size for name in ("vocabulary", "sentences")) < 200_000


def test_encode_pads_in_front_and_cuts_in_front() -> None:
    numbers = data.encode("I was not there.")
    assert numbers.dtype == torch.int64
    assert [data.vocabulary()[n] for n in numbers] == ["i", "was", "not", "there", "."]
    assert data.encode("I was not there.", 7).tolist() == [0, 0, *numbers.tolist()]
    assert data.encode("I was not there.", 2).tolist() == numbers[-2:].tolist()
    both = data.encode(["I was not there.", "No xylophone"])
    assert both.shape == (2, 5)
    assert both[0].tolist() == numbers.tolist()
    assert both[1].tolist() == [0, 0, 0, *data.encode("no").tolist(), 1]
    assert data.decode(both[1]) == "no <unk>"
    assert data.encode(data.decode(both[1])).tolist() == both[1, 3:].tolist()


@pytest.mark.parametrize("empty", ["", "12 (3)", [], ["yes", ""]])
def test_encode_refuses_a_text_without_a_word(empty: object) -> None:
    with pytest.raises(ConfigError, match="expected at least one word"):
        data.encode(empty)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("numbers", "wrong"),
    [
        (torch.tensor([2000]), "run from 2000 to 2000; expected 0 to 1999"),
        (torch.tensor([-1, 3]), "run from -1 to 3"),
        (torch.tensor([1.0]), "float32 .1,.; expected integers"),
        (torch.tensor([[1]]), "int64 .1, 1.; expected integers"),
    ],
)
def test_decode_refuses_what_is_no_text(numbers: torch.Tensor, wrong: str) -> None:
    with pytest.raises(ConfigError, match=wrong):
        data.decode(numbers)


def test_sentences_refuses_lengths_that_none_has() -> None:
    with pytest.raises(ConfigError, match="no sentence has 1 to 3 tokens"):
        data.sentences(1, 3)


def test_missing_training_text_names_the_command(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"austen_train.txt cannot be read .*make_text.py --training"):
        text.training_text(tmp_path)
    (tmp_path / "austen_train.txt").write_text("too short.")
    with pytest.raises(DataError, match="has 3 tokens; expected a text of 1,000"):
        text.training_text(tmp_path)
    (tmp_path / "austen_train.txt").write_text("she was. " * 400)
    assert text.training_text(tmp_path).shape == (1200,)


def test_the_script_reads_lines_and_leaves_headings_out(tmp_path: Path) -> None:
    lines = (
        ["CHAPTER I", "", "He was well."]
        + ["She was not well, but he was well."] * 9
        + ["He was not.", "FINIS"]
    )
    raw = b"X\n" + struct.pack(">iiii", 3, 0, 16, len(lines))
    raw += b"".join(b"\0\4\0\x09" + struct.pack(">i", len(line)) + line.encode() for line in lines)
    (tmp_path / "Rdata.rdb").write_bytes(2 * (struct.pack(">i", len(raw)) + zlib.compress(raw)))
    make = script()
    training, held = make.parts(tmp_path / "Rdata.rdb")
    novel = text.tokens(" ".join(lines[2:-1]))
    half = len(training) // 2
    assert training[:half] == novel[:half]
    assert training[:half] + held[: len(held) // 2] == novel
    files = make.made(training, held)
    assert files["vocabulary.txt"].split()[:4] == ["<pad>", "<unk>", "was", "well"]
    assert files["sentences.txt"].splitlines() == ["he was not."]
