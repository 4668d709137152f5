"""Data sets by name: a folder of your own, torchvision's copies, downloads that fail."""

from __future__ import annotations

import logging
import os
import pickle
import re
import zipfile
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
        (np.zeros((2, 3, 32, 32), np.uint8), np.zeros(2, int), r"x has shape \(2, 3, 32, 32\)"),
        (np.zeros((2, 32, 32, 2), np.uint8), np.zeros(2, int), r"x has shape \(2, 32, 32, 2\)"),
        (np.zeros((0, 32, 32, 3), np.uint8), np.zeros(0, int), r"x has shape \(0, 32, 32, 3\)"),
        (np.zeros((2, 32, 32, 3), np.uint8), np.array([0, -1]), "y goes from -1 to 0; expected 0 to 9"),
        (np.zeros((2, 32, 32, 3), np.uint8), np.array([3, 10]), "y goes from 3 to 10; expected 0 to 9"),
        (np.zeros((1, 32, 32, 3), np.uint8), np.array([2**63], np.uint64), "y goes from 92"),
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


def claiming(path: Path, shape: str, dtype: str = "'|u1'") -> None:
    """Write an .npz whose header says another shape than its bytes have."""
    header = f"{{'descr': {dtype}, 'fortran_order': False, 'shape': {shape}, }}"
    header += " " * (117 - len(header)) + "\n"
    with zipfile.ZipFile(path, "w") as archive:
        for key in "xy":
            start = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little")
            archive.writestr(f"{key}.npy", start + header.encode() + bytes(64))


@pytest.mark.parametrize(
    "shape", ["(10**14,)", "(100000000000000,)", "(10000000, 10000000)", "(63,)", "(-1,)", "()"]
)
def test_a_header_that_claims_more_than_the_file_has_asks_for_no_memory(tmp_path: Path, shape: str) -> None:
    claiming(tmp_path / "cifar10_test.npz", shape)
    with pytest.raises(DataError, match=r"cifar10_test\.npz: (corrupt|x claims to hold)"):
        data.load("CIFAR10", root=tmp_path)


@pytest.mark.parametrize("content", [b"", b"x", pickle.dumps({"x": 1}), b"\x93NUMPY\x01\x00"])
def test_no_message_advises_to_load_unsafely(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "cifar10_test.npz").write_bytes(content)
    with pytest.raises(DataError, match=r"corrupt \(\w+\)") as caught:
        data.load("CIFAR10", root=tmp_path)
    assert not re.search("unsafe|allow_pickle|trust", str(caught.value))


def test_a_file_that_is_none_is_named(tmp_path: Path) -> None:
    (tmp_path / "cifar10_test.npz").mkdir()
    with pytest.raises(DataError, match="is a folder; expected a file"):
        data.load("CIFAR10", root=tmp_path)
    os.mkfifo(tmp_path / "cifar10_train.npz")
    with pytest.raises(DataError, match="is a device or a pipe; expected a file"):
        data.load("CIFAR10", split="train", root=tmp_path)


@pytest.mark.parametrize("name", ["../setup.py", "weights/../../pyproject.toml", "/etc/passwd"])
def test_no_name_leaves_the_data_folder(name: str) -> None:
    with pytest.raises(DataError, match="leaves the data folder"):
        data.resource(name)


@pytest.mark.parametrize("indices", [[0.5], ["a"], range(10**12), [10**30], [None], [], [-1]])
def test_indices_are_whole_numbers_of_images_that_are_there(indices: list) -> None:
    with pytest.raises(ConfigError, match=r"ind(ex|ices) .*photos32"):
        data.samples("photos32", indices)
    assert len(data.samples("photos32", np.array([1, 1]))[0]) == 2


def test_16_bit_images_are_scaled_and_not_cut_off(tmp_path: Path) -> None:
    values = np.array([[0, 257, 256 * 100], [30_000, 65_534, 65_535]], np.uint16)
    Image.fromarray(values).save(tmp_path / "a.png")
    Image.fromarray(values).save(tmp_path / "b.tif")
    images, _ = data.folder(tmp_path)
    for image in images:
        for channel in image:
            expected = torch.from_numpy(values / 65_535).float()
            torch.testing.assert_close(channel, expected, rtol=0, atol=0.5 / 255 + 1e-6)


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_images_of_unknown_scale_are_refused(tmp_path: Path, dtype: type) -> None:
    Image.fromarray(np.full((4, 4), 300, dtype)).save(tmp_path / "a.tiff")
    with pytest.raises(DataError, match=r"a\.tiff: not an image that can be read .*unknown scale"):
        data.folder(tmp_path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.ppm", b"P6\nx y\n255\n"),
        ("a.pgm", b"P2 1 1 x 0"),
        ("a.png", b"\x89PNG\r\n\x1a\n" + bytes(40)),
        ("a.gif", b"GIF89a"),
        ("a.bmp", b"BM" + bytes(20)),
        ("a.tif", b"II*\x00" + bytes(8)),
        ("a.webp", b"RIFF\x04\x00\x00\x00WEBP"),
        ("a.jpg", b"\xff\xd8\xff\xe0" + bytes(9)),
        ("a.png", b"hello"),
        ("a.jpg", b""),
    ],
)
def test_corrupt_images_are_named(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=f"{name}: not an image that can be read"):
        data.folder(tmp_path)


@pytest.mark.parametrize("size", [0, -1, 10**6, 2.5, "8"])
def test_sizes_out_of_range_are_refused(tmp_path: Path, size: object) -> None:
    draw(tmp_path / "a.png", (1, 2, 3))
    with pytest.raises(ConfigError, match=r"size is .*; expected a whole number from 1 to 10,000"):
        data.folder(tmp_path, size=size)  # type: ignore[arg-type]


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
