"""Files are written whole or not at all; what a card and a --device option say."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import invlib as iv
from invlib import models
from invlib.core.files import append, appending, atomic_write, check_writable, png, unpng
from invlib.core.normalization import CIFAR10, UNIT, Normalization
from invlib.core.optional import device_of
from invlib.errors import ConfigError, DataError, DeviceError
from invlib.search.checkpoint import Checkpoint


def half_then_fail(beside: Path, *_: object) -> None:
    beside.write_text("half")
    raise OSError("disk full")


def test_a_file_is_replaced_whole_or_kept(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    atomic_write(path, lambda beside: beside.write_text("old"))
    with pytest.raises(DataError, match=r"a.txt cannot be written: disk full"):
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
    with pytest.raises(DataError, match=r"seen\.safetensors cannot be written: disk full"):
        iv.save_observation(seen, tmp_path / "seen.safetensors")
    search = type("Search", (), {"states": [], "pruned": []})()
    with pytest.raises(DataError, match="disk full"):
        Checkpoint(tmp_path / "search.pt", {}).save(search)
    assert not list(tmp_path.iterdir())


def test_a_private_file_is_its_owners_alone_also_while_it_is_written(tmp_path: Path) -> None:
    modes = []

    def write(beside: Path) -> None:
        modes.append(beside.stat().st_mode & 0o777)
        beside.write_text("secret")

    path = tmp_path / "a.txt"
    path.touch(0o644)
    atomic_write(path, write, private=True)
    assert [*modes, path.stat().st_mode & 0o777] == [0o600, 0o600]


def test_what_cannot_be_written_is_found_out_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_writable(tmp_path / "new" / "folder" / "a.txt")
    (tmp_path / "file").write_text("old")
    (tmp_path / "folder").mkdir()
    check_writable(tmp_path / "file")
    for path, said in ((tmp_path / "folder", "is a folder"), (tmp_path / "file" / "a", "cannot be written")):
        with pytest.raises(DataError, match=said):
            check_writable(path)
    monkeypatch.setattr(Path, "write_bytes", half_then_fail)
    with pytest.raises(DataError, match=r"a\.txt cannot be written: disk full"):
        check_writable(tmp_path / "new" / "a.txt")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]
    assert (tmp_path / "file").read_text() == "old"


APPENDS = """
import sys
from pathlib import Path
from invlib.cli.tables import append_row
for k in range(50):
    append_row(Path(sys.argv[1]), {"who": sys.argv[2], "n": k})
"""


def test_two_processes_lose_no_row_of_a_table(tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    table = tmp_path / "new" / "t.csv"
    both = [subprocess.Popen([sys.executable, "-c", APPENDS, str(table), who]) for who in "ab"]
    assert [process.wait() for process in both] == [0, 0]
    heading, *rows = table.read_text().splitlines()
    assert heading == "who\tn"
    assert sorted(rows) == sorted(f"{who}\t{k}" for who in "ab" for k in range(50))


def test_a_file_that_stays_empty_is_not_left(tmp_path: Path) -> None:
    path = tmp_path / "new" / "r"
    with pytest.raises(KeyError), appending(path, "record", wait=False):
        raise KeyError
    assert not list(tmp_path.iterdir())
    with appending(path, "record", wait=False, private=True) as file:
        append(file, b"row\n", "record")
    assert path.read_bytes() == b"row\n"
    assert path.stat().st_mode & 0o777 == 0o600


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


@pytest.mark.parametrize(
    "text", ["", "?", "aGVsbG8=", png(torch.zeros(1, 3, 4, 5))[:40], png(torch.zeros(1, 3, 4, 5))]
)
def test_a_picture_that_cannot_be_read_is_named(text: str) -> None:
    with pytest.raises(DataError, match="a picture in a record cannot be read"):
        unpng(text, 2)
