"""Training on text: it learns, it goes on where it stopped, and its card can be measured anew."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from invlib import cli, data, models
from invlib.core.normalization import UNIT
from invlib.data import text
from invlib.errors import ConfigError
from invlib.models import cards, training
from invlib.models.cards import Trained
from invlib.models.decoder import TextDecoder

# After 2 comes 3, after 3 comes 4, ... and after 6 comes 2; 7 never comes.
CIRCLE = torch.arange(3000) % 5 + 2
SENTENCES = [torch.tensor([2, 3, 4]), torch.tensor([5, 6, 2, 3, 4]), torch.tensor([4, 5, 6])]


def fit(tokens: Tensor = CIRCLE, **changes: Any) -> Trained:
    settings: dict[str, Any] = {"num_classes": 8, "epochs": 2, "batch_size": 8, "lr": 3e-3, "progress": False}
    return training.train_text("TextDecoder", tokens, SENTENCES, **settings | changes)


def test_learns_what_comes_next() -> None:
    trained = fit(half=True)
    assert trained.card["accuracy"] == 1
    assert trained.card["perplexity"] < 1.5
    assert trained.card["train_words"] == 3000
    assert trained.card["stored"] == "float16"
    assert trained.model(torch.tensor([[2, 3, 4, 5], [3, 4, 5, 6]])).argmax(1).tolist() == [6, 2]
    for parameter in trained.model.parameters():
        assert torch.equal(parameter, parameter.half().float())


def test_accuracy_and_perplexity_of_a_network_that_knows_nothing() -> None:
    model = TextDecoder(num_classes=8, width=8, heads=2)
    torch.nn.init.zeros_(model.head.weight)
    with torch.no_grad():
        model.head.bias[3] = 1e-6
    measured = training.next_word(model, SENTENCES)
    assert measured == {"accuracy": 0.25, "perplexity": 8.0}  # of eight words two are a 3
    with torch.no_grad():
        model.head.bias[3] = math.log(8)  # 8/15 for the 3, 1/15 for each other
    assert training.next_word(model, SENTENCES)["perplexity"] == pytest.approx(15 / 8**0.25, abs=0.01)
    assert model.training


def test_unknown_words_are_read_and_not_predicted() -> None:
    tokens = CIRCLE.clone()
    tokens[::5] = 1  # every 2
    model = fit(tokens, epochs=1).model
    assert model(torch.tensor([[1, 3]])).argmax(1).tolist() == [4]
    assert model(torch.tensor([[4, 5, 6]])).softmax(1)[0, 1] < 0.2


def test_resumed_training_ends_where_the_uninterrupted_one_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, real = fit(), cards.write_checkpoint

    def stop(*args: Any) -> None:
        real(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(cards, "write_checkpoint", stop)
    with pytest.raises(KeyboardInterrupt):
        fit(resume=tmp_path / "c")
    monkeypatch.undo()
    for a, b in zip(whole.model.parameters(), fit(resume=tmp_path / "c").model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_half_precision_halves_the_file_and_comes_back_as_float32(tmp_path: Path) -> None:
    trained = fit(epochs=1, half=True)
    cards.save(trained, tmp_path / "half.safetensors")
    size = (tmp_path / "half.safetensors").stat().st_size
    assert 2 <= size / models.parameter_count(trained.model) < 2.1
    loaded = cards.load(tmp_path / "half.safetensors")
    for a, b in zip(trained.model.parameters(), loaded.model.parameters(), strict=True):
        assert b.dtype == torch.float32
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("tokens", "changes", "wrong"),
    [
        (CIRCLE, {"num_classes": 6}, "tokens run from 2 to 6; expected 0 to 5"),
        (CIRCLE[:200], {}, "the text has 200 tokens; expected 297 or more for batch_size=8"),
        (CIRCLE.float(), {}, "text is torch.float32"),
        (CIRCLE[None], {}, r"text is torch.int64 \(1, 3000\); expected int64 \(T,\)"),
        (CIRCLE, {"epochs": 0}, "train_text epochs is 0"),
    ],
)
def test_texts_that_do_not_fit_are_named(tokens: Tensor, changes: dict[str, Any], wrong: str) -> None:
    with pytest.raises(ConfigError, match=wrong):
        fit(tokens, **changes)


def test_networks_of_images_are_refused() -> None:
    with pytest.raises(ConfigError, match="model is 'LeNetZhu'; expected 'TextDecoder'"):
        training.train_text("LeNetZhu", CIRCLE, SENTENCES, num_classes=8, epochs=1)
    images, labels = torch.rand(4, 1, 8, 8), torch.zeros(4, dtype=torch.int64)
    with pytest.raises(ConfigError, match=r"TextDecoder was given torch.float32 .* expected words"):
        training.train("TextDecoder", images, labels, images, labels, normalization=UNIT, epochs=1)


def test_command_line_trains_on_text_and_evaluate_agrees(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = " ".join(data.sentences(most=8)[:40])
    (tmp_path / "austen_train.txt").write_text(" ".join([words] * 8))
    monkeypatch.setenv("INVLIB_DATA", str(tmp_path))
    monkeypatch.setattr(text, "sentences", lambda: data.sentences(5, 6)[:20])
    out = tmp_path / "a.safetensors"
    line = ["train", "--model", "TextDecoder", "--dataset", "Austen", "--out", str(out)]
    line += ["--strategy", "adam", "--epochs", "1", "--batch-size", "8"]
    assert cli.main([*line, "--no-augment"]) == 2
    assert "Austen is text; expected neither" in capsys.readouterr().err
    assert cli.main([*line, "--half"]) == 0
    card = json.loads(out.with_suffix(".json").read_text())
    assert card["command"].endswith("--out a.safetensors --half")
    assert "Jane Austen" in card["data"]
    assert card["num_classes"] == 2000
    assert cli.main(["evaluate", str(out), "--device", "cpu"]) == 0
    assert "they agree: +0.0000" in capsys.readouterr().out
    assert cli.main(["evaluate", str(out), "--split", "train"]) == 2
