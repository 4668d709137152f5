"""``torchrun … -m invlib experiment``: the record of one process, made by two, and what ends them."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from invlib import best, cli, experiments
from invlib.errors import ConfigError, DataError, DeviceError
from invlib.experiments import _cases, _plan, _record, _run, _team
from tests.guessing import SEARCH
from tests.test_experiments_run import Guess, here, register, rows, timeless  # noqa: F401

ROOT = str(Path(__file__).parents[1])
GUESSING = [str(Path(__file__).with_name("guessing.py"))]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")


@pytest.fixture
def guessing(here, monkeypatch):  # noqa: F811
    """The command of guessing.py, without faults and in this process."""
    monkeypatch.setattr("invlib.metrics.ssim", lambda images, truth: torch.zeros(len(images)))
    register(monkeypatch, dark=Guess(level=0.2), light=Guess(level=0.8))
    return ["experiment", "guess", "--device", "cpu"]


def run(*argv, **more):
    process = subprocess.Popen(
        [sys.executable, *argv],
        env={**os.environ, "PYTHONPATH": ROOT, "OMP_NUM_THREADS": "1", **more},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=120)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGTERM)  # which torchrun passes on
        raise
    return subprocess.CompletedProcess(argv, process.returncode, out, err)


def workers(fault, count=2):
    """Run workers without torchrun, as on several machines: nobody ends one when another has failed.

    Returns:
        For each worker its exit status, what it printed, and its errors.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "LOCAL_RANK": "0"}
    every = run(*GUESSING, fault, WORLD_SIZE=str(count), **place)
    return [
        (int(status), Path(f"out{rank}").read_text(), Path(f"err{rank}").read_text())
        for rank, status in enumerate(every.stdout.split())
    ]


def apart(found):
    """Return the rows in one order, without times and without originals, and those by themselves."""
    found = sorted(timeless(found), key=lambda row: (row["image"], row["case"]))
    truths = [row.pop("truth") for row in found]
    return found, sorted(filter(None, truths))


