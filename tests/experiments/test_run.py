"""``python -m invlib experiment``: resuming, refusing, interrupting; on plain guesses, which cost nothing."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from invlib import cli, data, errors, experiments, models
from invlib.attacks.auto import best
from invlib.core import files
from invlib.core.normalization import CIFAR10, UNIT
from invlib.core.reconstruction import Reconstruction
from invlib.experiments import Case, Experiment, Size, plan, record
from invlib.experiments.gallery import Gallery
from invlib.experiments.networks import Networks
from invlib.models import cards
from invlib.models.cards import Trained


@dataclass(frozen=True, kw_only=True)
class Guess:
    """An attack that shows one grey level."""

    level: float
    status: str = "max_steps"

    def __call__(self, model, observation, *, generator=None):
        images = torch.full((observation.num_images, *observation.image_shape), self.level)
        images = images + 1e-3 * torch.randn(images.shape, generator=generator)
        return Reconstruction(
            images=images.clamp(0, 1),
            labels=observation.labels,
            score=self.level,
            trial_scores=torch.tensor([self.level]),
            trials=images[None],
            status=self.status,
            seconds=0.0,
            evaluations=1,
        )


def register(monkeypatch, **attacks):
    made = [
        Case(columns={"attack": name}, network="LeNetZhu", attack=attack, images=1 + (name == "pair"))
        for name, attack in attacks.items()
    ]
    size = Size(images=2, steps=4)
    experiment = Experiment(title="guesses", cases=lambda setup: made, full=size, reduced=size)
    monkeypatch.setitem(experiments.EXPERIMENTS, "guess", experiment)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder to work in, with no data set and no judge, whose features take time."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("INVLIB_DATA", raising=False)
    monkeypatch.setattr(Networks, "judge", lambda *_: None)
    monkeypatch.setattr("invlib.metrics.identification.by_ssim", lambda _, them: torch.zeros(len(them)))
    return tmp_path


def rows(name="guess"):
    return record.read(Path("results") / f"{name}.jsonl")


def timeless(found):
    return [{k: v for k, v in row.items() if k not in ("seconds", "started")} for row in found]


def test_a_true_attack_twice_does_nothing_the_second_time(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("INVLIB_DATA", raising=False)
    argv = ["experiment", "table1", "--steps", "2", "--images", "1", "--device", "cpu"]
    argv += ["--only", "LeNetZhu, untrained"]
    assert cli.main(argv) == 0
    before = Path("results/table1.jsonl").read_bytes()
    out = capsys.readouterr().out
    assert "images: patches32 (train) from 0 on; device cpu" in out
    assert "REDUCED FORM of table1" in out
    assert "46.25 ± 12.66" in out
    assert cli.main(argv) == 0
    assert ": 0 attacks made" in capsys.readouterr().out
    assert Path("results/table1.jsonl").read_bytes() == before
    found = rows("table1")
    assert len({row["key"] for row in found}) == len(found) >= 2
    cosine = next(row for row in found if "cosine" in row["case"])
    image = data.samples("patches32", [0])[0]
    settings = cosine["settings"]
    assert settings["attack"]["steps"] == 2
    assert settings["dataset"] == "patches32"
    assert settings["reduced"] is True
    assert cosine["evaluations"] <= 2 + 2
    assert cosine["judge"] == ["ConvNet8-cifar10"]
    assert 1 <= cosine["rank_features"][0] <= cosine["candidates"] == 60
    assert cosine["floors"][0]["grey"] == pytest.approx(
        float(-10 * image.var(correction=0).log10()), abs=1e-3
    )
    assert cosine["floors"][0]["class"] is None  # a patch's label is no class
    assert [bool(row["truth"]) for row in found] == [True] + [False] * (len(found) - 1)


def test_a_row_that_describes_best_as_before_is_not_made_anew(here, monkeypatch):
    register(monkeypatch, best=best(steps=3, init="randn"))
    made = plan.plan(plan.Request(name="guess", images=1, reduced=True))
    [case] = made.cases
    settings = made.case_settings(case)
    now = settings["attack"]
    settings["attack"] = {
        "": "best.<locals>.attack",
        "settings": {"init": "randn"},
        **{name: now[name] for name in ("matching", "natural", "shifts", "tv")},
        "steps": 3,
    }
    row = {
        **{"experiment": "guess", "case": case.name, "image": made.first, "seconds": 1.0, "psnr": [20.0]},
        **{"columns": {}, "ssim": [0.5], "rank_ssim": [1], "rank_features": [1], "evaluations": 3},
        **{"floors": [{"grey": 10.0, "mean": 10.0, "class": None}], "candidates": 60, "labels_right": 1},
        **{
            "paper": None,
            "sweep": None,
            "series": "",
            "device": "cpu",
            "truth": None,
            "reconstruction": None,
        },
        "settings": settings,
        "key": plan.key(case.name, made.first, settings),
    }
    path = here / "r.jsonl"
    path.write_bytes(files.encode(row))
    assert experiments.run("guess", path, images=1, reduced=True, progress=False) == 0
    path.write_bytes(files.encode({**row, "key": "another"}))
    with pytest.raises(errors.DataError, match="expected the same"):
        experiments.run("guess", path, images=1, reduced=True, progress=False)


def test_the_missing_rows_alone_are_made(here, monkeypatch):
    register(monkeypatch, dark=Guess(level=0.2), pair=Guess(level=0.6))
    assert cli.main(["experiment", "guess", "--device", "cpu"]) == 0
    whole = rows()
    assert [(r["case"], r["image"]) for r in whole] == [("dark", 0), ("pair", 0), ("dark", 1), ("pair", 2)]
    assert [len(r["psnr"]) for r in whole] == [1, 2, 1, 2]
    assert all(r["truth"] for r in whole if r["case"] == "pair")
    text = Path("results/guess.jsonl").read_bytes()
    lines = text.splitlines(keepends=True)
    for left in (lines[0] + lines[1][:40], lines[3] + lines[0], b"", text[:-1]):
        Path("results/guess.jsonl").write_bytes(left)
        assert cli.main(["experiment", "guess", "--device", "cpu", "--resume"]) == 0
        again = sorted(timeless(rows()), key=lambda r: (r["image"], r["case"]))
        for row, expected in zip(
            again, sorted(timeless(whole), key=lambda r: (r["image"], r["case"])), strict=True
        ):
            assert {k: v for k, v in row.items() if k != "truth"} == {
                k: v for k, v in expected.items() if k != "truth"
            }


def test_exact_images_in_another_order_are_matched_and_found(tmp_path, monkeypatch, capsys):
    class Exact(Guess):
        def __call__(self, *args, **kwargs):
            return replace(super().__call__(*args, **kwargs), images=data.samples("patches32", [1, 0])[0])

    monkeypatch.chdir(tmp_path)
    register(monkeypatch, pair=Exact(level=0.5))
    assert cli.main(["experiment", "guess", "--images", "1", "--dataset", "patches32"]) == 0
    (row,) = rows()
    assert row["psnr"] == ["inf", "inf"]
    assert row["reconstruction"] == row["truth"]
    assert row["rank_ssim"] == row["rank_features"] == [1, 1]
    assert len(row["shares"]) == 2
    assert min(row["shares"]) <= 1 <= sum(row["shares"]) + 1e-6
    assert row["labels_right"] == 2
    assert "2 exact" in capsys.readouterr().out


def test_a_case_that_is_named_whole_is_meant_alone():
    asked = {"name": "dispute", "images": 1, "reduced": True, "dataset": "patches32"}
    name = "ResNet20, fresh, evaluation, 1, 1"  # and not "..., 1, 16"
    assert [case.name for case in plan.plan(plan.Request(**asked, only=(name,))).cases] == [name]
    assert len(plan.plan(plan.Request(**asked, only=("ResNet20, fresh, evaluation, 1,",))).cases) == 3


def test_labels_of_many_images_are_inferred(here):
    argv = ["experiment", "multi", "--only", "ConvNet8, 4", "--steps", "1", "--images", "1"]
    assert cli.main(argv) == 0
    (row,) = rows("multi")
    assert row["settings"]["labels"] == "inferred"
    assert (len(row["psnr"]), row["sweep"], row["settings"]["num_classes"]) == (4, 4, 100)
    assert row["labels_right"] == 4  # of an untrained network they are exact


def test_more_images_go_on_from_fewer(here, monkeypatch):
    register(monkeypatch, dark=Guess(level=0.2))
    assert cli.main(["experiment", "guess", "--images", "1"]) == 0
    first = Path("results/guess.jsonl").read_bytes()
    assert cli.main(["experiment", "guess", "--images", "3"]) == 0
    assert Path("results/guess.jsonl").read_bytes().startswith(first)
    assert [row["image"] for row in rows()] == [0, 1, 2]
    assert [row["seed"] for row in rows()] == [0, 1, 2]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--steps", "5"], "steps=4, now 5"),
        (["--seed", "1"], "seed=0, now 1"),
        (["--dataset", "photos32"], "dataset='patches32', now 'photos32'"),
    ],
)
def test_a_record_of_other_settings_is_refused(here, monkeypatch, capsys, argv, message):
    register(monkeypatch, dark=Guess(level=0.2))
    assert cli.main(["experiment", "guess", "--images", "1"]) == 0
    before = Path("results/guess.jsonl").read_bytes()
    assert cli.main(["experiment", "guess", "--images", "1", *argv]) == 2
    assert message in capsys.readouterr().err
    assert Path("results/guess.jsonl").read_bytes() == before
    assert cli.main(["experiment", "guess", "--images", "1", "--fresh", *argv]) == 0
    assert Path("results/guess.jsonl.old").read_bytes() == before
    assert len(rows()) == 1


def test_another_attack_or_case_or_experiment_in_the_record_is_named(here, monkeypatch, capsys):
    register(monkeypatch, dark=Guess(level=0.2))
    assert cli.main(["experiment", "guess", "--images", "1"]) == 0
    register(monkeypatch, dark=Guess(level=0.3))
    assert cli.main(["experiment", "guess", "--images", "1"]) == 2
    assert "attack.level=0.2, now 0.3" in capsys.readouterr().err
    register(monkeypatch, light=Guess(level=0.2))
    assert cli.main(["experiment", "guess", "--images", "1"]) == 2
    assert "holds 'dark', which this form of guess does not have" in capsys.readouterr().err
    argv = ["experiment", "multi", "--images", "1", "--out", "results/guess.jsonl"]
    assert cli.main(argv) == 2
    assert "of experiment 'guess', not of 'multi'" in capsys.readouterr().err


@pytest.mark.parametrize("how", ["raise", "status"])
def test_ctrl_c_keeps_what_had_ended(here, monkeypatch, capsys, how):
    class Interrupted(Guess):
        def __call__(self, *args, **kwargs):
            if how == "raise":
                raise KeyboardInterrupt
            return super().__call__(*args, **kwargs)

    register(monkeypatch, dark=Guess(level=0.2), light=Interrupted(level=0.8, status="interrupted"))
    assert cli.main(["experiment", "guess"]) == 130
    assert [row["case"] for row in rows()] == ["dark"]
    assert "interrupted" in capsys.readouterr().err
    register(monkeypatch, dark=Guess(level=0.2), light=Guess(level=0.8))
    assert cli.main(["experiment", "guess"]) == 0
    assert len(rows()) == 4


_KILLED = """
import os, signal, sys
sys.path.insert(0, {root!r})
from tests.experiments.test_run import Guess, register
import pytest
from invlib import cli
from invlib.metrics import identification
from invlib.experiments.networks import Networks
Networks.judge = lambda *_: None
identification.by_ssim = identification.by_pixels
class Killer(Guess):
    def __call__(self, *args, **kwargs):
        os.kill(os.getpid(), signal.SIGKILL)
