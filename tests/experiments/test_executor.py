"""The attacks of an experiment in other processes: the record of one process, whichever of them dies."""

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from invlib import cli, experiments
from invlib.errors import DataError
from invlib.experiments import executors, runner
from invlib.experiments import plan as _plan
from invlib.experiments import record as _record
from tests.experiments.test_run import Guess, here, register, rows, timeless  # noqa: F401

ROOT = str(Path(__file__).parents[2])
ARGV = ["experiment", "table1", "--steps", "2", "--images", "4", "--device", "cpu"]
ARGV += ["--dataset", "patches32", "--only", "LeNetZhu, untrained, cosine", "--out"]
LONG = 300  # seconds, after which a test that waits for an event fails
posix = pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")


def wait(until):
    end = time.monotonic() + LONG
    while not until():
        assert time.monotonic() < end, "what was waited for did not happen"
        time.sleep(0.05)


def in_order(found):
    return sorted(timeless(found), key=lambda row: row["key"])


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """The record of one process."""
    path = tmp_path_factory.mktemp("one") / "one.jsonl"
    assert cli.main([*ARGV, str(path)]) == 0
    return in_order(_record.read(path))


def lines(record):
    return Path(record).read_bytes().count(b"\n") if Path(record).exists() else 0


def claimed(path):
    """Say whether this is the first to ask."""
    try:
        Path(path).touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def doom(record):
    """Let the first worker that attacks die by SIGKILL in its attack, once another's row is on the disk."""
    attack = runner._attack

    def dying(*args):
        if claimed(f"{record}.doomed"):
            wait(lambda: lines(record) == 1)
            os.kill(os.getpid(), signal.SIGKILL)
        wait(Path(f"{record}.doomed").exists)
        return attack(*args)

    runner._attack = dying


def hang(record):
    """Let the first attack of all pass, and those after it go on until a file appears."""
    attack = runner._attack

    def hanging(*args):
        if not claimed(f"{record}.first"):
            Path(f"{record}.hangs{os.getpid()}").touch()
            wait(Path(f"{record}.go").exists)
        return attack(*args)

    runner._attack = hanging


def begin(*args):
    """Begin a worker of the pool that behaves as the environment says."""
    {"doom": doom, "hang": hang}[os.environ["BEHAVIOUR"]](os.environ["RECORD"])
    executors._begin(*args)


def hanging(record):
    return list(Path(record).parent.glob(f"{Path(record).name}.hangs*"))


def test_two_workers_make_the_record_of_one_process(one, tmp_path, capsys):
    assert cli.main([*ARGV, str(tmp_path / "two.jsonl"), "--workers", "2"]) == 0
    assert "device cpu, 2 workers\n" in capsys.readouterr().out
    assert in_order(_record.read(tmp_path / "two.jsonl")) == one


@posix
def test_a_worker_of_the_pool_that_dies_ends_the_run_and_the_record_goes_on(
    one, tmp_path, monkeypatch, capsys
):
    path = str(tmp_path / "two.jsonl")
    monkeypatch.setattr(executors, "_begin", begin)
    monkeypatch.setenv("BEHAVIOUR", "doom")
    monkeypatch.setenv("RECORD", path)
    assert cli.main([*ARGV, path, "--workers", "2"]) == 2
    assert "error: a worker was killed or ran out of memory" in capsys.readouterr().err
    before = Path(path).read_bytes()
    assert 1 <= lines(path) < 4
    assert cli.main([*ARGV, path]) == 0
    assert Path(path).read_bytes().startswith(before)
    assert in_order(_record.read(path)) == one


INTERRUPTED = """
import sys
from invlib import cli
from invlib.experiments import executors
from tests.experiments import test_executor as test_experiments_executor

if __name__ == "__main__":
    executors._begin = test_experiments_executor.begin
    sys.exit(cli.main(sys.argv[1:]))
"""


