"""Command lines that cannot work: each is named in a line with status 2, and nothing is left behind."""

from __future__ import annotations

import json
import os
import pickle
import random
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch

from invlib import cli
from invlib.data import files
from invlib.models import cards, zoo
from invlib.models.cards import Trained

BIG = "1" + "0" * 30
ONE = "reconstruct-image --model LeNetZhu --iterations 1 --device cpu --target_id -1 "
MANY = "rec-mult --model LeNetZhu --iterations 1 --device cpu --target_id -1 "
TRAIN = "train --model LeNetZhu --dataset FashionMNIST --epochs 1 --out new/a.safetensors "
TABLE = "experiment table1 --reduced --images 1 --steps 1 --device cpu --dataset patches32 "
LINES = [
    *("", "unknown", "--nothing", "train", "evaluate", "experiment"),
    # numbers
    *(f"{ONE}--num_images {n}" for n in ("0", "-1", "1.5", "nan", "x", "11", BIG)),
    *(f"{ONE}--accumulation {n}" for n in ("-1", "0.5", BIG)),
    *(f"{ONE}--accumulation 1 --local_lr {n}" for n in ("0", "-1", "nan", "inf", "x")),
    *(f"{ONE}--accumulation 1 --batch_size {n}" for n in ("-1", "5", BIG)),
    *(f"{ONE}--optim best --accumulation 1 --local_momentum {n}" for n in ("-1", "nan", "11", "x")),
    f"{ONE}--accumulation 1 --local_momentum 0.9",
    f"{ONE}--optim best --local_optimizer adam",
    f"{ONE}--optim best --accumulation 1 --local_optimizer adam --local_momentum 0.9",
    f"{ONE}--optim best --accumulation 1 --local_optimizer lion",
    *(f"{ONE}--restarts {n}" for n in ("0", "-1", BIG, "10000000000")),
    *(f"{ONE}--iterations {n}" for n in ("0", "-1", BIG)),
    *(f"{ONE}--lr {n}" for n in ("0", "-1", "nan", "inf")),
    *(f"{ONE}--tv {n}" for n in ("-1", "nan", "inf")),
    *(f"{ONE}--chunk {n}" for n in ("0", "-3")),
    *(f"{ONE}--seed {n}" for n in ("-1", "0.5", BIG)),
    *(f"{ONE}--target_id {n}" for n in (BIG, "one")),
    *(f"{MANY}--num_exp {n}" for n in ("0", "-1", "100", BIG)),
    *(f"{TRAIN}--epochs {n}" for n in ("0", "-1", BIG)),
    *(f"{TRAIN}--batch-size {n}" for n in ("0", "-1", BIG)),
    *(f"{TRAIN}--lr {n}" for n in ("0", "-1", "nan", "inf")),
    *(f"{TRAIN}--seed {n}" for n in ("-1", BIG)),
    *(f"{TABLE}--images {n}" for n in ("0", "-1", "61", BIG)),
    *(f"{TABLE}--steps {n}" for n in ("0", "-1", BIG)),
    *(f"{TABLE}--restarts {n}" for n in ("0", "10000000000")),
    *(f"{TABLE}--first {n}" for n in ("-1", "60", BIG)),
    *(f"{TABLE}--seed {n}" for n in ("-1", BIG)),
    *(f"{TABLE}--workers {n}" for n in ("0", "-1", BIG)),
    # names
    *(
        f"{ONE}--{flag} nothing"
        for flag in ("model", "dataset", "optim", "cost_fn", "indices", "weights", "init")
    ),
    *(f"{ONE}--{flag} nothing" for flag in ("optimizer", "filter", "scoring_choice", "dtype", "device")),
    *(f"{ONE}--device {name}" for name in ("meta", "cuda:99", "cuda:-1", "''")),
    *(f"{ONE}--name {name}" for name in ("../x", "a/b", "/x")),
    *(f"{ONE}--model {name}" for name in ("../x", "''", "resnet18")),
    f"{ONE}--trained_model --model ../../x",
    f"{ONE}--trained_model --dataset CIFAR100",
    f"{ONE}--trained_model --dataset FashionMNIST --epochs 3",
    f"{ONE}--optim best --cost_fn l2",
    *(
        f"{TRAIN}--{flag} nothing"
        for flag in ("model", "dataset", "strategy", "activation", "precision", "device")
    ),
    f"{TRAIN}--device meta",
    f"{TRAIN}--dataset MNIST",
    f"{TRAIN}--dataset ImageNet",
    f"{TRAIN}--model DenseNet40 --no-batch-norm",
    f"{TABLE}--only nothing",
    f"{TABLE}--dataset nothing",
    f"{TABLE}--dataset CIFAR10",
    f"{TABLE}--split val",
    f"{TABLE}--device meta",
    f"{TABLE}--reduced --full",
    f"{TABLE}--fresh --resume",
    f"{TABLE}--workers 2 --dask tcp://127.0.0.1:1",
    "experiment nothing",
    *(f"evaluate {name}" for name in ("nothing", "../../x", "LeNetZhu-../x", "''")),
    # files
    *(
        f"evaluate {name}.safetensors"
        for name in ("nothing", "folder", "pipe", "text", "cut", "other", "a/../no")
    ),
    *(
        f"evaluate {name}.safetensors"
        for name in ("no-card", "list-card", "odd-card", "huge-card", "mean-card")
    ),
    "evaluate good.safetensors --dataset MNIST",
    "evaluate good.safetensors --device meta",
    *(f"{ONE}--{flag}_path file --save_image" for flag in ("image", "table")),
    f"{ONE}--table_path tables",
    f"{ONE}--table_path bytes",
    f"{MANY}--num_exp 1 --result_path file",
    f"{ONE}--data_path file --target_id 0",
    f"{ONE}--data_path nothing --target_id 0",
    f"{ONE}--data_path empty --target_id 0",
    *(
        f"{ONE}--dataset FashionMNIST --data_path bad/{name} --target_id 0"
        for name in ("layout", "claims", "text")
    ),
    f"{ONE}--dataset FashionMNIST --target_id 5000",
    f"{ONE}--trained_model --model_path cut-folder",
    *(f"{TRAIN}--out {name}" for name in ("a.pth", "a", "folder.safetensors", "file/a.safetensors", "''")),
    *(
        f"{TRAIN}--resume {name}"
        for name in ("folder.safetensors", "file/c", "text.safetensors", "pickled", "pipe.c")
    ),
    *(
        f"{TABLE}--out {name}"
        for name in ("folder.safetensors", "file/r.jsonl", "/dev/full", "text.safetensors")
    ),
    *(f"{TABLE}--out {name}" for name in ("odd.jsonl", "pipe.c")),
    *(f"{TABLE}--figure {name}" for name in ("a.xyz", "a", "folder.png", "file/a.png", "''")),
]