Killer.__name__ = Killer.__qualname__ = "Guess"
register(pytest.MonkeyPatch(), dark=Guess(level=0.2), light=Killer(level=0.8))
cli.main(["experiment", "guess", "--device", "cpu"])
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL on this system")
def test_a_killed_run_goes_on_where_it_was(here, monkeypatch):
    root = str(Path(__file__).parents[2])
    ended = subprocess.run(
        [sys.executable, "-c", _KILLED.format(root=root)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        check=False,
    )
    assert ended.returncode == -signal.SIGKILL, ended.stderr.decode()
    killed = Path("results/guess.jsonl").read_bytes()
    assert [row["case"] for row in rows()] == ["dark"]
    register(monkeypatch, dark=Guess(level=0.2), light=Guess(level=0.8))
    assert cli.main(["experiment", "guess", "--device", "cpu"]) == 0
    assert Path("results/guess.jsonl").read_bytes().startswith(killed)
    assert [(r["case"], r["image"]) for r in rows()] == [("dark", 0), ("light", 0), ("dark", 1), ("light", 1)]


def test_missing_weights_are_said_before_the_first_attack(here, monkeypatch, capsys):
    monkeypatch.setattr("invlib.models.weights.available", dict)
    argv = ["experiment", "table1", "--full", "--only", "ResNet20-4, trained", "--device", "cpu"]
    assert cli.main(argv) == 2
    err = capsys.readouterr().err
    assert "models/ResNet20-4-cifar10.safetensors" in err
    assert (
        "python -m invlib train --model ResNet20-4 --dataset CIFAR10 "
        "--out models/ResNet20-4-cifar10.safetensors" in err
    )
    assert not Path("results").exists()


def test_weights_of_the_folder_come_first_and_are_part_of_the_settings(here, monkeypatch, capsys):
    made = [Case(columns={"attack": "dark"}, network="TwoLP", weights="cifar10", attack=Guess(level=0.2))]
    size = Size(images=1, steps=1)
    monkeypatch.setitem(
        experiments.EXPERIMENTS,
        "guess",
        Experiment(title="guesses", cases=lambda setup: made, full=size, reduced=size),
    )
    for seed in (0, 1):
        card = {"model": "TwoLP", "accuracy": 0.5}
        model = models.build("TwoLP", seed=seed)
        cards.save(Trained(model=model, card=card), "own/TwoLP-cifar10.safetensors")
        status = cli.main(["experiment", "guess", "--weights", "own"])
        assert status == (0 if seed == 0 else 2)
    assert rows()[0]["accuracy"] == 0.5
    assert "weights_sha256=" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["table7"], "there are: table1"),
        (["guess", "--images", "0"], "--images is 0"),
        (["guess", "--steps", "0"], "--steps is 0"),
        (["guess", "--first", "-1"], "--first is -1"),
        (["guess", "--first", "59"], "patches32 has 60"),
        (["guess", "--only", "bright"], "part of one of: dark"),
        (["guess", "--dataset", "CIFAR11"], "CIFAR11"),
        (["guess", "--device", "cuda:99"], "cuda:99"),
    ],
)
def test_faults_are_one_line_and_no_record(here, monkeypatch, capsys, argv, message):
    register(monkeypatch, dark=Guess(level=0.2))
    assert cli.main(["experiment", *argv]) == 2
    err = capsys.readouterr().err
    assert message in err.splitlines()[-1]
    assert not Path("results").exists()


