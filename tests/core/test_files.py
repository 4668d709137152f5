"""Files are written whole or not at all; what a card and a --device option say."""

from pathlib import Path

import pytest
import torch

import invlib as iv
from invlib import models
from invlib.core.files import atomic_write
from invlib.core.normalization import CIFAR10, UNIT, Normalization
from invlib.core.optional import device_of
from invlib.errors import ConfigError, DataError, DeviceError
from invlib.search.checkpoint import Checkpoint


def half_then_fail(beside: Path) -> None:
    beside.write_text("half")
    raise OSError("disk full")


def test_a_file_is_replaced_whole_or_kept(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    atomic_write(path, lambda beside: beside.write_text("old"))
    with pytest.raises(OSError, match="disk full"):
        atomic_write(path, half_then_fail)
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]
    assert path.read_text() == "old"
    atomic_write(path, lambda beside: beside.write_text("new"))
    assert path.read_text() == "new"


def test_observations_and_checkpoints_leave_nothing_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = models.build("TwoLP", seed=0)
    images = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    seen = iv.observe(model, images, torch.tensor([1]), iv.FedSGD(), normalization=UNIT)

    def full(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(DataError, match=r"cannot be written to .*seen\.safetensors: disk full"):
        iv.save_observation(seen, tmp_path / "seen.safetensors")
    search = type("Search", (), {"states": [], "pruned": []})()
    with pytest.raises(OSError, match="disk full"):
        Checkpoint(tmp_path / "search.pt", {}).save(search)
    assert not list(tmp_path.iterdir())


def test_the_normalisation_of_a_card() -> None:
    card = {"normalization": {"mean": [0.5], "std": [0.25]}}
    assert Normalization.from_card(card, UNIT) == Normalization(mean=(0.5,), std=(0.25,))
    assert Normalization.from_card({}, CIFAR10) is CIFAR10
    with pytest.raises(DataError, match="'normalization'"):
        Normalization.from_card({})


def test_devices_by_name() -> None:
    assert device_of("cpu") == torch.device("cpu")
    assert device_of().type in ("cpu", "cuda")
    with pytest.raises(ConfigError, match="--device is 'warp'; expected"):
        device_of("warp")
    with pytest.raises(DeviceError, match="--device is 'cuda:99', but torch finds"):
        device_of("cuda:99")
