"""Training: it learns, it can be repeated and resumed exactly, and the card says how it was made."""

from __future__ import annotations

import argparse
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from invlib import data, models
from invlib.cli import train
from invlib.core.normalization import CIFAR10, FASHION_MNIST, UNIT
from invlib.errors import ConfigError, DataError, DeviceError, UnknownNameError
from invlib.models import cards, training
from invlib.models.cards import Trained


def toy(count: int, seed: int, size: int = 8, channels: int = 1) -> tuple[Tensor, Tensor]:
    """Noise that is brighter in the left half (class 0) or in the right half (class 1), mirrored never."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(count, channels, size, size, generator=generator) * 0.4
    labels = torch.arange(count) % 2
    images[labels == 0, :, :, : size // 2] += 0.5
    images[labels == 1, :, :, size // 2 :] += 0.5
    return images, labels


def fit(**changes: Any) -> Trained:
    settings: dict[str, Any] = {
        "normalization": UNIT,
        "strategy": "adam",
        "epochs": 2,
        "batch_size": 16,
        "augment": False,
        "progress": False,
    }
    return training.train("LeNetZhu", *toy(96, 0), *toy(40, 1), **settings | changes)


def assert_same_weights(a: nn.Module, b: nn.Module) -> None:
    for (name, x), y in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0, msg=name)


def test_learns_a_separable_problem_with_adam() -> None:
    trained = fit(epochs=6, lr=0.02)
    assert trained.card["accuracy"] > 0.95
    history = trained.card["history"]
    assert [entry["epoch"] for entry in history] == [1, 2, 3, 4, 5, 6]
    assert history[-1]["loss"] < history[0]["loss"] / 2
    images, labels = toy(40, 1)
    assert training.accuracy(trained.model, images, labels, normalization=UNIT) == trained.card["accuracy"]


@pytest.mark.parametrize("batch_norm", [True, False])
def test_learns_with_the_conservative_strategy(batch_norm: bool) -> None:
    images = toy(64, 0, size=9, channels=3)
    trained = training.train(
        "ConvNet8",
        *images,
        *images,
        normalization=CIFAR10,
        epochs=4,
        batch_size=16,
        lr=None if batch_norm else 0.01,
        batch_norm=batch_norm,
        augment=False,
        progress=False,
    )
    assert trained.card["accuracy"] > 0.9
    assert trained.card["batch_norm"] is batch_norm
    assert any(isinstance(m, nn.BatchNorm2d) for m in trained.model.modules()) is batch_norm


def test_model_comes_back_in_evaluation_mode_and_usual_order() -> None:
    model = fit(epochs=1).model
    assert not any(module.training for module in model.modules())
    assert all(parameter.is_contiguous() for parameter in model.parameters())


def test_same_seed_gives_the_same_weights_and_another_seed_others() -> None:
    first, second, other = fit(augment=True), fit(augment=True), fit(augment=True, seed=1)
    assert_same_weights(first.model, second.model)
    assert not torch.equal(next(first.model.parameters()), next(other.model.parameters()))


def test_global_random_state_is_left_alone() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    fit(epochs=1, augment=True)
    assert torch.equal(torch.get_rng_state(), before)


def test_every_epoch_has_an_order_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    batches, orders = training._batches, []

    def record(*args: Any) -> list[tuple[Tensor, Tensor]]:
        made = list(batches(*args))
        orders.append(torch.cat([x for x, _ in made]))
        return made

    monkeypatch.setattr(training, "_batches", record)
    fit()
    assert not torch.equal(orders[0], orders[1])
    assert torch.equal(orders[0].sum((1, 2, 3)).sort()[0], orders[1].sum((1, 2, 3)).sort()[0])


class Interrupted(Exception):
    """Stands for a kill after some epochs."""


@pytest.mark.parametrize("strategy", ["adam", "conservative"])
def test_resumed_training_ends_where_the_uninterrupted_one_does(
    strategy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {"strategy": strategy, "epochs": 4, "augment": True, "lr": 0.01}
    whole = fit(**settings)
    checkpoint = tmp_path / "checkpoint.pt"
    measure, calls = training.accuracy, []

    def killed(*args: Any, **kwargs: Any) -> float:
        calls.append(1)
        if len(calls) == 3:
            raise Interrupted
        return measure(*args, **kwargs)

    monkeypatch.setattr(training, "accuracy", killed)
    with pytest.raises(Interrupted):
        fit(**settings, resume=checkpoint)
    assert [entry.name for entry in tmp_path.iterdir()] == ["checkpoint.pt"]
    resumed = fit(**settings, resume=checkpoint)
    assert len(calls) == 3 + 2  # two epochs were over, two more were trained
    assert_same_weights(whole.model, resumed.model)
    assert resumed.card["history"] == whole.card["history"]


def test_finished_training_is_not_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = fit(resume=tmp_path / "c.pt")
    monkeypatch.setattr(training, "_batches", lambda *args: pytest.fail("trained again"))
    assert_same_weights(first.model, fit(resume=tmp_path / "c.pt").model)


def test_checkpoint_of_another_training_or_none(tmp_path: Path) -> None:
    checkpoint = tmp_path / "c.pt"
    fit(epochs=1, resume=checkpoint)
    with pytest.raises(
        ConfigError, match=r"c.pt is the checkpoint of another training: epochs=1, now 2; seed=0, now 3"
    ):
        fit(epochs=2, seed=3, resume=checkpoint)
    for broken in (b"nothing", checkpoint.read_bytes()[:-500], b""):
        checkpoint.write_bytes(broken)
        with pytest.raises(DataError, match=r"c.pt: corrupt checkpoint .*remove it to start anew"):
            fit(resume=checkpoint)


def test_card_says_how_it_was_made() -> None:
    card = fit(activation="softplus", num_classes=10).card
    assert card["model"] == "LeNetZhu"
    assert (card["num_classes"], card["in_channels"], card["image_size"]) == (10, 1, 8)
    assert (card["activation"], card["batch_norm"]) == ("softplus", False)
    assert card["normalization"] == {"mean": [0.0], "std": [1.0]}
    assert (card["strategy"], card["lr"], card["epochs"], card["batch_size"]) == ("adam", 3e-3, 2, 16)
    assert (card["seed"], card["augment"], card["device"]) == (0, False, "cpu")
    assert (card["train_images"], card["test_images"]) == (96, 40)
    assert card["torch"] == torch.__version__
    assert card["commit"] is None or len(card["commit"]) == 40
    json.dumps(card)


def test_installed_package_names_no_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("invlib.models.cards.__file__", str(tmp_path / "invlib" / "models" / "cards.py"))
    assert fit(epochs=1).card["commit"] is None


def test_saved_weights_load_again(tmp_path: Path) -> None:
    trained = fit(num_classes=10)
    card = cards.save(trained, tmp_path / "new" / "LeNetZhu-toy.safetensors")
    assert card == tmp_path / "new" / "LeNetZhu-toy.json"
    assert {entry.name for entry in card.parent.iterdir()} == {"LeNetZhu-toy.safetensors", card.name}
    assert (card.parent / "LeNetZhu-toy.safetensors").stat().st_mode & 0o777 == card.stat().st_mode & 0o777
    loaded = cards.load(tmp_path / "new" / "LeNetZhu-toy.safetensors")
    assert loaded.card == trained.card
    assert_same_weights(loaded.model, trained.model)
    assert not loaded.model.training


def test_failing_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = fit(epochs=1)
    target = tmp_path / "a.safetensors"
    cards.save(trained, target)
    before = target.read_bytes()

    def half(path: Path, content: bytes) -> int:
        with path.open("wb") as file:
            file.write(content[:9])
        raise OSError("disk full")

    monkeypatch.setattr(Path, "write_bytes", half)
    with pytest.raises(DataError, match="disk full"):
        cards.save(trained, target)
    assert target.read_bytes() == before
    assert {entry.name for entry in tmp_path.iterdir()} == {"a.safetensors", "a.json"}


def test_save_and_load_errors(tmp_path: Path) -> None:
    trained = fit(epochs=1)
    with pytest.raises(ConfigError, match=r"a.pt ends in '.pt'; expected a name that ends in '.safetensors'"):
        cards.save(trained, tmp_path / "a.pt")
    with pytest.raises(DataError, match=r"none.safetensors' does not exist"):
        cards.load(tmp_path / "none.safetensors")
    cards.save(trained, tmp_path / "a.safetensors")
    (tmp_path / "a.json").write_text("{}")
    with pytest.raises(DataError, match=r"a.safetensors has no 'model'"):
        cards.load(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"strategy": "sgd"}, "train strategy is 'sgd'; expected 'conservative' or 'adam'"),
        ({"epochs": 0}, "train epochs is 0; expected a whole number of at least 1"),
        ({"batch_size": 0}, "train batch_size is 0; expected a whole number of at least 1"),
        (
            {"lr": 1e30, "strategy": "conservative"},
            "LeNetZhu: the loss became (nan|inf) in epoch 1 with .*lr=1e",
        ),
        ({"num_classes": 1}, r"labels run from 0 to 1; expected 0 to 0 \(num_classes=1\)"),
        ({"activation": "swish"}, "activation is 'swish'"),
    ],
)
def test_bad_settings(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        fit(**changes)


def test_weights_that_the_last_step_broke_are_not_returned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained, step = fit(epochs=1), torch.optim.SGD.step

    def broken(self: torch.optim.SGD) -> None:
        step(self)
        self.param_groups[0]["params"][0].data[0] = torch.inf

    monkeypatch.setattr(torch.optim.SGD, "step", broken)
    for resume in (None, tmp_path / "c"):
        with pytest.raises(ConfigError, match=r"LeNetZhu: .* became infinite or not a number in epoch 1"):
            fit(epochs=1, batch_size=96, strategy="conservative", resume=resume)
    assert not list(tmp_path.iterdir())
    next(trained.model.parameters()).data[0] = torch.nan
    with pytest.raises(ConfigError, match=r"body\.0\.weight of the network has numbers that are not finite"):
        cards.save(trained, tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())


def test_an_accuracy_of_chance_is_said() -> None:
    with pytest.warns(UserWarning, match=r"LeNetZhu: the accuracy is .*may have learnt nothing"):
        fit(epochs=1, lr=1e-9)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit(epochs=6, lr=0.02)


def test_where_nothing_can_be_written_is_found_out_before_the_first_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "_batches", None)  # the first epoch would call it
    (tmp_path / "file").touch()
    for resume in (tmp_path, tmp_path / "file" / "c"):
        with pytest.raises(DataError, match=r"is a folder|cannot be written"):
            fit(resume=resume)


def test_weights_are_not_left_without_their_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = fit(epochs=1)

    def full(path: Path, text: str, **_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(DataError, match=r"a\.json cannot be written: disk full"):
        cards.save(trained, tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: 255 * x, r"training images are torch.float32 and lie in \[0.1.* expected floating point"),
        (lambda x: (255 * x).byte(), "training images are torch.uint8"),
        (lambda x: x * torch.nan, r"lie in \[nan, nan\]"),
        (lambda x: x.numpy(), "train images is ndarray"),
        (lambda x: x[:, :, :4], r"have shapes \(1, 4, 8\) and \(1, 8, 8\); expected the same"),
    ],
)
def test_images_that_do_not_fit_are_named_and_not_called_a_high_lr(change: Any, message: str) -> None:
    x, y = toy(8, 0)
    with pytest.raises(ConfigError, match=message):
        training.train("LeNetZhu", change(x), y, x, y, normalization=UNIT, epochs=1)


def test_bad_data() -> None:
    x, y = toy(4, 0)
    with pytest.raises(ConfigError, match=r"training images have shape \(4, 1, 8, 8\) and labels \(3,\)"):
        training.train("LeNetZhu", x, y[:3], x, y, normalization=UNIT, epochs=1)
    with pytest.raises(ConfigError, match=r"validation images have shape \(0, 1, 8, 8\)"):
        training.train("LeNetZhu", x, y, x[:0], y[:0], normalization=UNIT, epochs=1)
    with pytest.raises(UnknownNameError, match="no model 'LeNetZu'"):
        training.train("LeNetZu", x, y, x, y, normalization=UNIT, epochs=1)


def test_absent_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(DeviceError, match="device='cuda' was asked for, but torch finds no GPU"):
        fit(device="cuda")


def test_fewer_images_than_a_batch() -> None:
    assert fit(batch_size=500, epochs=1).card["batch_size"] == 96


def test_schedules() -> None:
    rates = [training._schedule("conservative", done) for done in (0.0, 0.37, 0.38, 0.63, 0.88)]
    assert rates == pytest.approx([1, 1, 0.1, 0.01, 0.001])
    assert training._schedule("adam", 0.025) == pytest.approx(0.5, rel=0.01)
    assert training._schedule("adam", 0.05) == pytest.approx(1.0, rel=0.01)
    assert training._schedule("adam", 0.5) == pytest.approx(0.5)
    assert training._schedule("adam", 1.0) == pytest.approx(0.0)


def test_augmentation_only_shifts_and_mirrors() -> None:
    image = torch.arange(1.0, 26.0).view(1, 1, 5, 5)
    allowed = set()
    for source in (image, image.flip(3)):
        padded = nn.functional.pad(source, (4,) * 4)
        allowed |= {
            tuple(padded[0, 0, r : r + 5, c : c + 5].flatten().tolist()) for r in range(9) for c in range(9)
        }
    made = training._augmented(image.repeat(1000, 1, 1, 1), torch.Generator().manual_seed(0))
    seen = {tuple(one.flatten().tolist()) for one in made}
    assert seen <= allowed
    assert len(seen) > 0.9 * len(allowed)


def test_augmentation_keeps_channels_together() -> None:
    grey = torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(0)).expand(6, 3, 8, 8)
    made = training._augmented(grey, torch.Generator().manual_seed(1))
    assert torch.equal(made[:, 0], made[:, 1])
    assert torch.equal(made[:, 0], made[:, 2])


def test_accuracy_leaves_the_mode_alone() -> None:
    model = models.build("ConvNet8", image_size=9, seed=0)
    model.train()
    model.get_submodule("bn0").eval()
    images, labels = toy(10, 0, size=9, channels=3)
    before = model.get_buffer("bn1.running_mean").clone()
    training.accuracy(model, images, labels, normalization=CIFAR10, batch_size=3)
    assert model.training
    assert not model.get_submodule("bn0").training
    assert torch.equal(model.get_buffer("bn1.running_mean"), before)


@pytest.fixture
def fashion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a small FashionMNIST made of the embedded images, as the working directory."""
    images, labels = data.samples("fashion")
    x = (images[:, 0, 2:-2, 2:-2] * 255).round().to(torch.uint8).numpy()
    for split in ("train", "test"):
        np.savez(tmp_path / f"fashion-mnist_{split}.npz", x=x, y=labels.numpy())
    monkeypatch.setenv("INVLIB_DATA", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def command(*words: str) -> int:
    parser = argparse.ArgumentParser()
    train.add_arguments(parser)
    return train.run(parser.parse_args(words))


def test_command_line_trains_and_writes_weights_with_card(
    fashion: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--model", "LeNetZhu", "--dataset", "FashionMNIST", "--strategy", "adam", "--epochs", "1"]
    words += ["--batch-size", "20", "--seed", "4", "--out", "w/LeNetZhu-fashion-mnist.safetensors"]
    extra = ["--activation", "sigmoid", "--note", "a small copy", "--no-augment"]
    assert command(*words, *extra, "--resume", str(fashion / "c.pt")) == 0
    trained = cards.load("w/LeNetZhu-fashion-mnist.safetensors")
    card = trained.card
    assert card["command"] == "python -m invlib train " + " ".join(
        [*words, "--activation", "sigmoid", "--note", "'a small copy'", "--no-augment"]
    )
    assert card["dataset"] == "FashionMNIST"
    assert card["data"] == "Fashion-MNIST, padded to 32×32, training images (a small copy)"
    assert card["test_set"] == "Fashion-MNIST, padded to 32×32, test images (a small copy)"
    assert card["normalization"]["mean"] == list(FASHION_MNIST.mean)
    assert (card["num_classes"], card["in_channels"], card["image_size"]) == (10, 1, 32)
    assert str(fashion) not in json.dumps(card)
    images, labels = data.load("FashionMNIST")
    assert training.accuracy(trained.model, images, labels, normalization=FASHION_MNIST) == card["accuracy"]
    assert "accuracy" in capsys.readouterr().err


def test_command_of_the_card_makes_the_same_weights(fashion: Path) -> None:
    words = [
        "--model",
        "ConvNet8",
        "--dataset",
        "FashionMNIST",
        "--epochs",
        "1",
        "--no-batch-norm",
        "--lr",
        "0.01",
    ]
    assert command(*words, "--out", str(fashion / "a.safetensors")) == 0
    first = cards.load("a.safetensors")
    (fashion / "a.safetensors").unlink()
    again = first.card["command"].removeprefix("python -m invlib train ").split()
    assert again[again.index("--out") + 1] == "a.safetensors"  # no path of this machine
    assert command(*again) == 0
    assert_same_weights(first.model, cards.load("a.safetensors").model)
    assert first.card["batch_norm"] is False


def test_command_line_refuses_a_bad_name_before_training(fashion: Path) -> None:
    with pytest.raises(ConfigError, match=r"--out is 'a.pt'; expected a name that ends in '.safetensors'"):
        command("--model", "LeNetZhu", "--dataset", "FashionMNIST", "--out", "a.pt")


@pytest.mark.gpu
def test_trains_on_a_gpu() -> None:
    trained = fit(epochs=6, lr=0.02, device="cuda")
    assert trained.card["accuracy"] > 0.95
    assert trained.card["device"] == "cuda"
    assert next(trained.model.parameters()).device.type == "cpu"
