"""Data sets by name: a folder of your own, torchvision's copies, downloads that fail."""

from __future__ import annotations

import logging
import pickle
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest
import torch
from PIL import Image

from invlib import data
from invlib.core.optional import torchvision
from invlib.errors import ConfigError, DataError, UnknownNameError


@pytest.fixture(autouse=True)
def no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every download fail, as without a network, and keep the user's own folders out."""
    torchvision()  # its plain import can fail beside a CPU-only torch
    monkeypatch.delenv("INVLIB_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def fail(*args: Any, **kwargs: Any) -> None:
        raise URLError("no network in this test")

    monkeypatch.setattr("urllib.request.urlopen", fail)


def neutral(folder: Path, name: str, x: np.ndarray, y: np.ndarray) -> None:
    folder.mkdir(exist_ok=True)
    np.savez(folder / name, x=x, y=y)


def colours(count: int, size: int = 32) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def files_below(folder: Path) -> list[Path]:
    return list(folder.rglob("*")) if folder.exists() else []


def test_embedded_samples_come_by_name_too() -> None:
    torch.testing.assert_close(data.load("photos32", indices=[1])[0], data.samples("photos32", [1])[0])


def test_neutral_file_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = colours(5), np.array([3, 1, 4, 1, 5], np.int32)
    neutral(tmp_path / "mine", "cifar10_test.npz", x, y)
    monkeypatch.setenv("INVLIB_DATA", str(tmp_path / "mine"))
    images, labels = data.load("CIFAR10", indices=[4, 0])
    assert images.dtype == torch.float32
    assert labels.tolist() == [5, 3]
    assert labels.dtype == torch.int64
    torch.testing.assert_close(images, torch.from_numpy(x[[4, 0]]).permute(0, 3, 1, 2) / 255)


def test_root_comes_before_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    neutral(tmp_path / "a", "cifar10_train.npz", colours(1), np.array([1]))
    neutral(tmp_path / "b", "cifar10_train.npz", colours(1), np.array([2]))
    monkeypatch.setenv("INVLIB_DATA", str(tmp_path / "a"))
    assert data.load("CIFAR10", split="train")[1].tolist() == [1]
    assert data.load("CIFAR10", split="train", root=tmp_path / "b")[1].tolist() == [2]


def test_grey_images_of_28_pixels_are_padded(tmp_path: Path) -> None:
    x = np.full((2, 28, 28), 51, np.uint8)
    neutral(tmp_path, "fashion-mnist_test.npz", x, np.array([0, 9]))
    images, _ = data.load("FashionMNIST", root=tmp_path)
    assert images.shape == (2, 1, 32, 32)
    torch.testing.assert_close(images[:, :, 2:-2, 2:-2], torch.full((2, 1, 28, 28), 0.2))
    torch.testing.assert_close(images.sum(), torch.tensor(2 * 28 * 28 * 0.2))


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (np.zeros((2, 32, 32, 3)), np.zeros(2, int), r"x is float64 \(2, 32, 32, 3\)"),
        (np.zeros((2, 3), np.uint8), np.zeros(2, int), r"x is uint8 \(2, 3\)"),
        (
            np.zeros((2, 32, 32, 3), np.uint8),
            np.zeros(3, int),
            r"y int64 \(3,\), expected an .npz with x, uint8",
        ),
        (np.zeros((2, 32, 32, 3), np.uint8), np.zeros(2), r"y float64 \(2,\)"),
    ],
)
def test_neutral_file_of_wrong_form(tmp_path: Path, x: np.ndarray, y: np.ndarray, message: str) -> None:
    neutral(tmp_path, "cifar10_test.npz", x, y)
    with pytest.raises(DataError, match=message):
        data.load("CIFAR10", root=tmp_path)


def test_neutral_file_without_labels_or_corrupt(tmp_path: Path) -> None:
    np.savez(tmp_path / "cifar10_test.npz", x=colours(1))
    with pytest.raises(DataError, match=r"cifar10_test.npz: has no array 'y'; expected integers \(N,\)"):
        data.load("CIFAR10", root=tmp_path)
    (tmp_path / "cifar10_test.npz").write_bytes(b"PK\x03\x04 half of it")
    with pytest.raises(DataError, match=r"cifar10_test.npz: corrupt"):
        data.load("CIFAR10", root=tmp_path)
    with (tmp_path / "cifar10_test.npz").open("wb") as file:
        np.save(file, colours(1))  # one array without a name
    with pytest.raises(DataError, match=r"cifar10_test.npz: corrupt"):
        data.load("CIFAR10", root=tmp_path)


