"""Trained weights: found by name or path, checked against the network and against their model card."""

import json
import pickle
import re
import urllib.error
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from invlib import data, models
from invlib.data import text
from invlib.errors import ConfigError, DataError, UnknownNameError

CARD = {
    "model": "ResNet20-4-unpooled",
    "dataset": "FashionMNIST",
    "num_classes": 10,
    "in_channels": 1,
    "activation": None,
    "batch_norm": True,
    "normalization": {"mean": [0.5], "std": [0.25]},
    "accuracy": 0.5,
}


def write(folder: Path, name: str, slug: str, card: dict[str, Any] | None, **settings: Any) -> Path:
    model = models.build(name, seed=7, **settings)
    path = folder / f"{name}-{slug}.safetensors"
    save_file(model.state_dict(), path)
    if card is not None:
        path.with_suffix(".json").write_text(json.dumps(card))
    return path


@pytest.fixture
def shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data folder with weights of two small models, in place of the project's."""
    folder = tmp_path / "weights"
    folder.mkdir()

    def resource(name: str) -> Path:
        if not (tmp_path / name).exists():
            raise DataError(f"{name!r} is missing")
        return tmp_path / name

    monkeypatch.setattr(data, "resource", resource)
    card = {**CARD, "model": "LeNetZhu", "activation": "tanh", "num_classes": 4}
    write(folder, "LeNetZhu", "fashion-mnist", card, in_channels=1, num_classes=4, activation="tanh")
    card = {**CARD, "model": "ResNet20-nostride", "batch_norm": False}
    write(folder, "ResNet20-nostride", "cifar10", card, in_channels=1, batch_norm=False)
    return folder


def test_shipped_weights_are_loaded_with_the_settings_of_their_card(shipped: Path) -> None:
    model = models.build("LeNetZhu", weights="fashion-mnist")
    made = models.build("LeNetZhu", seed=7, in_channels=1, num_classes=4, activation="tanh")
    for a, b in zip(model.state_dict().values(), made.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    x = torch.rand(1, 1, 32, 32)
    assert torch.equal(model(x), made(x))
    assert not model.training
    assert not list(models.build("ResNet20-nostride", weights="cifar10").buffers())


def test_available_and_card(shipped: Path) -> None:
    assert models.available() == {"LeNetZhu": ("fashion-mnist",), "ResNet20-nostride": ("cifar10",)}
    assert models.model_card("LeNetZhu", "fashion-mnist")["num_classes"] == 4
    path = shipped / "LeNetZhu-fashion-mnist.safetensors"
    assert models.model_card("LeNetZhu", path) == models.model_card("LeNetZhu", "fashion-mnist")


def test_unknown_weights_say_which_there_are_and_how_to_get_others(shipped: Path) -> None:
    message = (
        r"no trained weights 'cifar10' for 'LeNetZhu', which has: fashion-mnist\. "
        r"Weights come with: LeNetZhu \(fashion-mnist\); ResNet20-nostride \(cifar10\)\. "
        r"Train others with: python -m invlib train --model LeNetZhu --dataset NAME"
    )
    with pytest.raises(UnknownNameError, match=message):
        models.build("LeNetZhu", weights="cifar10")
    with pytest.raises(UnknownNameError, match="for 'ConvNet8', which has: none"):
        models.model_card("ConvNet8", "cifar10")


def test_no_weights_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def resource(name: str) -> Path:
        raise DataError(f"{name!r} is missing")

    monkeypatch.setattr(data, "resource", resource)
    assert models.available() == {}
    with pytest.raises(UnknownNameError, match="Weights come with: no model"):
        models.build("LeNetZhu", weights="cifar10")


def test_what_contradicts_the_card_is_refused_all_at_once(shipped: Path) -> None:
    message = "num_classes is 10, but the weights have 4; activation is 'relu', but the weights have 'tanh'"
    with pytest.raises(ConfigError, match=message):
        models.build("LeNetZhu", weights="fashion-mnist", num_classes=10, in_channels=1, activation="relu")
    assert models.build("LeNetZhu", weights="fashion-mnist", num_classes=4) is not None


def test_a_card_without_an_activation_means_the_familys_own(tmp_path: Path) -> None:
    card = {**CARD, "model": "LeNetZhu"}
    path = write(tmp_path, "LeNetZhu", "own", card, in_channels=1)
    assert models.build("LeNetZhu", weights=path, activation="sigmoid") is not None
    with pytest.raises(ConfigError, match="activation is 'relu', but the weights have 'sigmoid'"):
        models.build("LeNetZhu", weights=path, activation="relu")


def test_a_path_needs_no_card(tmp_path: Path) -> None:
    path = write(tmp_path, "LeNetZhu", "mine", None, in_channels=1)
    for given in (path, str(path)):
        model = models.build("LeNetZhu", weights=given, in_channels=1)
        assert torch.equal(model.fc.bias, models.build("LeNetZhu", seed=7, in_channels=1).fc.bias)
    with pytest.raises(DataError, match=r"body\.0\.weight is \(12, 1, 5, 5\), expected \(12, 3, 5, 5\)"):
        models.build("LeNetZhu", weights=path)
    with pytest.raises(DataError, match=r"model card .*mine\.json' cannot be read"):
        models.model_card("LeNetZhu", path)


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path, "LeNetZhu", "other", {**CARD, "model": "LeNetZhu"}, in_channels=1)
    with pytest.raises(ConfigError, match="holds weights of 'LeNetZhu'; expected weights of 'ConvNet8'"):
        models.build("ConvNet8", weights=path)