def test_cifar10_is_taken_where_it_is_and_its_hundreds_are_the_candidates(here, monkeypatch, capsys):
    import numpy as np

    x = np.random.default_rng(0).integers(0, 256, (1100, 32, 32, 3), dtype=np.uint8)
    np.savez(here / "cifar10_train.npz", x=x, y=np.arange(1100) % 10)
    monkeypatch.setenv("INVLIB_DATA", str(here))
    register(monkeypatch, dark=Guess(level=0.2))
    assert cli.main(["experiment", "guess"]) == 0
    assert "images: CIFAR10 (train) from 1000 on" in capsys.readouterr().out
    found = rows()[1]
    assert (found["image"], found["candidates"]) == (1001, 100)
    truth = torch.from_numpy(x[1001]).permute(2, 0, 1) / 255
    mean = torch.from_numpy(np.delete(x[1000:1100], 1, 0)).permute(0, 3, 1, 2).div(255).mean(0)
    assert found["floors"][0]["mean"] == pytest.approx(
        float(-10 * (mean - truth).square().mean().log10()), abs=1e-3
    )
    same = range(1011, 1100, 10)
    each = [
        float(-10 * (torch.from_numpy(x[k]).permute(2, 0, 1) / 255 - truth).square().mean().log10())
        for k in same
    ]
    assert found["floors"][0]["class"] == pytest.approx(sum(each) / len(each), abs=1e-3)