def test_bad_names_splits_and_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnknownNameError, match="no data set 'cifar10'; known: CIFAR10, CIFAR100"):
        data.load("cifar10")
    with pytest.raises(ConfigError, match="split='val' is unknown; expected 'train' or 'test'"):
        data.load("CIFAR10", split="val")
    with pytest.raises(DataError, match=r"none: no such folder \(from root\)"):
        data.load("CIFAR10", root=tmp_path / "none")
    monkeypatch.setenv("INVLIB_DATA", str(tmp_path / "gone"))
    with pytest.raises(DataError, match=r"gone: no such folder \(from INVLIB_DATA\)"):
        data.load("CIFAR10")
    neutral(tmp_path, "cifar10_test.npz", colours(2), np.array([0, 1]))
    with pytest.raises(ConfigError, match=r"index 2 of cifar10_test.npz is out of range; expected 0 to 1"):
        data.load("CIFAR10", root=tmp_path, indices=[2])


@pytest.mark.parametrize("name", ["CIFAR10", "CIFAR100", "MNIST", "FashionMNIST"])
def test_download_without_network_names_set_cause_and_remedy(name: str, tmp_path: Path) -> None:
    message = rf"{name} \(test\) could not be downloaded .*no network.*holds {data.slug(name)}_test.npz"
    with pytest.raises(DataError, match=message):
        data.load(name)
    assert files_below(tmp_path / "cache" / "invlib") == []


def test_broken_download_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def half(url: str, root: str, **kwargs: Any) -> None:
        Path(root, "cifar-10-python.tar.gz").write_bytes(b"half of it")
        raise URLError("connection reset")

    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", half)
    with pytest.raises(DataError, match="connection reset"):
        data.load("CIFAR10", root=tmp_path)
    assert files_below(tmp_path) == []


