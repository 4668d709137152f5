"""The embedded images: what they are, that the script makes them, and what is said when the file is bad."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from invlib import data
from invlib.data import datasets
from invlib.errors import ConfigError, DataError, UnknownNameError

SHAPES = {
    "photos224": (4, 3, 224, 224),
    "photos64": (4, 3, 64, 64),
    "photos32": (4, 3, 32, 32),
    "patches32": (60, 3, 32, 32),
    "fashion": (100, 1, 32, 32),
}


@pytest.mark.parametrize("name", SHAPES)
def test_samples_are_images_in_the_unit_range(name: str) -> None:
    images, labels = data.samples(name)
    assert tuple(images.shape) == SHAPES[name]
    assert images.dtype == torch.float32
    assert labels.dtype == torch.int64
    assert images.min() >= 0
    assert images.max() <= 1
    assert images.amax(dim=(1, 2, 3)).min() > 0.3, "an image is black"
    assert images.is_contiguous()
    assert 0 <= labels.min() <= labels.max() <= 9


def test_sample_names_lists_every_sample() -> None:
    assert data.sample_names() == list(SHAPES)


def test_samples_file_is_small() -> None:
    assert data.resource("samples.npz").stat().st_size < 1_000_000


def test_indices_choose_rows_in_their_order() -> None:
    images, labels = data.samples("patches32")
    some, few = data.samples("patches32", [7, 2, 7])
    torch.testing.assert_close(some, images[[7, 2, 7]], rtol=0, atol=0)
    assert few.tolist() == labels[[7, 2, 7]].tolist()


def test_every_patch_shows_structure_and_differs_from_the_others() -> None:
    images, labels = data.samples("patches32")
    assert images.std(dim=(1, 2, 3)).min() > 0.05
    distances = torch.cdist(images.flatten(1), images.flatten(1)) + 1e9 * torch.eye(len(images))
    assert distances.min() > 1
    assert labels.tolist() == [i % 10 for i in range(60)]


def test_small_photographs_are_the_large_one_downsampled() -> None:
    large, _ = data.samples("photos224")
    for name, factor in (("photos32", 7), ("photos64", 3.5)):
        small, _ = data.samples(name)
        pooled = torch.nn.functional.interpolate(
            large, scale_factor=1 / factor, mode="bilinear", antialias=True
        )
        assert (pooled - small).abs().mean() < 0.02


def test_fashion_has_ten_of_every_class_by_turns_inside_a_black_frame() -> None:
    images, labels = data.samples("fashion")
    assert labels.tolist() == list(range(10)) * 10
    inner = images[:, :, 2:-2, 2:-2]
    assert images.count_nonzero() == inner.count_nonzero() > 0


def test_class_names() -> None:
    assert data.class_names("photos32") == ["astronaut", "chelsea", "coffee", "rocket"]
    assert data.class_names("fashion") == data.class_names("FashionMNIST")
    assert data.class_names("FashionMNIST")[9] == "Ankle boot"
    assert data.class_names("CIFAR10")[3] == "cat"
    hundred = data.class_names("CIFAR100")
    assert len(set(hundred)) == 100
    assert hundred == sorted(hundred)
    with pytest.raises(UnknownNameError, match="no class names for 'patches32'; known: photos224"):
        data.class_names("patches32")


def test_class_names_of_imagenet_come_from_torchvision() -> None:
    assert data.class_names("ImageNet")[281] == "tabby"


def test_describe_names_image_author_and_licence() -> None:
    assert data.describe("photos64", 2) == "photograph 'coffee' (Rachel Michetti, CC0), 64×64"
    assert data.describe("fashion", 1) == "Fashion-MNIST test image 'Trouser' (Zalando, MIT), padded to 32×32"
    assert (
        data.describe("patches32", 1)
        == "patch 1, a 48-pixel square of 'chelsea' (Stéfan van der Walt, CC0), 32×32"
    )
    assert data.describe("CIFAR10") == "CIFAR-10"
    assert data.describe("CIFAR10", 5) == "CIFAR-10, image 5"
    for name in SHAPES:
        assert "32×32" in data.describe(name) or name in ("photos224", "photos64")
    with pytest.raises(UnknownNameError, match="no data set 'CIFAR11'; known: CIFAR10"):
        data.describe("CIFAR11")
    with pytest.raises(ConfigError, match="index 4 of photos32 is out of range; expected 0 to 3"):
        data.describe("photos32", 4)


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        ([0, 60], "index 60 of patches32 is out of range; expected 0 to 59"),
        ([-1], "index -1 of patches32 is out of range"),
        ([], "no index of patches32 given"),
    ],
)
def test_bad_indices(indices: list[int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        data.samples("patches32", indices)


def test_unknown_sample() -> None:
    with pytest.raises(UnknownNameError, match="no sample 'photos16'; known: photos224, photos64"):
        data.samples("photos16")


def test_missing_resource_names_both_places() -> None:
    with pytest.raises(
        DataError, match=r"'nothing.npz' is missing: expected it at .*data/nothing.npz \(checkout\)"
    ):
        data.resource("nothing.npz")


def test_resource_prefers_the_installed_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "invlib" / "_data").mkdir(parents=True)
    (tmp_path / "invlib" / "_data" / "samples.npz").write_bytes(b"")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "samples.npz").write_bytes(b"")
    monkeypatch.setattr(datasets, "_PACKAGE", tmp_path / "invlib")
    assert data.resource("samples.npz") == tmp_path / "invlib" / "_data" / "samples.npz"


def put(folder: Path, monkeypatch: pytest.MonkeyPatch, **arrays: np.ndarray) -> None:
    (folder / "data").mkdir()
    np.savez(folder / "data" / "samples.npz", **arrays)  # type: ignore[arg-type]
    monkeypatch.setattr(datasets, "_PACKAGE", folder / "invlib")


def test_corrupt_sample_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = data.resource("samples.npz").read_bytes()
    put(tmp_path, monkeypatch)
    (tmp_path / "data" / "samples.npz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"samples.npz: corrupt .* expected an .npz with photos32, uint8"):
        data.samples("photos32")


def test_sample_file_with_flipped_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = bytearray(data.resource("samples.npz").read_bytes())
    broken[1000:1100] = bytes(100)
    put(tmp_path, monkeypatch)
    (tmp_path / "data" / "samples.npz").write_bytes(bytes(broken))
    with pytest.raises(DataError, match=r"samples.npz: corrupt"):
        data.samples("photos224")


def test_sample_file_that_is_a_pickle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path, monkeypatch, photos32=np.array([{}], dtype=object))
    with pytest.raises(DataError, match="photos32 claims to hold Python objects"):
        data.samples("photos32")


def test_sample_file_without_the_array(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path, monkeypatch, photos64=np.zeros((4, 64, 64, 3), np.uint8))
    with pytest.raises(
        DataError, match=r"samples.npz: has no array 'photos32'; expected uint8 \(4, 32, 32, 3\)"
    ):
        data.samples("photos32")


def test_sample_of_wrong_type(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fashion = np.zeros((100, 28, 28), np.uint8)
    put(
        tmp_path,
        monkeypatch,
        photos32=np.zeros((4, 32, 32, 3)),
        fashion=fashion,
        fashion_labels=np.zeros(9, int),
    )
    with pytest.raises(DataError, match=r"photos32 is float64 \(4, 32, 32, 3\), expected uint8"):
        data.samples("photos32")
    with pytest.raises(DataError, match=r"fashion_labels is int64 \(9,\), expected integers \(100,\)"):
        data.samples("fashion")


def script() -> ModuleType:
    place = data.resource("make_samples.py")
    spec = importlib.util.spec_from_file_location("make_samples", place)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_script_makes_the_committed_arrays() -> None:
    pytest.importorskip("skimage")
    made = script().arrays()
    with np.load(data.resource("samples.npz"), allow_pickle=False) as stored:
        assert set(made) | {"fashion", "fashion_labels"} == set(stored.files)
        for name, array in made.items():
            np.testing.assert_array_equal(array, stored[name], err_msg=name)


def test_script_checks_and_replaces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = script()
    made = {"photos32": np.arange(6, dtype=np.uint8)}
    out = tmp_path / "samples.npz"
    monkeypatch.setattr(module, "arrays", lambda fashion: made)
    monkeypatch.setattr("sys.argv", ["make_samples.py", "--out", str(out), "--fashion", str(tmp_path)])
    assert module.main() == 0
    assert [entry.name for entry in tmp_path.iterdir()] == ["samples.npz"]
    monkeypatch.setattr(
        "sys.argv", ["make_samples.py", "--check", "--out", str(out), "--fashion", str(tmp_path)]
    )
    assert module.main() == 0
    made["photos32"] = made["photos32"][::-1]
    assert module.main() == 1
    assert "samples.npz: differs in photos32" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["make_samples.py", "--fashion", str(tmp_path / "none")])
    assert module.main() == 1
    assert "apt install dataset-fashion-mnist" in capsys.readouterr().err


def test_script_reads_idx(tmp_path: Path) -> None:
    import gzip

    x = np.arange(2 * 3 * 4, dtype=np.uint8).reshape(2, 3, 4)
    header = bytes([0, 0, 8, 3]) + b"".join(side.to_bytes(4, "big") for side in x.shape)
    (tmp_path / "x.gz").write_bytes(gzip.compress(header + x.tobytes()))
    np.testing.assert_array_equal(script().idx(tmp_path / "x.gz"), x)