def test_another_copy_of_the_data_set_is_refused(here, monkeypatch, capsys):
    import numpy as np

    register(monkeypatch, dark=Guess(level=0.2))
    monkeypatch.setenv("INVLIB_DATA", str(here))
    argv = ["experiment", "guess", "--images", "1", "--first", "0"]
    for level, status in ((100, 0), (100, 0), (101, 2)):
        np.savez(
            here / "cifar10_train.npz", x=np.full((100, 32, 32, 3), level, np.uint8), y=np.arange(100) % 10
        )
        assert cli.main(argv) == status
    assert "another image 0 of CIFAR10 than the one on this disk" in capsys.readouterr().err
    assert len(rows()) == 1


def test_a_record_is_not_mixed_case_by_case(here, monkeypatch, capsys):
    register(monkeypatch, dark=Guess(level=0.2), light=Guess(level=0.8))
    assert cli.main(["experiment", "guess", "--only", "dark"]) == 0
    assert cli.main(["experiment", "guess", "--only", "light", "--steps", "7"]) == 2
    assert "holds 'dark' with steps=4, now 7" in capsys.readouterr().err
    assert cli.main(["experiment", "guess", "--only", "light"]) == 0
    assert len(rows()) == 4


def test_a_gallery_gives_an_image_its_neighbours():
    images = torch.arange(200.0).view(200, 1, 1, 1)
    gallery = Gallery(name="CIFAR10", split="train", start=1000, images=images, labels=torch.arange(200) % 50)
    assert gallery.take(range(1103, 1105))[0].flatten().tolist() == [103, 104]
    candidates, own = gallery.candidates(1103)
    assert (candidates[own].item(), len(candidates), candidates[0].item()) == (103, 100, 100)
    others, same = gallery.others(1103)
    assert len(others) == 99
    assert same.flatten().tolist() == [153]