@pytest.fixture(scope="module")
def mess(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small FashionMNIST, and files that are not what they are called."""
    base = tmp_path_factory.mktemp("mess")
    pixels = np.random.default_rng(0).integers(0, 256, (20, 28, 28), dtype=np.uint8)
    labels = np.arange(20) % 10
    for split in ("train", "test"):
        np.savez(base / f"fashion-mnist_{split}.npz", x=pixels, y=labels)
    for name in ("folder.safetensors", "folder.png", "empty", "tables", "bytes", "cut-folder"):
        (base / name).mkdir()
    (base / "tables" / "table_exp_iv.csv").write_text("a\tb\n1\t2\n")
    (base / "bytes" / "table_exp_iv.csv").write_bytes(b"\xff\xfe\x00")
    for name in ("file", "text.safetensors"):
        (base / name).write_text("hello")
    for name in ("pipe.safetensors", "pipe.c"):
        os.mkfifo(base / name)
    (base / "pickled").write_bytes(pickle.dumps({"x": print}))
    (base / "odd.jsonl").write_text('{"experiment": "table1", "case": "a", "image": 0, "key": "k"}\n')
    for name, x in (("layout", pixels[:, None]), ("claims", None), ("text", None)):
        (base / "bad" / name).mkdir(parents=True)
        path = base / "bad" / name / "fashion-mnist_test.npz"
        np.savez(path, x=pixels if x is None else x, y=labels)
        if x is None:
            path.write_bytes(path.read_bytes()[:-40] if name == "claims" else b"hello")
    card = {
        "model": "LeNetZhu",
        "dataset": "FashionMNIST",
        "num_classes": 10,
        "in_channels": 1,
        "accuracy": 0.5,
    }
    model = zoo.build("LeNetZhu", in_channels=1, seed=0)
    for name, change in (
        ("good", {}),
        ("other", {"model": "ConvNet8"}),
        ("odd-card", {"num_classes": "ten"}),
        ("huge-card", {"num_classes": 10**12}),
        ("mean-card", {"normalization": {"mean": ["a"], "std": [1]}}),
        ("list-card", {}),
        ("no-card", {}),
        ("cut", {}),
    ):
        cards.save(Trained(model=model, card=card | change), base / f"{name}.safetensors")
    (base / "no-card.json").unlink()
    (base / "list-card.json").write_text(json.dumps([1]))
    cut = (base / "cut.safetensors").read_bytes()[:-9]
    (base / "cut.safetensors").write_bytes(cut)
    (base / "cut-folder" / "LeNetZhu-cifar10.safetensors").write_bytes(cut)
    return base


def contents(base: Path) -> list[str]:
    return sorted(str(path.relative_to(base)) for path in base.rglob("*"))


def state() -> tuple[str, str, str]:
    numpys = np.random.get_state()  # noqa: NPY002 - the global one is what this is about
    return str(torch.get_rng_state().tolist()), str(numpys), str(random.getstate())


@pytest.mark.parametrize("line", LINES)
def test_a_bad_command_line_is_named_and_leaves_nothing(
    line: str, mess: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def offline(*_: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr(files, "download", offline)
    monkeypatch.chdir(mess)
    monkeypatch.setenv("INVLIB_DATA", str(mess))
    before, was = contents(mess), state()
    try:
        status = cli.main(shlex.split(line))
    except SystemExit as ended:  # argparse's own
        status = ended.code
    said = capsys.readouterr().err.splitlines()
    assert status == 2
    assert sum("error:" in text for text in said) == 1, said
    assert not any("Traceback" in text for text in said)
    assert (contents(mess), state()) == (before, was)
