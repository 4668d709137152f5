"""The commands of 2020: the same flags, the same attack, a line for what differs, and the page about it."""

import argparse
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from invlib import models
from invlib.cli import reconstruct, series, session
from invlib.cli.options import Request
from invlib.federated import FedAvg

PAGE = Path(__file__).parents[2] / "book/coming-from-2020.md"
COMMANDS = {"reconstruct_image": reconstruct, "rec_mult": series}
# The flags of inversefed/options.py with their defaults, and those that rec_mult.py adds.
SHARED = {
    **{"model": "ConvNet", "dataset": "CIFAR10", "dtype": "float", "trained_model": False, "epochs": 120},
    **{"accumulation": 0, "num_images": 1, "target_id": None, "label_flip": False, "optim": "ours"},
    **{"restarts": 1, "cost_fn": "sim", "indices": "def", "weights": "equal", "optimizer": "adam"},
    **{"signed": True, "boxed": True, "scoring_choice": "loss", "init": "randn", "tv": 1e-4},
    **{"save_image": False, "image_path": "images/", "model_path": "models/", "table_path": "tables/"},
    **{"data_path": "~/data", "name": "iv", "deterministic": False, "dryrun": False},
}
ADDED = {
    **{"unsigned": False, "soft_labels": False, "lr": None, "num_exp": 10, "max_iterations": 4800},
    **{"batch_size": 0, "local_lr": 1e-4},
}
OURS = {
    **{"signed": True, "boxed": True, "cost_fn": "sim", "indices": "def", "weights": "equal", "lr": 0.1},
    **{"optim": "adam", "restarts": 1, "total_variation": 1e-4, "init": "randn", "filter": "none"},
    **{"lr_decay": True, "scoring_choice": "loss"},
}
ZHU = OURS | {"signed": False, "boxed": False, "cost_fn": "l2", "optim": "LBFGS", "lr_decay": False}


def parser(program: str) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser()
    COMMANDS[program].add_arguments(made)
    return made


def asked(program: str, *argv: str) -> Request:
    return Request.parse(parser(program).parse_args([*argv, "--device", "cpu"]))


def tables() -> list[dict[str, list[str]]]:
    """The page's tables: flags as they are written, comma between them → the cells after."""
    found: list[dict[str, list[str]]] = [{}]
    for line in PAGE.read_text(encoding="utf-8").partition("## The command line\n")[2].splitlines():
        if line.startswith("| `--"):
            flags, *cells = (cell.strip() for cell in line.strip("|").split(" | "))
            found[-1][flags.strip()] = cells
        elif found[-1] and not line:
            found.append({})
    return [table for table in found if table]


def test_the_page_has_every_flag_of_2020_and_every_flag_of_today() -> None:
    shared, added, new = ([set(re.findall(r"--[\w-]+", flags)) for flags in table] for table in tables())
    assert sorted(flag for row in shared for flag in row) == sorted(f"--{name}" for name in SHARED)
    assert sorted(flag for row in added for flag in row) == sorted(f"--{name}" for name in ADDED)
    own = {
        flag for program in COMMANDS for action in parser(program)._actions for flag in action.option_strings
    }
    listed = [flag for row in (*shared, *added, *new) for flag in row]
    assert sorted(listed) == sorted(own - {"-h", "--help"})


def default(program: str, flag: str) -> str | None:
    """The default as the page writes it; None where the command has no such flag."""
    actions = {name: action for action in parser(program)._actions for name in action.option_strings}
    if flag not in actions:
        return None
    action = actions[flag]
    if action.default is False or action.const is False:
        return "not given"
    value = parser(program).get_default(action.dest)
    config = asked(program, "--optim", "ours").attack.config
    key = {"iterations": "max_iterations", "tv": "total_variation", "optimizer": "optim"}.get(
        action.dest, action.dest
    )
    if value is None and key in config:
        value = config[key]
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, int):
        return f"{value:,}"
    return "none" if value is None else f"`{value}`" if isinstance(value, str) else str(value)


@pytest.mark.parametrize("flag", [flags for table in tables() for flags in table])
def test_the_defaults_on_the_page_are_those_of_the_commands(flag: str) -> None:
    (written,) = (table[flag][-1] for table in tables() if flag in table)
    first = re.findall(r"--[\w-]+", flag)[0]
    one, many = (default(program, first) for program in COMMANDS)
    expected = many if one is None else one if many in (None, one) else f"{one} (`rec_mult` {many})"
    assert written == expected or written.startswith(f"{expected}; "), expected


@pytest.mark.parametrize("program", COMMANDS)
def test_every_flag_of_2020_is_taken(program: str) -> None:
    taken = parser(program)
    for name, value in (SHARED | (ADDED if program == "rec_mult" else {})).items():
        argument = [] if isinstance(value, bool) else ["7" if value is None else str(value)]
        taken.parse_args([f"--{name}", *argument])


@pytest.mark.parametrize(
    ("program", "argv", "config"),
    [
        ("reconstruct_image", "", OURS | {"max_iterations": 24_000}),
        ("reconstruct_image", "--accumulation 5", OURS | {"max_iterations": 24_000, "lr": 1.0}),
        ("reconstruct_image", "--optim zhu", ZHU | {"max_iterations": 300}),
        ("reconstruct_image", "--signed --tv 0.1", OURS | {"signed": False, "total_variation": 0.1}),
        ("reconstruct_image", "--boxed --restarts 8", OURS | {"boxed": False, "restarts": 8}),
        ("reconstruct_image", "--optim zhu --signed --boxed", ZHU),
        ("rec_mult", "", OURS | {"max_iterations": 4_800}),
        ("rec_mult", "--accumulation 5", OURS | {"max_iterations": 4_800}),
        ("rec_mult", "--optim zhu", ZHU | {"max_iterations": 500}),
        ("rec_mult", "--signed --boxed", OURS),
        ("rec_mult", "--unsigned --lr 0.5", OURS | {"signed": False, "lr": 0.5}),
        ("rec_mult", "--optim zhu --accumulation 5 --boxed", ZHU),
    ],
)
def test_the_same_command_is_the_same_attack(program: str, argv: str, config: dict[str, Any]) -> None:
    here = asked(program, *argv.split()).attack.config
    assert {key: here[key] for key in config} == config