def test_the_judge_is_never_the_attacked_network(tmp_path):
    networks = Networks(tmp_path, torch.device("cpu"), CIFAR10, 10)
    attack = Guess(level=0.2)
    trained = Case(columns={"a": "b"}, network="ConvNet8", weights="cifar10", attack=attack)
    untrained = Case(columns={"a": "b"}, network="ConvNet8", attack=attack)
    assert networks.judge(untrained, 3).name == "ConvNet8-cifar10"
    assert networks.judge(untrained, 1).name == "ConvNet8-fashion-mnist"
    other = networks.judge(trained, 3)
    assert other is None or other.name == "ResNet20-cifar10"
    assert networks.judge(untrained, 2) is None


def test_the_record_is_json_that_others_can_read(here, monkeypatch):
    register(monkeypatch, dark=Guess(level=0.2))
    assert cli.main(["experiment", "guess", "--images", "1"]) == 0

    def refuse(word):
        raise AssertionError(word)

    row = json.loads(Path("results/guess.jsonl").read_text(encoding="utf-8"), parse_constant=refuse)
    assert {"seed", "commit", "device", "torch", "invlib", "threads", "seconds", "status"} <= row.keys()


def test_a_figure_is_drawn_where_one_is_asked_for(here, monkeypatch, capsys):
    register(monkeypatch, dark=Guess(level=0.2))
    assert cli.main(["experiment", "guess", "--figure", "guess.png"]) == 0
    assert Path("guess.png").read_bytes().startswith(b"\x89PNG")
    assert Path("guess.png").stat().st_mode & 0o777 == 0o600
    Path("file").touch()
    assert cli.main(["experiment", "guess", "--figure", "file/guess.png"]) == 2
    assert "file/guess.png cannot be written" in capsys.readouterr().err