def test_two_processes_make_the_record_of_one(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    argv = ["experiment", "table1", "--steps", "2", "--images", "3", "--device", "cpu"]
    argv += ["--dataset", "patches32", "--only", "LeNetZhu, untrained, cosine"]
    assert cli.main([*argv, "--out", "one.jsonl"]) == 0
    capsys.readouterr()
    ended = run(*TORCHRUN, "-m", "invlib", *argv, "--out", "two.jsonl")
    assert ended.returncode == 0, ended.stderr
    assert "device cpu, 2 workers\n" in ended.stdout
    assert ended.stdout.count("REDUCED FORM of table1") == 1
    one, two = (_record.read(f"{name}.jsonl") for name in ("one", "two"))
    assert len(two) == len({row["key"] for row in two}) == 3
    assert apart(one) == apart(two)
    assert str(experiments.table("one.jsonl")) == str(experiments.table("two.jsonl"))


def test_a_killed_worker_ends_the_run_and_the_record_goes_on(guessing):
    ended = run(*TORCHRUN, *GUESSING, "kill1")
    assert ended.returncode != 0
    assert "error: worker 1 (process " in ended.stderr
    killed = Path("results/guess.jsonl").read_bytes()
    assert len(rows()) == 1
    shutil.copytree("results", "again")
    (status, out, _), other = workers("none")
    assert status == 0
    assert other == (0, "", "")
    assert "3 attacks made, 1 were there" in out
    for folder in ("again", "one"):
        assert cli.main([*guessing, "--out", f"{folder}/guess.jsonl"]) == 0
        assert apart(rows()) == apart(_record.read(f"{folder}/guess.jsonl"))
    for folder in ("again", "results"):
        assert Path(f"{folder}/guess.jsonl").read_bytes().startswith(killed)


@pytest.mark.parametrize(
    ("fault", "status", "message"),
    [
        (
            "kill1",
            -signal.SIGKILL,
            "ended before its work was done; expected 2 workers to the end; the",
        ),
        ("raise", 2, "failed: DataError: the disk is on fire; the record holds every attack"),
    ],
)
def test_worker_0_says_which_worker_failed_and_ends(guessing, fault, status, message):
    (first, _, err), other = workers(fault)
    assert first == 2
    assert other == (status, "", "")
    line = err.splitlines()[-1]
    assert line.startswith("error: worker 1 (process ")
    assert message in line
    assert len(rows()) == 1


def test_without_worker_0_the_others_end(guessing):
    (first, *_), other = workers("kill0")
    assert first == -signal.SIGKILL
    assert other == (1, "", "worker 1: worker 0, which keeps the record, has ended\n")
    assert len(rows()) == 1


def test_ctrl_c_ends_all_and_keeps_what_had_ended(guessing):
    (first, _, err), other = workers("interrupt")
    assert first == 130
    assert other == (1, "", "")
    assert err.splitlines()[-1] == "interrupted"
    assert len(rows()) == 1


@pytest.fixture
def searching(guessing, monkeypatch):
    """The same command with an attack that has restarts to share."""
    register(monkeypatch, search=SEARCH)
    return guessing


def assert_close(found, expected):
    """Compare records but for rounding, and for the pictures, which rounding changes too."""
    for left, right in zip(*(apart(some)[0] for some in (found, expected)), strict=True):
        for row in (left, right):
            del row["reconstruction"]
        assert left.keys() == right.keys()
        for name in ("trial_scores", "psnr", "score"):
            assert left.pop(name) == pytest.approx(right.pop(name), rel=1e-3, nan_ok=True)
        assert left == right


def test_workers_share_the_restarts_where_there_are_fewer_attacks_than_workers(searching):
    (status, out, _), *others = workers("share", 3)
    assert status == 0
    assert others == [(0, "", "")] * 2
    assert "2 attacks made, 0 were there" in out
    assert [Path(f"rows{rank}").read_text() for rank in range(3)] == ["[0, 3]", "[1, 4]", "[2]"]
    assert cli.main([*searching, "--out", "one/guess.jsonl"]) == 0
    assert_close(rows(), _record.read("one/guess.jsonl"))


def test_a_worker_killed_in_a_shared_attack_is_named_and_the_record_goes_on(searching):
    first, killed, other = workers("share and kill", 3)
    assert (first[0], killed[0], other[0]) == (2, -signal.SIGKILL, 1)
    line = first[2].splitlines()[-1]
    assert line.startswith("error: worker 1 (process ")
    assert "ended before its work was done; expected 3 workers to the end; the record holds" in line
    assert len(rows()) == 1
    assert cli.main(searching) == 0
    assert cli.main([*searching, "--out", "one/guess.jsonl"]) == 0
    assert_close(rows(), _record.read("one/guess.jsonl"))


def test_the_worker_that_failed_is_named_and_not_those_that_torchrun_ends_then(searching):
    ended = run(*TORCHRUN[:-1], "3", *GUESSING, "share and kill")
    assert ended.returncode != 0
    (line,) = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: worker 1 (process ")
    assert len(rows()) == 1


def test_what_has_restarts_is_shared_where_workers_are_many():
    matching = _cases.describe(SEARCH)
    settings = {
        "search": {"attack": matching},
        "inner": {"attack": _cases.describe(best(restarts=2))},
        "one": {"attack": matching | {"restarts": 1}},
        "patient": {"attack": matching | {"patience": 100}},
        "other": {"attack": _cases.describe(Guess(level=0.5))},
    }
    tasks = [(SimpleNamespace(name=name), 0) for name in settings]
    for workers, names in ((5, []), (6, ["search", "inner"])):
        shared, alone = _run._shared(tasks, settings, workers)
        assert [case.name for case, _ in shared] == names
        assert shared + alone == sorted(tasks, key=lambda task: task[0].name not in names)


def test_a_sum_may_be_larger_than_what_the_store_takes_at_once(monkeypatch):
    monkeypatch.setattr(_team, "_PIECE", 100)
    store = dist.HashStore()
    for size in (1, 12, 13, 1000):
        tensor = torch.rand(size, dtype=torch.float64)
        before = store.num_keys()
        _team._put(store, "sum", tensor)
        assert torch.equal(_team._taken(store, "sum"), tensor)
        _team._removed(store, "sum")
        assert store.num_keys() == before


def test_a_machine_with_other_images_or_settings_is_refused(here, monkeypatch):  # noqa: F811
    register(monkeypatch, dark=Guess(level=0.2))
    plan = planned()
    job = json.loads(_record.encode(_run._job(plan, plan.tasks())))
    assert job["tasks"] == [["dark", 0], ["dark", 1]]
    _run._agree(_run._job(plan, []), job)
    plan.gallery.images[5] = 0.5
    with pytest.raises(DataError, match="the data set has other images here"):
        _run._agree(_run._job(plan, []), job)
    register(monkeypatch, dark=Guess(level=0.3))
    with pytest.raises(DataError, match=r"case 'dark' with attack=.*0\.2.*now.*0\.3"):
        _run._agree(_run._job(planned(), []), job)


def planned():
    return _plan.plan("guess", experiments.get("guess"), device=torch.device("cpu"), reduced=True)


def test_each_worker_has_a_gpu_of_its_own(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setenv("RANK", "5")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert _team.own(torch.device("cuda")) == torch.device("cuda", 1)
    assert chosen == [1]
    assert _team.own(torch.device("cuda:0")) == torch.device("cuda", 0)
    assert _team.own(torch.device("cpu")) == torch.device("cpu")
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(DeviceError, match="worker 5 has LOCAL_RANK 2, but torch finds 2 GPUs"):
        _team.own(torch.device("cuda"))


def test_half_an_environment_is_named(monkeypatch):
    for name in _team._SET_BY_TORCHRUN:
        monkeypatch.delenv(name, raising=False)
    with _team.joined() as alone:
        assert alone is None
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="WORLD_SIZE is 2, but RANK, LOCAL_RANK"), _team.joined():
        pass


def test_a_restarted_run_does_not_begin_anew(here, monkeypatch):  # noqa: F811
    register(monkeypatch, dark=Guess(level=0.2))
    argv = ["experiment", "guess", "--device", "cpu", "--fresh"]
    assert cli.main(argv) == 0
    before = Path("results/guess.jsonl").read_bytes()
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert cli.main(argv) == 0
    assert Path("results/guess.jsonl").read_bytes() == before
    assert not Path("results/guess.jsonl.old").exists()


def test_the_table_does_not_depend_on_the_order_of_the_rows(here, monkeypatch):  # noqa: F811
    register(monkeypatch, dark=Guess(level=0.2), light=Guess(level=0.8))
    assert cli.main(["experiment", "guess", "--device", "cpu"]) == 0
    path = Path("results/guess.jsonl")
    table = str(experiments.table(path))
    path.write_bytes(b"".join(reversed(path.read_bytes().splitlines(keepends=True))))
    assert str(experiments.table(path)) == table