KEPT = "the best step of each starting point is kept; 2020 kept the last"
SEED = "--model ResNet20-4 --dataset CIFAR10 --trained_model --cost_fn sim --indices def --restarts 32"


@pytest.mark.parametrize(
    ("program", "argv", "lines"),
    [
        ("reconstruct_image", "", [KEPT]),
        ("reconstruct_image", "--optim best", []),
        (
            "reconstruct_image",
            f"{SEED} --save_image --target_id -1",
            [
                "2020 ran ours: cosine, signed Adam, 24000 iterations from each starting point",
                "2020 ignored --trained_model for CIFAR10 and attacked random weights; now it counts",
                "--target_id -1 takes images that come with invlib; 2020 took a photograph of a car",
            ],
        ),
        (
            "reconstruct_image",
            "--signed --boxed",
            [
                "--signed turns the sign off, as in 2020; --use_sign and --no_sign say it plainly",
                "--boxed turns the box off, as in 2020; --use_box and --no_box say it plainly",
                KEPT,
            ],
        ),
        (
            "rec_mult",
            "--signed --target_id -1",
            [
                "--signed changes nothing, as in 2020; --use_sign and --no_sign say it plainly",
                KEPT,
                "--target_id -1 takes images that come with invlib; 2020 took images from the end of the "
                "data set on",
            ],
        ),
        (
            "reconstruct_image",
            "--indices top10 --init zeros --weights equal",
            [
                "2020 ignored --indices here and took def; now it counts",
                "2020 ignored --init here and took randn; now it counts",
                KEPT,
            ],
        ),
        ("reconstruct_image", "--indices top10 --accumulation 2", [KEPT]),
        (
            "reconstruct_image",
            "--optim zhu --accumulation 2 --cost_fn l1",
            ["2020 ran ours with --accumulation, whatever --optim said; here it counts", KEPT],
        ),
        (
            "rec_mult",
            "--optim zhu --max_iterations 9 --soft_labels",
            ["2020 ignored --iterations here and took 500; now it counts", KEPT],
        ),
        (
            "rec_mult",
            "--optimizer sgd --indices top10 --soft_labels",
            [
                "2020 ignored --optimizer here and took adam; now it counts",
                "2020 ignored --soft_labels but for --optim zhu without --accumulation; now it counts",
                KEPT,
            ],
        ),
        (
            "reconstruct_image",
            "--dataset ImageNet",
            [KEPT, "2020 took resnet18 for ImageNet, whatever --model said; now it is ConvNet"],
        ),
        ("reconstruct_image", "--dataset ImageNet --model ResNet152", [KEPT]),
    ],
)
def test_what_differs_is_said(program: str, argv: str, lines: list[str]) -> None:
    assert list(asked(program, *argv.split()).notes) == lines


def test_both_commands_print_their_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    argv = ["--model", "LeNetZhu", "--iterations", "1", "--device", "cpu", "--target_id", "-1", "--signed"]
    assert reconstruct.main(argv) == 0
    assert capsys.readouterr().out.splitlines()[:2] == list(asked("reconstruct_image", *argv).notes)[:2]
    assert series.main([*argv, "--num_exp", "2"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("--signed changes nothing")
    assert out.count(KEPT) == 1
    (table,) = tmp_path.glob("results/*/table_mul_exp_iv.csv")
    heading, *rows = (line.split("\t") for line in table.read_text().splitlines())
    assert [row[heading.index("target_id")] for row in rows] == ["patches32-0", "patches32-1"]


@pytest.mark.parametrize(("argv", "name"), [("", "ConvNet_120.pth"), ("--epochs 7", "ConvNet_7.pth")])
def test_weights_of_2020_are_found_by_their_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, argv: str, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    seen = []
    monkeypatch.setattr(models, "build", lambda *a, **k: seen.append((a, k)) or torch.nn.Linear(1, 1))
    Path("models").mkdir()
    Path("models", name).touch()
    request = asked("rec_mult", "--trained_model", "--target_id", "-1", *argv.split())
    net = session.network(request.network, "CIFAR10", torch.zeros(1, 3, 32, 32), 0)
    shape = {"num_classes": 10, "in_channels": 3, "image_size": 32}
    assert seen == [(("ConvNet64",), {**shape, "weights": Path("models", name)})]
    assert net.about == f"ConvNet64, trained in 2020: models/{name}"


def test_the_client_may_have_another_optimizer() -> None:
    line = [
        "--optim",
        "best",
        "--accumulation",
        "3",
        "--local_lr",
        "0.01",
        "--batch_size",
        "2",
        "--target_id",
        "-1",
    ]
    plain = FedAvg(lr=0.01, local_steps=3, batch_size=2, drop_last=True)
    assert asked("reconstruct_image", *line).client.step() == plain
    other = asked("rec_mult", *line, "--local_optimizer", "adamw")
    assert other.client.step() == replace(plain, optimizer="adamw")
    other = asked("reconstruct_image", *line, "--local_momentum", "0.9")
    assert other.client.step() == replace(plain, momentum=0.9)