def write_torchvision_cifar10(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base.mkdir(parents=True)
    batch = {"data": np.full((3, 3072), 255, np.uint8), "labels": [7, 8, 9]}
    names = ["data_batch_1", "test_batch"]
    for name in names:
        (base / name).write_bytes(pickle.dumps(batch))
    (base / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    cifar10 = "torchvision.datasets.CIFAR10"
    monkeypatch.setattr(f"{cifar10}.train_list", [["data_batch_1", None]])
    monkeypatch.setattr(f"{cifar10}.test_list", [["test_batch", None]])
    monkeypatch.setattr(f"{cifar10}.meta", {"filename": "batches.meta", "key": "label_names", "md5": None})


def test_download_is_renamed_into_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def whole(url: str, root: str, **kwargs: Any) -> None:
        write_torchvision_cifar10(Path(root, "cifar-10-batches-py"), monkeypatch)

    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", whole)
    images, labels = data.load("CIFAR10")
    assert images.shape == (3, 3, 32, 32)
    assert labels.tolist() == [7, 8, 9]
    assert [entry.name for entry in (tmp_path / "cache" / "invlib").iterdir()] == ["cifar-10-batches-py"]
    assert data.default(indices=[0])[2] == "CIFAR10"  # from the cache now


def test_torchvision_copy_in_the_folder_of_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_torchvision_cifar10(tmp_path / "cifar-10-batches-py", monkeypatch)
    images, labels = data.load("CIFAR10", root=tmp_path, split="train", indices=[2], download=False)
    assert images.shape == (1, 3, 32, 32)
    assert images.min() == 1
    assert labels.tolist() == [9]


def test_broken_copy_is_not_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cifar-10-batches-py").mkdir()

    def whole(url: str, root: str, **kwargs: Any) -> None:
        write_torchvision_cifar10(Path(root, "cifar-10-batches-py"), monkeypatch)

    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", whole)
    with pytest.raises(DataError, match="cifar-10-batches-py is there but broken; remove it"):
        data.load("CIFAR10", root=tmp_path)


def test_download_can_be_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"may not be downloaded \(download=False\)"):
        data.load("CIFAR10", download=False)
    assert files_below(tmp_path) == []


def test_imagenet_must_be_fetched_by_hand() -> None:
    with pytest.raises(DataError, match=r"ImageNet \(test\) is not in .* must be fetched by hand"):
        data.load("ImageNet")


def test_default_says_in_one_line_what_is_shown_instead(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="invlib"):
        images, labels, name = data.default(indices=[3, 4])
    assert name == "patches32"
    torch.testing.assert_close(images, data.samples("patches32", [3, 4])[0])
    assert labels.tolist() == [3, 4]
    (message,) = caplog.messages
    assert message.startswith("CIFAR-10 is not on this disk; shown instead: sixty 32×32 patches")
    assert "\n" not in message


def test_default_takes_cifar10_where_it_is(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    neutral(tmp_path, "cifar10_test.npz", colours(2), np.array([0, 1]))
    images, labels, name = data.default(root=tmp_path)
    assert (name, len(images), labels.tolist(), caplog.messages) == ("CIFAR10", 2, [0, 1], [])


def test_default_does_not_hide_a_corrupt_file(tmp_path: Path) -> None:
    (tmp_path / "cifar10_test.npz").write_bytes(b"nothing")
    with pytest.raises(DataError, match="corrupt"):
        data.default(root=tmp_path)


def draw(path: Path, colour: tuple[int, int, int], size: tuple[int, int] = (6, 4)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


def test_folder_of_images(tmp_path: Path) -> None:
    draw(tmp_path / "b.png", (0, 255, 0))
    draw(tmp_path / "a.png", (255, 0, 0))
    (tmp_path / "notes.txt").write_text("not an image")
    images, labels = data.folder(tmp_path)
    assert images.shape == (2, 3, 4, 6)
    assert images[:, :, 0, 0].tolist() == [[1, 0, 0], [0, 1, 0]]
    assert labels.tolist() == [0, 0]


def test_folder_with_a_subfolder_for_each_class(tmp_path: Path) -> None:
    draw(tmp_path / "dog" / "1.png", (0, 0, 255))
    draw(tmp_path / "cat" / "1.png", (255, 0, 0))
    draw(tmp_path / "cat" / "2.png", (255, 0, 0))
    images, labels = data.folder(tmp_path, indices=[2, 0])
    assert labels.tolist() == [1, 0]
    assert images[:, :, 0, 0].tolist() == [[0, 0, 1], [1, 0, 0]]


def test_folder_scales_the_shorter_side_and_cuts_the_middle(tmp_path: Path) -> None:
    stripes = np.zeros((8, 24, 3), np.uint8)
    stripes[:, 8:16] = 255
    Image.fromarray(stripes).save(tmp_path / "wide.png")
    images, _ = data.folder(tmp_path, size=8)
    torch.testing.assert_close(images, torch.ones(1, 3, 8, 8))
    images, _ = data.folder(tmp_path, size=5)
    assert images.shape == (1, 3, 5, 5)
    assert images[..., 1:-1].min() > 0.9


def test_folder_errors(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="none: no such folder; expected image files"):
        data.folder(tmp_path / "none")
    with pytest.raises(DataError, match=r"no image files; expected some of \.bmp"):
        data.folder(tmp_path)
    draw(tmp_path / "a.png", (0, 0, 0), (3, 3))
    draw(tmp_path / "b.png", (0, 0, 0), (5, 4))
    with pytest.raises(DataError, match=r"b.png: 5×4 pixels, but .*a.png has 3×3; give a size"):
        data.folder(tmp_path)
    (tmp_path / "b.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"b.png: not an image that can be read"):
        data.folder(tmp_path)
    with pytest.raises(ConfigError, match=r"index 2 of .* is out of range; expected 0 to 1"):
        data.folder(tmp_path, indices=[2])


def test_data_sets_as_image_files(tmp_path: Path) -> None:
    draw(tmp_path / "imagenet" / "test" / "n01" / "x.png", (255, 255, 255), (300, 250))
    draw(tmp_path / "mnist" / "test" / "0" / "x.png", (255, 255, 255), (28, 28))
    images, labels = data.load("ImageNet", root=tmp_path)
    assert images.shape == (1, 3, 224, 224)
    assert labels.tolist() == [0]
    images, _ = data.load("MNIST", root=tmp_path)
    assert images.shape == (1, 1, 32, 32)


def test_torchvision_imagenet_reads_only_what_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Kept:
        samples: tuple[tuple[str, int], ...] = (("missing.jpeg", 0), (str(tmp_path / "b.png"), 5))

        def __init__(self, root: str, split: str) -> None:
            assert split == "val"

    draw(tmp_path / "b.png", (255, 0, 0), (300, 224))
    monkeypatch.setattr("torchvision.datasets.ImageNet", Kept)
    images, labels = data.load("ImageNet", root=tmp_path, indices=[1])
    assert images.shape == (1, 3, 224, 224)
    assert labels.tolist() == [5]