def test_every_fault_of_a_file_is_listed_and_nothing_is_loaded(tmp_path: Path) -> None:
    state = models.build("LeNetZhu", seed=7).state_dict()
    state["fc.extra"] = state.pop("fc.bias")
    state["body.2.bias"] = torch.zeros(3)
    state["body.0.bias"][1] = float("nan")
    path = tmp_path / "broken.safetensors"
    save_file(state, path)
    with pytest.raises(DataError) as caught:
        models.build("LeNetZhu", weights=path)
    for fault in (
        "fc.bias is missing",
        "fc.extra is not in the model",
        "body.2.bias is (3,), expected (12,)",
        "body.0.bias has numbers that are not finite",
    ):
        assert fault in str(caught.value)


def test_counts_of_batches_may_be_missing(tmp_path: Path) -> None:
    state = models.build("ConvNet8", seed=7).state_dict()
    state["bn0.running_mean"] += 1
    path = tmp_path / "net.safetensors"
    save_file({k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}, path)
    assert torch.equal(models.build("ConvNet8", weights=path).bn0.running_mean, torch.ones(8))


def test_corrupt_and_missing_files(tmp_path: Path) -> None:
    path = tmp_path / "half.safetensors"
    with pytest.raises(DataError, match=r"half\.safetensors' does not exist"):
        models.build("LeNetZhu", weights=path)
    path.write_bytes(b"not weights")
    with pytest.raises(DataError, match=r"half\.safetensors' cannot be read"):
        models.build("LeNetZhu", weights=path)
    path.with_suffix(".json").write_text("{")
    with pytest.raises(DataError, match=r"model card .*half\.json' cannot be read"):
        models.build("LeNetZhu", weights=path)
    path.with_suffix(".json").write_text("[1]")
    with pytest.raises(DataError, match="is a list; expected an object"):
        models.build("LeNetZhu", weights=path)


@pytest.mark.parametrize("content", [b"", b"hello\n", pickle.dumps({"x": eval}), b"PK\x03\x04", b"\x80\x02."])
def test_no_message_advises_to_load_unsafely(tmp_path: Path, content: bytes) -> None:
    for suffix in (".pth", ".safetensors"):
        path = tmp_path / f"net{suffix}"
        path.write_bytes(content)
        with pytest.raises(DataError, match="cannot be read") as caught:
            models.build("LeNetZhu", weights=path)
        assert not re.search("weights_only|arbitrary code|trust", str(caught.value))