def interrupted(path, *more, ready):
    """Run the command in a process group, send Ctrl-C to it when it is ready, and return what it said."""
    process = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED, *ARGV, path, *more],
        env={**os.environ, "PYTHONPATH": ROOT, "OMP_NUM_THREADS": "1", "BEHAVIOUR": "hang", "RECORD": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        wait(lambda: process.poll() is not None or ready())
        os.killpg(process.pid, signal.SIGINT)
        said, _ = process.communicate(timeout=LONG)  # the end of file comes when all workers have ended
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    assert process.returncode == 130, said
    assert said.splitlines()[-1] == "interrupted", said


@posix
def test_ctrl_c_ends_the_pool_in_the_middle_of_attacks_and_the_record_goes_on(one, tmp_path):
    path = str(tmp_path / "two.jsonl")
    interrupted(path, "--workers", "2", ready=lambda: lines(path) == 1 and len(hanging(path)) == 2)
    before = Path(path).read_bytes()
    assert lines(path) == 1
    assert cli.main([*ARGV, path]) == 0
    assert Path(path).read_bytes().startswith(before)
    assert in_order(_record.read(path)) == one


@pytest.fixture
def cluster():
    distributed = pytest.importorskip("distributed")
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster:
        yield cluster


@posix
def test_a_dask_worker_that_is_killed_costs_nothing(one, cluster, tmp_path, capsys):
    path = str(tmp_path / "dask.jsonl")
    with cluster.get_client() as client:
        client.run(doom, path)
    assert cli.main([*ARGV, path, "--dask", cluster.scheduler_address]) == 0
    assert Path(f"{path}.doomed").exists()
    assert "4 attacks made, 0 were there" in capsys.readouterr().out
    assert lines(path) == 4
    assert in_order(_record.read(path)) == one


@posix
def test_ctrl_c_ends_the_attacks_of_dask_workers_too(one, cluster, tmp_path):
    path = str(tmp_path / "dask.jsonl")
    with cluster.get_client() as client:
        client.run(hang, path)
        before = set(client.run(os.getpid).values())
        interrupted(
            path,
            *("--dask", cluster.scheduler_address),
            ready=lambda: lines(path) == 1 and len(hanging(path)) == 2,
        )
        assert lines(path) == 1
        wait(lambda: not before & set(client.run(os.getpid, on_error="ignore").values()))
    assert cli.main([*ARGV, path, "--dask", cluster.scheduler_address]) == 0
    assert lines(path) == 4
    assert in_order(_record.read(path)) == one


@pytest.fixture
def guessing(here, monkeypatch):  # noqa: F811
    """An experiment of guesses, which cost nothing, for an executor of threads in this process."""
    runner._planned.cache_clear()
    register(monkeypatch, dark=Guess(level=0.2), pair=Guess(level=0.6))
    with ThreadPoolExecutor(2) as executor:
        yield executor
    runner._planned.cache_clear()


def test_any_executor_will_do(guessing):
    assert experiments.run("guess", "results/one.jsonl", progress=False) == 4
    assert experiments.run("guess", "results/guess.jsonl", executor=guessing, images=1) == 2
    assert experiments.run("guess", "results/guess.jsonl", executor=guessing) == 2
    assert experiments.run("guess", "results/guess.jsonl", executor=guessing) == 0
    # Of more images than one, the settings are the same: how many clients there are is none of them.
    assert in_order(rows()) == in_order(rows("one"))


class AtOnce(Executor):
    """Runs everything where it is submitted, so that all attacks have ended when the first row is kept."""

    def submit(self, call, *args):
        future = Future()
        try:
            future.set_result(call(*args))
        except DataError as error:
            future.set_exception(error)
        return future


def test_an_attack_that_fails_ends_the_run_and_what_had_ended_is_kept(guessing, monkeypatch):
    class Failing(Guess):
        def __call__(self, *args, **kwargs):
            raise DataError("the disk is on fire")

    register(monkeypatch, light=Failing(level=0.8), dark=Guess(level=0.2))
    with pytest.raises(DataError, match="on fire"):
        experiments.run("guess", "results/guess.jsonl", executor=AtOnce(), progress=False)
    assert sorted((row["case"], row["image"]) for row in rows()) == [("dark", 0), ("dark", 1)]


def test_a_worker_with_other_images_or_settings_is_refused_by_name(guessing):
    plan = _plan.plan(_plan.Request(name="guess"))
    settings, images = plan.case_settings(plan.known["dark"]), plan.images_sha256()
    assert runner.work(plan.request, "dark", 0, (settings, images), "1")["image"] == 0
    with pytest.raises(DataError, match=r"worker .* has case 'dark' with weights_sha256='4711', now None"):
        runner.work(plan.request, "dark", 0, (settings | {"weights_sha256": "4711"}, images), "1")
    with pytest.raises(DataError, match="has other images of patches32"):
        runner.work(plan.request, "dark", 0, (settings, "4711"), "1")


def test_a_worker_makes_the_plan_again_only_for_another_version(guessing, monkeypatch):
    plan = _plan.plan(_plan.Request(name="guess"))
    expected = (plan.case_settings(plan.known["dark"]), plan.images_sha256())
    made = []
    monkeypatch.setattr(_plan, "plan", lambda request: made.append(request) or plan)
    for version, count in (("1", 1), ("1", 1), ("2", 2)):
        runner.work(plan.request, "dark", 1, expected, version)
        assert len(made) == count


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--workers", "0"], "--workers is 0; expected at least 1"),
        (["--dask", "nowhere"], "--dask is 'nowhere', where no scheduler answers"),
    ],
)
def test_faults_of_workers_are_one_line(guessing, capsys, argv, message):
    if argv[0] == "--dask":
        pytest.importorskip("distributed")
    assert cli.main(["experiment", "guess", *argv]) == 2
    assert message in capsys.readouterr().err


def test_workers_and_dask_exclude_each_other(capsys):
    with pytest.raises(SystemExit):
        cli.main(["experiment", "table1", "--workers", "2", "--dask", "tcp://127.0.0.1:8786"])
    assert "not allowed with argument" in capsys.readouterr().err


def test_without_distributed_the_extra_is_named(guessing, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "distributed", None)
    assert cli.main(["experiment", "guess", "--dask", "tcp://127.0.0.1:8786"]) == 2
    assert "`pip install invlib[cluster]` brings it" in capsys.readouterr().err


def test_the_originals_of_a_row_that_was_lost_are_kept_again(guessing, monkeypatch):
    register(monkeypatch, dark=Guess(level=0.2), light=Guess(level=0.8))
    experiments.run("guess", "results/guess.jsonl", progress=False)
    whole = in_order(rows())
    path = Path("results/guess.jsonl")
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[1:]))
    assert experiments.run("guess", path, executor=guessing, progress=False) == 1
    assert in_order(rows()) == whole
    assert sorted((row["case"], bool(row["truth"])) for row in whole) == [
        *[("dark", True)] * 2,
        *[("light", False)] * 2,
    ]
