"""python -m invlib.reconstruct_image and rec_mult: what they do, write and refuse."""

import csv
import runpy
import sys
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from invlib import cli, data, legacy, models
from invlib.attacks import auto
from invlib.cli import reconstruct, series, session
from invlib.cli.options import PRESETS, Request
from invlib.cli.tables import append_row, save_image
from invlib.core.normalization import UNIT
from invlib.data import files
from invlib.errors import DataError
from invlib.models import cards
from invlib.models.cards import Trained
from invlib.search import run
from invlib.search import state as state_module

SMALL = ["--model", "LeNetZhu", "--iterations", "2", "--device", "cpu", "--seed", "0"]


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("INVLIB_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def offline(*_: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr(files, "download", offline)


@pytest.fixture
def cifar10(tmp_path: Path) -> Path:
    """A data set of twelve images, two after another of one class."""
    folder = tmp_path / "sets"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (12, 32, 32, 3), dtype=np.uint8)
    np.savez(folder / "cifar10_test.npz", x=pixels, y=np.arange(12) // 2 + 2)
    return folder


def rows(path: str) -> list[dict[str, str]]:
    with Path(path).open(encoding="utf-8") as file:
        return list(csv.DictReader(file, delimiter="\t"))


def pixels(path: str) -> torch.Tensor:
    with Image.open(path) as image:
        array = np.asarray(image)
    return torch.from_numpy(array.copy()).float() / 255


def written() -> list[str]:
    return sorted(str(path.relative_to(Path.cwd())) for path in Path.cwd().rglob("*") if path.is_file())


def weights(path: str, model: str = "LeNetZhu", **card: object) -> None:
    known = {"model": model, "num_classes": 10, "in_channels": 3, "image_size": 32, "epochs": 7}
    known |= {"accuracy": 0.625, "normalization": {"mean": [0.5] * 3, "std": [0.25] * 3}}
    cards.save(Trained(model=models.build(model, seed=5), card=known | card), path)


# One image.


def test_the_command_of_2020_with_an_embedded_photograph(capsys: pytest.CaptureFixture[str]) -> None:
    weights("models/LeNetZhu-cifar10.safetensors")
    argv = ["--model", "LeNetZhu", "--dataset", "CIFAR10", "--trained_model", "--cost_fn", "sim"]
    argv += ["--indices", "def", "--restarts", "2", "--save_image", "--target_id", "-1", "--optim", "ours"]
    assert reconstruct.main([*argv, "--iterations", "3", "--device", "cpu"]) == 0
    out, err = capsys.readouterr()
    assert "attack ours: as --optim says" in out
    assert "--target_id -1 takes images that come with invlib; 2020 took a photograph of a car" in out
    assert "photograph 'chelsea'" in out
    assert "LeNetZhu, trained on CIFAR-10, accuracy 0.625" in out
    assert "2 restarts of 3 iterations" in out
    assert "PSNR" in out
    assert "SSIM" in out
    assert "grey image" in out
    assert "gradient matching: 100%" in err

    pictures = ["images/cat_ground_truth--1.png", "images/cat_trainedLeNetZhu_sim--1.png"]
    assert [name for name in written() if name.startswith("images")] == pictures
    assert all(name in out for name in pictures)
    truth, _ = data.samples("photos32", [1])
    torch.testing.assert_close(pixels(pictures[0]).permute(2, 0, 1), truth[0])

    (row,) = rows("tables/table_exp_iv.csv")
    assert tuple(row) == reconstruct.COLUMNS
    assert (row["model"], row["trained"], row["val_acc"], row["epochs"]) == ("LeNetZhu", "True", "0.625", "7")
    assert (row["rec_img"], row["gt_img"]) == tuple(Path(name).name for name in reversed(pictures))
    assert row["target_id"] == "-1"
    # What is saved is what was measured.
    saved = (pixels(pictures[1]) - pixels(pictures[0])).square().mean()
    assert float(saved) == pytest.approx(float(row["test_mse"]), rel=0.02)
    assert float(row["psnr"]) == pytest.approx(-10 * np.log10(float(row["test_mse"])))


def test_shipped_weights_are_found() -> None:
    shipped = [(name, s) for name, sets in models.available().items() for s in sets if name == "LeNetZhu"]
    if ("LeNetZhu", "fashion-mnist") not in shipped:
        pytest.skip("no weights of LeNetZhu come with this checkout")
    argv = [*SMALL, "--dataset", "FashionMNIST", "--trained_model", "--target_id", "-1", "--save_image"]
    assert reconstruct.main(argv) == 0
    (row,) = rows("tables/table_exp_iv.csv")
    assert float(row["val_acc"]) == models.model_card("LeNetZhu", "fashion-mnist")["accuracy"]
    assert pixels(f"images/{row['gt_img']}").shape == (32, 32)


def test_a_network_without_weights_is_never_called_trained(capsys: pytest.CaptureFixture[str]) -> None:
    assert reconstruct.main(["--model", "MLP", "--trained_model", "--target_id", "-1"]) == 2
    err = capsys.readouterr().err
    files = "neither models/MLP-cifar10.safetensors nor models/MLP_120.pth"
    assert f"no trained weights of MLP for CIFAR10: there is {files}" in err
    assert "python -m invlib train --model MLP --dataset CIFAR10 --out models/MLP-cifar10.safetensors" in err
    assert not written()
    assert reconstruct.main(["--model", "Net", "--trained_model", "--target_id", "-1"]) == 2
    assert "'Net'" in capsys.readouterr().err


def test_epochs_insist(capsys: pytest.CaptureFixture[str]) -> None:
    weights("models/LeNetZhu-cifar10.safetensors")
    argv = [*SMALL, "--trained_model", "--target_id", "-1"]
    assert reconstruct.main([*argv, "--epochs", "120"]) == 2
    assert "--epochs is 120, but LeNetZhu's weights for CIFAR10 were trained for 7" in capsys.readouterr().err
    assert reconstruct.main([*argv, "--epochs", "7"]) == 0


def test_an_image_of_the_data_set(cifar10: Path) -> None:
    argv = [*SMALL, "--data_path", str(cifar10), "--save_image", "--target_id", "5"]
    assert reconstruct.main([*argv, "--label_flip", "--name", "own", "--dtype", "double"]) == 0
    (row,) = rows("tables/table_exp_own.csv")
    # Image 5 has label 4 (deer), and 5 (dog) once it is flipped.
    assert row["gt_img"] == "dog_ground_truth-5.png"
    assert (row["target_id"], row["dtype"], row["seed"]) == ("5", "double", "0")
    with np.load(cifar10 / "cifar10_test.npz") as stored:
        expected = torch.from_numpy(stored["x"][5]).float() / 255
    torch.testing.assert_close(pixels("images/dog_ground_truth-5.png"), expected)


def test_the_seed_fixes_everything(cifar10: Path) -> None:
    argv = ["--model", "LeNetZhu", "--iterations", "2", "--device", "cpu", "--data_path", str(cifar10)]
    for seed in ("1", "1", "2"):
        assert reconstruct.main([*argv, "--seed", seed]) == 0
    assert reconstruct.main(argv) == 0
    first, again, other, drawn = rows("tables/table_exp_iv.csv")
    assert {**first, "timing": ""} == {**again, "timing": ""}
    assert first["rec_loss"] != other["rec_loss"]
    assert int(drawn["seed"]) > 2


def test_several_images_are_of_different_classes(cifar10: Path) -> None:
    argv = [*SMALL, "--data_path", str(cifar10), "--target_id", "0", "--num_images", "3", "--save_image"]
    assert reconstruct.main([*argv, "--accumulation", "3", "--batch_size", "1"]) == 0
    (row,) = rows("tables/table_exp_iv.csv")
    assert row["target_id"] == "0 2 4"
    assert row["accumulation"] == "3"
    assert row["rec_img"] == "bird_LeNetZhu_sim-0.png cat_LeNetZhu_sim-2.png deer_LeNetZhu_sim-4.png"
    # Each is saved beside the true image that it was matched to.
    mse = [
        float((pixels(f"images/{a}") - pixels(f"images/{b}")).square().mean())
        for a, b in zip(row["rec_img"].split(), row["gt_img"].split(), strict=True)
    ]
    assert sum(mse) / 3 == pytest.approx(float(row["test_mse"]), rel=0.02)


@pytest.mark.parametrize(
    ("name", "dtype"), [("float", torch.float32), ("double", torch.float64), ("half", torch.float16)]
)
def test_dtype_is_that_of_the_attack(monkeypatch: pytest.MonkeyPatch, name: str, dtype: torch.dtype) -> None:
    seen = []
    step = state_module.step

    def watching(problem: Any, settings: Any, measure: Any, state: Any) -> None:
        seen.append(state.values[0].dtype)
        step(problem, settings, measure, state)

    monkeypatch.setattr(run, "step", watching)
    assert reconstruct.main([*SMALL, "--target_id", "-1", "--dtype", name]) == 0
    assert seen == [dtype] * 2


def test_the_attack_knows_how_the_client_trained() -> None:
    argv = [*SMALL, "--target_id", "-1", "--num_images", "4", "--accumulation", "3", "--batch_size", "2"]
    request = parsed([*argv, "--local_lr", "0.5"])
    machine = session.reconstructor(models.build("LeNetZhu"), UNIT, request.client, request.attack, 4)
    assert isinstance(machine, legacy.FedAvgReconstructor)
    assert (machine.local_steps, machine.local_lr, machine.batch_size) == (3, 0.5, 2)
    assert (machine.num_images, machine.use_updates) == (4, True)


def test_labels_can_be_found_too() -> None:
    argv = [*SMALL, "--target_id", "-1", "--optim", "zhu", "--soft_labels", "--num_images", "2"]
    assert reconstruct.main(argv) == 0
    (row,) = rows("tables/table_exp_iv.csv")
    assert (row["OPTIM"], row["cost_fn"]) == ("zhu", "l2")


def test_the_strongest_attack_can_be_asked_for() -> None:
    assert reconstruct.main([*SMALL, "--target_id", "-1", "--optim", "best"]) == 0
    (row,) = rows("tables/table_exp_iv.csv")
    assert row["OPTIM"] == "best"
    assert float(row["psnr"]) > 60  # a chain of layers that can be undone: closed form
    argv = ["--model", "ConvNet8", "--iterations", "2", "--device", "cpu", "--seed", "0", "--target_id", "-1"]
    assert reconstruct.main([*argv, "--optim", "best", "--restarts", "2"]) == 0
    assert float(rows("tables/table_exp_iv.csv")[1]["psnr"]) < 60


def test_trained_weights_are_attacked_by_the_strongest(capsys: pytest.CaptureFixture[str]) -> None:
    weights("models/ConvNet8-cifar10.safetensors", "ConvNet8")
    argv = ["--model", "ConvNet8", "--iterations", "60", "--device", "cpu", "--target_id", "-1"]
    seed = [*argv, "--trained_model", "--cost_fn", "sim", "--indices", "def", "--restarts", "3"]
    assert reconstruct.main(seed) == 0
    out = capsys.readouterr().out
    assert (
        "attack best: this project's strongest, because the weights are trained; --optim ours takes the"
        in out
    )
    assert reconstruct.main([*argv[:3], "2", *argv[4:], "--trained_model", "--signed"]) == 0
    assert "attack ours: the published attack, because this project's strongest takes no --signed" in (
        capsys.readouterr().out
    )
    assert [row["OPTIM"] for row in rows("tables/table_exp_iv.csv")] == ["best", "ours"]


@pytest.mark.parametrize(
    ("argv", "name"),
    [
        ([], "ours"),
        (["--trained_model"], "best"),
        (["--trained_model", "--optim", "ours"], "ours"),
        (["--trained_model", "--cost_fn", "sim", "--indices", "def", "--weights", "equal"], "best"),
        (["--trained_model", "--filter", "none", "--scoring_choice", "loss"], "best"),
        (["--trained_model", "--restarts", "32", "--tv", "0.2", "--iterations", "9"], "best"),
        (["--trained_model", "--cost_fn", "l2"], "ours"),
        (["--trained_model", "--soft_labels"], "ours"),
        (["--cost_fn", "sim", "--optim", "best"], "best"),
    ],
)
def test_which_attack_is_taken(argv: list[str], name: str) -> None:
    attack = parsed(argv).attack
    assert attack.optim == name
    expected = {"ours": 24_000, "best": PRESETS["best"]["max_iterations"]}[name]
    assert attack.config["max_iterations"] == (9 if "--iterations" in argv else expected)


def test_the_strongest_attack_prunes_its_restarts(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(session, "best", lambda **settings: seen.append(settings) or auto.best(**settings))
    argv = ["--model", "ConvNet8", "--iterations", "1", "--device", "cpu", "--target_id", "-1"]
    assert reconstruct.main([*argv, "--optim", "best", "--restarts", "2"]) == 0
    assert seen == [{"steps": 1, "restarts": 2, "tv": auto.TV, "prune": True}]


def test_what_the_strongest_attack_ignores_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    argv = [*SMALL, "--target_id", "-1", "--optim", "best", "--cost_fn", "l2", "--soft_labels"]
    assert reconstruct.main(argv) == 2
    assert "--optim best was given --cost_fn, --soft_labels" in capsys.readouterr().err
    assert not written()


def test_dryrun_writes_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert reconstruct.main([*SMALL, "--target_id", "-1", "--save_image", "--dryrun"]) == 0
    assert "dry run: nothing written" in capsys.readouterr().out
    assert not written()


def test_random_tensors_run_on_their_own_chunk() -> None:
    argv = [*SMALL, "--target_id", "-1", "--indices", "batch", "--restarts", "2"]
    assert reconstruct.main(argv) == 0


def test_imagenet_means_torchvisions_network() -> None:
    argv = ["--model", "ResNet18", "--dataset", "ImageNet", "--target_id", "-1", "--device", "cpu"]
    here = session.Session(parsed(argv), many=False)
    subject = here.images.subject(here.images.first)
    assert subject.images.shape == (1, 3, 224, 224)
    assert subject.classes == ["tabby"]
    assert here.network.about == "resnet18, untrained"
    assert models.parameter_count(here.network.model) == 11_689_512


def test_imagenet_weights_are_torchvisions(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(models, "build", lambda *a, **k: asked.append((a, k)) or torch.nn.Linear(1, 1))
    argv = ["--model", "resnet18", "--dataset", "ImageNet", "--target_id", "-1", "--trained_model"]
    session.Session(parsed(argv), many=False)
    assert asked == [(("resnet18",), {"weights": "IMAGENET1K_V1"})]


def test_imagenet_is_read_image_by_image(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load(name: str, root: object, indices: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        asked.extend(indices)
        return torch.zeros(1, 3, 32, 32), torch.tensor([indices[0] // 2])

    monkeypatch.setattr(data, "load", load)
    argv = ["--model", "LeNetZhu", "--dataset", "ImageNet", "--num_images", "2", "--target_id", "6"]
    here = session.Session(parsed(argv), many=True)
    monkeypatch.setattr(data, "describe", lambda name, row: f"{name} {row}")
    assert here.images.subject(6).ids == ["6", "8"]
    assert max(asked) == 8


# Flags do what they say.


def parsed(argv: list[str], command=reconstruct) -> Request:
    seen = []
    run = command.run
    try:
        command.run = lambda args: seen.append(args) or 0
        command.main(argv)
    finally:
        command.run = run
    return Request.parse(seen[0])


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--signed", "--boxed"], {"signed": False, "boxed": False}),
        (["--no-signed"], {"signed": False, "boxed": True}),
        (["--no_box"], {"signed": True, "boxed": False}),
        (["--signed", "--use_sign", "--no-boxed"], {"signed": True, "boxed": False}),
        (["--optim", "zhu", "--use_box", "--cost_fn", "l1"], {"boxed": True, "cost_fn": "l1"}),
        (["--max_iterations", "7", "--restarts", "3"], {"max_iterations": 7, "restarts": 3}),
        (["--iterations", "7", "--tv", "0", "--lr", "0.5"], {"total_variation": 0.0, "lr": 0.5}),
        (
            ["--indices", "top10", "--weights", "exp", "--optimizer", "sgd", "--init", "rand"],
            {"indices": "top10", "weights": "exp", "optim": "sgd", "init": "rand"},
        ),
        (["--scoring_choice", "tv", "--filter", "median"], {"scoring_choice": "tv", "filter": "median"}),
    ],
)
def test_options_become_a_config(argv: list[str], expected: dict) -> None:
    config = parsed(argv).attack.config
    assert {key: config[key] for key in expected} == expected
    assert set(config) == set(legacy.DEFAULT_CONFIG)


def test_unsigned_is_a_flag_of_rec_mult() -> None:
    assert parsed(["--unsigned"], series).attack.config["signed"] is False
    assert parsed([], series).attack.config["signed"] is True
    assert parsed(["--signed", "--unsigned"], series).attack.config["signed"] is False


def test_a_request_keeps_what_it_was_parsed_to() -> None:
    request = parsed(["--num_images", "2", "--model", "MLP", "--local_lr", "0.5", "--name", "own"])
    kept = (request.images.num_images, request.network.model, request.client.local_lr, request.files.name)
    assert kept == (2, "MLP", 0.5, "own")
    assert parsed([], series).images.target_id == 0
    assert request.images.target_id is None
    for part in (request, request.images, request.network, request.client, request.attack, request.files):
        with pytest.raises(FrozenInstanceError):
            part.name = "other"


def test_deterministic_holds_during_the_attack_only(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    step = state_module.step

    def watching(problem: Any, settings: Any, measure: Any, state: Any) -> None:
        seen.append(torch.backends.cudnn.deterministic)
        step(problem, settings, measure, state)

    monkeypatch.setattr(run, "step", watching)
    assert reconstruct.main([*SMALL, "--target_id", "-1", "--deterministic"]) == 0
    assert seen == [True, True]
    assert not torch.backends.cudnn.deterministic


# What is refused, before anything is written.


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--cost_fn", "cos"], "config 'cost_fn' is 'cos'; expected one of 'sim'"),
        (["--dtype", "int8"], "--dtype is 'int8'; expected one of float, float32"),
        (["--dataset", "SVHN"], "--dataset is 'SVHN'; expected one of CIFAR10, CIFAR100"),
        (["--device", "warp"], "--device is 'warp'; expected 'cpu' or 'cuda'"),
        (["--device", "cuda:99"], "--device is 'cuda:99', but torch finds"),
        (["--model", "LeNet"], "no model 'LeNet'; did you mean LeNetZhu"),
        (["--num_images", "0"], "--num_images is 0; expected at least 1"),
        (["--num_images", "11"], "--num_images is 11; expected at most 10, an image of each class"),
        (["--accumulation", "-1"], "--accumulation is -1; expected at least 0"),
        (["--chunk", "0"], "--chunk is 0; expected at least 1"),
        (["--restarts", "0"], "--restarts is 0; expected at least 1"),
        (["--accumulation", "2", "--batch_size", "5"], "FedAvg batch_size is 5; expected at most the 1"),
    ],
)
def test_bad_options(capsys: pytest.CaptureFixture[str], argv: list[str], message: str) -> None:
    start = [] if "--device" in argv else ["--device", "cpu"]
    assert reconstruct.main(["--model", "LeNetZhu", "--target_id", "-1", *start, *argv]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert message in err
    assert not written()


def test_missing_data_set(capsys: pytest.CaptureFixture[str]) -> None:
    assert reconstruct.main([*SMALL, "--target_id", "5"]) == 2
    err = capsys.readouterr().err
    assert "CIFAR10 (test) could not be downloaded" in err
    assert "--target_id -1" in err
    assert err.count("\n") == 1


def test_image_out_of_range(capsys: pytest.CaptureFixture[str], cifar10: Path) -> None:
    assert reconstruct.main([*SMALL, "--target_id", "12", "--data_path", str(cifar10)]) == 2
    assert "index 12 of CIFAR10 is out of range; expected 0 to 11" in capsys.readouterr().err


def test_no_finite_score(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(legacy.GradientReconstructor, "_score", lambda *_: float("nan"))
    assert reconstruct.main([*SMALL, "--target_id", "-1"]) == 2
    assert "no restart has a finite score (1 ran in float)" in capsys.readouterr().err
    assert not written()


def test_table_of_other_columns(capsys: pytest.CaptureFixture[str]) -> None:
    Path("tables").mkdir()
    Path("tables/table_exp_iv.csv").write_text("a\tb\n1\t2\n")
    assert reconstruct.main([*SMALL, "--target_id", "-1"]) == 2
    out, err = capsys.readouterr()
    assert "table tables/table_exp_iv.csv has columns a b; expected model dataset" in err
    assert not out
    assert Path("tables/table_exp_iv.csv").read_text() == "a\tb\n1\t2\n"


def test_ctrl_c_saves_what_is_there(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    step = state_module.step

    def interrupted(problem: Any, settings: Any, measure: Any, state: Any) -> None:
        if state.step == 2:
            raise KeyboardInterrupt
        step(problem, settings, measure, state)

    began: list[int] = []
    monkeypatch.setattr(run, "step", interrupted)
    argv = ["--model", "LeNetZhu", "--iterations", "9", "--device", "cpu", "--target_id", "-1"]
    assert reconstruct.main([*argv, "--save_image"]) == 130
    assert "interrupted" in capsys.readouterr().out
    (row,) = rows("tables/table_exp_iv.csv")
    assert Path("images", row["rec_img"]).exists()

    assert series.main([*argv, "--num_exp", "3"]) == 130
    assert not Path("results").exists()  # the client that was cut short is in no table

    def later(*args: Any) -> None:
        began.append(args[-1].step == 0)
        (interrupted if sum(began) > 1 else step)(*args)

    monkeypatch.setattr(run, "step", later)
    assert series.main([*argv, "--num_exp", "3"]) == 130
    (folder,) = [path for path in Path("results").iterdir() if path.is_dir()]
    assert len(rows(f"{folder}/table_psnrs.csv")) == 1
    # A series that was cut short does not stand for its settings.
    assert not Path("results/table_configs.csv").exists()


def test_a_row_is_kept_where_its_pictures_cannot_be(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise DataError("images/x.png cannot be written: disk full")

    monkeypatch.setattr(reconstruct, "save_image", full)
    assert reconstruct.main([*SMALL, "--target_id", "-1", "--save_image"]) == 2
    assert "disk full" in capsys.readouterr().err
    assert len(rows("tables/table_exp_iv.csv")) == 1


def test_pictures_are_their_owners_alone() -> None:
    assert reconstruct.main([*SMALL, "--target_id", "-1", "--save_image"]) == 0
    assert {path.stat().st_mode & 0o777 for path in Path("images").iterdir()} == {0o600}


def test_a_second_run_of_a_series_says_whose_rows_are_there(capsys: pytest.CaptureFixture[str]) -> None:
    argv = [*SMALL, "--target_id", "-1", "--num_exp", "2"]
    assert series.main(argv) == 0
    assert "earlier runs" not in capsys.readouterr().out
    assert series.main(argv) == 0
    assert "has 2 rows of earlier runs with these settings" in capsys.readouterr().out
    (table,) = Path("results").glob("*/table_mul_exp_iv.csv")
    assert [row["target_id"] for row in rows(str(table))] == ["patches32-0", "patches32-1"] * 2


def test_a_series_with_too_few_images_ends_before_the_first(capsys: pytest.CaptureFixture[str]) -> None:
    assert series.main([*SMALL, "--target_id", "-1", "--num_exp", "61"]) == 2
    said = capsys.readouterr()
    assert "index 60 of patches32 is out of range" in said.err
    assert "attack" not in said.out


# A series.


def test_series(capsys: pytest.CaptureFixture[str]) -> None:
    argv = [*SMALL, "--target_id", "-1", "--num_exp", "2", "--num_images", "2", "--accumulation", "2"]
    for _ in range(2):
        assert series.main([*argv, "--batch_size", "1", "--local_lr", "0.01"]) == 0
    (folder,) = [path for path in Path("results").iterdir() if path.is_dir()]
    assert capsys.readouterr().out.splitlines()[-1] == str(folder)
    assert sorted(path.name for path in folder.glob("*.png")) == ["0.png", "1.png", "2.png", "3.png"]
    experiments = rows(f"{folder}/table_mul_exp_iv.csv")
    assert tuple(experiments[0]) == series.COLUMNS
    assert [row["target_id"] for row in experiments] == [
        "patches32-0 patches32-1",
        "patches32-2 patches32-3",
    ] * 2
    assert {row["config_hash"] for row in experiments} == {folder.name}
    psnrs = [float(row["psnr"]) for row in rows(f"{folder}/table_psnrs.csv")][:2]
    (config,) = rows("results/table_configs.csv")
    assert config["config_hash"] == folder.name
    assert (config["local_lr"], config["batch_size"], config["num_exp"]) == ("0.01", "1", "2")
    for row in (config, *rows(f"{folder}/table_psnr_stats.csv")):
        assert float(row["mean"]) == pytest.approx(sum(psnrs) / 2, abs=1e-3)
        assert float(row["max"]) == pytest.approx(max(psnrs), abs=1e-3)
        assert row["number_of_samples"] == "2"


def test_series_over_a_data_set(cifar10: Path) -> None:
    argv = [*SMALL, "--data_path", str(cifar10), "--num_exp", "2", "--result_path", "found"]
    assert cli.main(["rec-mult", *argv]) == 0
    (folder,) = [path for path in Path("found").iterdir() if path.is_dir()]
    assert [row["target_id"] for row in rows(f"{folder}/table_psnrs.csv")] == ["0", "1"]


def test_series_dryrun(capsys: pytest.CaptureFixture[str]) -> None:
    assert series.main([*SMALL, "--target_id", "-1", "--num_exp", "2", "--dryrun"]) == 0
    assert "number_of_samples 2" in capsys.readouterr().out
    assert not written()


def test_series_of_none(capsys: pytest.CaptureFixture[str]) -> None:
    assert series.main([*SMALL, "--num_exp", "0"]) == 2
    assert "--num_exp is 0; expected at least 1" in capsys.readouterr().err


def test_perfect_images_have_no_mean() -> None:
    summary = series._summary([float("inf"), 10.0, 20.0], 0)
    assert (summary["number_of_samples"], summary["mean"], summary["max"]) == (3, 15, 20)


# How it is called, and what is on disk.


@pytest.mark.parametrize("module", ["reconstruct_image", "rec_mult"])
def test_modules_are_commands(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, module: str
) -> None:
    monkeypatch.setattr(sys, "argv", [module, "--help"])
    monkeypatch.delitem(sys.modules, f"invlib.{module}", raising=False)
    with pytest.raises(SystemExit) as ended:
        runpy.run_module(f"invlib.{module}", run_name="__main__")
    assert ended.value.code == 0
    out = capsys.readouterr().out
    for flag in ("--target_id", "--no_sign", "--label_flip", "--table_path", "what is written:"):
        assert flag in out


def test_reconstruct_image_is_a_command_of_invlib() -> None:
    assert cli.main(["reconstruct-image", *SMALL, "--target_id", "-1", "--dryrun"]) == 0


def test_nothing_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    append_row(tmp_path / "t.csv", {"a": 1})

    def full(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(DataError, match=r"t\.csv cannot be written: disk full"):
        append_row(tmp_path / "t.csv", {"a": 2})
    with pytest.raises(DataError, match=r"x\.png cannot be written: disk full"):
        save_image(tmp_path / "x.png", torch.zeros(3, 4, 4))
    assert written() == ["t.csv"]
    assert (tmp_path / "t.csv").read_text() == "a\n1\n"


def test_table_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match=r"table .*t\.csv cannot be read"):
        append_row(tmp_path / "t.csv", {"a": 1})