@pytest.mark.parametrize("state", [{1: torch.zeros(1)}, [torch.zeros(1)], {"a": 3}, torch.zeros(1)], ids=str)
def test_a_torch_file_of_something_else_is_named(tmp_path: Path, state: object) -> None:
    torch.save(state, tmp_path / "net.pth")
    with pytest.raises(DataError, match="expected a state dict"):
        models.build("LeNetZhu", weights=tmp_path / "net.pth")


def test_a_folder_for_weights_and_tensors_of_another_type_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").mkdir()
    with pytest.raises(DataError, match="is a folder; expected a file"):
        models.build("LeNetZhu", weights=tmp_path / "a.safetensors")
    state = models.build("LeNetZhu", seed=7).state_dict()
    for dtype in (torch.int64, torch.complex64):
        save_file(state | {"fc.bias": state["fc.bias"].to(dtype)}, tmp_path / "b.safetensors")
        with pytest.raises(DataError, match=f"fc.bias is of type {dtype}"):
            models.build("LeNetZhu", weights=tmp_path / "b.safetensors")


@pytest.mark.parametrize("name", ["../../x", "../weights/LeNetZhu-fashion-mnist", "/etc/x"])
def test_weights_are_found_by_name_alone(name: str) -> None:
    for use in (lambda: models.build("LeNetZhu", weights=name), lambda: models.model_card("LeNetZhu", name)):
        with pytest.raises(UnknownNameError, match="no trained weights"):
            use()


@pytest.mark.parametrize(
    "change",
    [
        {"normalization": "unit"},
        {"normalization": {"mean": [0.5]}},
        {"normalization": {"mean": ["a"], "std": ["b"]}},
        {"accuracy": "high"},
        {"activation": ["relu"]},
    ],
    ids=str,
)
def test_a_card_that_is_half_valid_is_named(tmp_path: Path, change: dict) -> None:
    path = write(tmp_path, "LeNetZhu", "other", {"model": "LeNetZhu", **change})
    with pytest.raises(DataError, match=r"model card .* is corrupt"):
        models.build("LeNetZhu", weights=path)


def test_imagenet_weights_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_args: object, **_kwargs: object) -> None:
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(torch.hub, "download_url_to_file", unreachable)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(
        DataError,
        match=r"'IMAGENET1K_V1' of 'resnet18' could not be fetched .*no route to host.*invlib\[imagenet\]",
    ):
        models.build("resnet18", weights="IMAGENET1K_V1")
    with pytest.raises(
        UnknownNameError, match="no weights 'V9' for 'resnet18'; torchvision has IMAGENET1K_V1"
    ):
        models.build("resnet18", weights="V9")


def test_imagenet_weights_are_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    state = models.build("mobilenet_v2", seed=7).state_dict()
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", lambda *_args, **_kwargs: state)
    kind = "torchvision.models._api.load_state_dict_from_url"
    monkeypatch.setattr(kind, lambda *_args, **_kwargs: state)
    model = models.build("mobilenet_v2", weights="IMAGENET1K_V1")
    assert torch.equal(model.classifier[1].weight, state["classifier.1.weight"])
    with pytest.raises(DataError, match=r"classifier\.1\.weight is \(1000, 1280\), expected \(10, 1280\)"):
        models.build("mobilenet_v2", weights="IMAGENET1K_V1", num_classes=10)


def test_weights_in_the_projects_data_folder_fit_their_networks() -> None:
    for name, slugs in models.available().items():
        for slug in slugs:
            card = models.model_card(name, slug)
            is_text = card["dataset"] == text.NAME
            assert slug.removesuffix("-no-batch-norm") == (
                text.SLUG if is_text else data.slug(card["dataset"])
            )
            if slug.endswith("-no-batch-norm"):
                assert card["batch_norm"] is False
            model = models.build(name, weights=slug)
            side = card.get("image_size") or 32
            shape = (1, 5) if is_text else (1, card["in_channels"], side, side)
            logits = model(torch.zeros(shape, dtype=torch.int64 if is_text else torch.float32))
            assert logits.shape == (1, card["num_classes"])