def test_a_case_may_name_its_classes_and_its_normalisation(here, monkeypatch):
    seen = []

    class Watching(Guess):
        def __call__(self, model, observation, **kwargs):
            seen.append((observation.labels.tolist(), observation.normalization))
            return super().__call__(model, observation, **kwargs)

    case = Case(
        columns={"attack": "dark"},
        network="LeNetZhu",
        attack=Watching(level=0.2),
        num_classes=20,
        labels={0: 17},
        normalization=UNIT,
    )
    size = Size(images=2, steps=1)
    experiment = Experiment(title="guesses", cases=lambda setup: [case], full=size, reduced=size)
    monkeypatch.setitem(experiments.EXPERIMENTS, "guess", experiment)
    assert cli.main(["experiment", "guess"]) == 0
    assert seen == [([17], UNIT), ([1], UNIT)]
    assert rows()[0]["settings"]["classes"] == {"0": 17}


def test_a_case_may_train_its_client_and_withhold_the_statistics(here, monkeypatch):
    seen = {}

    @dataclass(frozen=True, kw_only=True)
    class Look(Guess):
        name: str = ""

        def __call__(self, model, observation, *, generator=None):
            seen[self.name] = observation
            return super().__call__(model, observation, generator=generator)

    modes = ("evaluation", "training", "training, buffers withheld")
    made = [
        Case(columns={"mode": m}, network="ConvNet8", attack=Look(level=0.5, name=m), mode=m) for m in modes
    ]
    size = Size(images=1, steps=4)
    experiment = Experiment(title="modes", cases=lambda setup: made, full=size, reduced=size)
    monkeypatch.setitem(experiments.EXPERIMENTS, "guess", experiment)
    assert cli.main(["experiment", "guess"]) == 0
    kept = [row["settings"].get("mode") for row in rows()]
    assert kept == [None, "training", "training, buffers withheld"]
    still, trained, withheld = (seen[mode] for mode in modes)
    assert not still.training_mode
    assert trained.training_mode
    assert withheld.training_mode
    moved = [n for n in still.buffers if not torch.equal(still.buffers[n], trained.buffers[n])]
    assert len(moved) == len(still.buffers) > 0
    assert not withheld.buffers


def test_the_disputed_clients_have_names_of_their_own():
    setups = [experiments.cases.Setup(steps=3, restarts=1, reduced=r, slug="cifar10") for r in (True, False)]
    short, full = (experiments.EXPERIMENTS["dispute"].cases(setup) for setup in setups)
    assert {case.name for case in short} < {case.name for case in full}
    assert len({case.name for case in full}) == len(full) == 3 * 2 * 3 * 7 + 2 * 7


def test_a_record_can_be_kept_without_pictures(here, monkeypatch):
    register(monkeypatch, dark=Guess(level=0.2))
    assert cli.main(["experiment", "guess", "--images", "2", "--no-pictures"]) == 0
    assert [(row["truth"], row["reconstruction"]) for row in rows()] == [(None, None)] * 2
    assert "PSNR" in str(experiments.table("results/guess.jsonl"))
    with pytest.raises(errors.DataError, match="no pictures; expected at least one attack made without"):
        experiments.figure("results/guess.jsonl")


def test_the_table_does_not_depend_on_the_order_of_the_rows(here, monkeypatch):
    register(monkeypatch, dark=Guess(level=0.2), light=Guess(level=0.8))
    assert cli.main(["experiment", "guess", "--device", "cpu"]) == 0
    path = Path("results/guess.jsonl")
    table = str(experiments.table(path))
    path.write_bytes(b"".join(reversed(path.read_bytes().splitlines(keepends=True))))
    assert str(experiments.table(path)) == table
