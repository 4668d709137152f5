"""A checkpoint is of one run alone, whole or refused, private, and its loss costs the run nothing."""

import errno
import os
import stat
from dataclasses import replace

import pytest
import torch
from torch import nn

import invlib as iv
from invlib.errors import ConfigError, DataError
from invlib.search import checkpoint as module
from tests.conftest import random_batch

ATTACK = iv.GradientMatching(steps=6, record_every=1)


def stop(progress):
    return progress.step == 3


def normed():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(36, 5))
    return net.eval()


def see(net, **facts):
    x, y = random_batch(2)
    return iv.observe(net, x, y, iv.FedSGD(), normalization=iv.CIFAR10, **facts)


def weights(net, seen):
    with torch.no_grad():
        net[0].weight[0, 0, 0, 0] += 1e-3
    return seen


def statistics(net, seen):
    net[1].running_mean += 1e-3
    return replace(seen, buffers=dict(net.named_buffers()))


def one_bit(net, seen):
    update = dict(seen.update)
    part = update["0.bias"].clone()
    part[0] = torch.nextafter(part[0], torch.tensor(9.0))
    return replace(seen, update=update | {"0.bias": part})


OTHER = {
    "model.numbers.0.weight": weights,
    "model.numbers.1.running_mean": statistics,
    "observation.update.0.bias": one_bit,
    "observation.normalization": lambda net, seen: replace(seen, normalization=iv.UNIT),
    "observation.training_mode": lambda net, seen: replace(seen, training_mode=True),
    "observation.protocol": lambda net, seen: replace(seen, protocol=iv.FedAvg(lr=1.0, local_steps=1)),
    "observation.buffers.1.running_var": lambda net, seen: replace(
        seen, buffers={name: b for name, b in seen.buffers.items() if name != "1.running_var"}
    ),
    "observation.labels": lambda net, seen: replace(seen, labels=seen.labels.flip(0) + 1),
}


@pytest.mark.parametrize("attack", [ATTACK, iv.best(steps=100)], ids=["matching", "best"])
@pytest.mark.parametrize("name", OTHER)
def test_a_checkpoint_of_another_run_is_refused_by_what_differs(tmp_path, name, attack):
    net = normed()
    seen = see(net)
    seen = replace(seen, buffers={n: b.clone() for n, b in net.named_buffers()}, labels=torch.tensor([0, 3]))
    path = tmp_path / "run.pt"
    attack(net, seen, checkpoint=path, callback=lambda p: p.step == 1)
    other = OTHER[name](net, seen)
    with pytest.raises(ConfigError, match=rf"run.pt is of another run, with .*{name}"):
        attack(net, other, checkpoint=path)


def test_a_checkpoint_is_for_its_owner_alone(tiny, seen, tmp_path):
    path = tmp_path / "run.pt"
    before = os.umask(0)
    try:
        ATTACK(tiny, seen, checkpoint=path, callback=stop)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.parametrize("where", [0.02, 0.3, 0.5, 0.7, 0.98])
def test_flipped_bytes_are_noticed(tiny, seen, tmp_path, where):
    path = tmp_path / "run.pt"
    ATTACK(tiny, seen, checkpoint=path, callback=stop)
    content = bytearray(path.read_bytes())
    content[int(where * len(content))] ^= 1
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"run\.pt cannot be read \(its bytes are not those"):
        ATTACK(tiny, seen, checkpoint=path)


@pytest.mark.parametrize("content", [b"", b"x\n", b"PK\x03\x04 and so on", module.FORMAT], ids=repr)
def test_a_file_that_is_no_checkpoint_is_refused_without_bad_advice(tiny, seen, tmp_path, content):
    path = tmp_path / "run.pt"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"checkpoint .*run\.pt cannot be read \(.*remove it") as caught:
        ATTACK(tiny, seen, checkpoint=path)
    assert "weights_only" not in str(caught.value)
    assert path.read_bytes() == content


def test_a_checkpoint_with_a_pickle_inside_runs_no_code(tiny, seen, tmp_path):
    import hashlib
    import io

    body = io.BytesIO()
    torch.save({"identity": print}, body)
    told = hashlib.sha256(body.getvalue()).hexdigest().encode() + b"\n"
    path = tmp_path / "run.pt"
    path.write_bytes(module.FORMAT + told + body.getvalue())
    with pytest.raises(ConfigError, match=r"cannot be read \(UnpicklingError\)") as caught:
        ATTACK(tiny, seen, checkpoint=path)
    assert "weights_only" not in str(caught.value)


def fail(*_, **__):
    raise AssertionError("work was done")


def nowhere(tmp_path):
    return tmp_path / "none" / "run.pt"


def below_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    return tmp_path / "file" / "run.pt"


def folder(tmp_path):
    return tmp_path


def pipe(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    return tmp_path / "pipe"


def long(tmp_path):
    return tmp_path / ("a" * 300)


@pytest.mark.parametrize("attack", [ATTACK, iv.best(steps=60)], ids=["matching", "best"])
@pytest.mark.parametrize("place", [nowhere, below_a_file, folder, pipe, long], ids=lambda p: p.__name__)
def test_a_place_that_cannot_be_written_is_said_before_any_work(
    tiny, seen, tmp_path, monkeypatch, place, attack
):
    path = place(tmp_path)
    before = sorted(tmp_path.iterdir())
    monkeypatch.setattr("invlib.attacks.matching.GradientMatching.problem", fail)
    monkeypatch.setattr("invlib.attacks.auto.closest_closed_form", fail)
    with pytest.raises(DataError, match=r"checkpoint .* cannot be written \(\w+Error: "):
        attack(tiny, seen, checkpoint=path)
    assert sorted(tmp_path.iterdir()) == before


def full(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_is_said_before_any_work_and_nothing_is_left(tiny, seen, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DataError, match=r"run\.pt' cannot be written \(OSError: No space left on device\)"):
        ATTACK(tiny, seen, checkpoint=tmp_path / "run.pt")
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_full_later_costs_a_warning_and_no_result(tiny, seen, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "EVERY", 0.0)
    path, whole = tmp_path / "run.pt", ATTACK(tiny, seen)

    def fills(progress):
        if progress.step == 2:
            monkeypatch.setattr(os, "fsync", full)

    with pytest.warns(UserWarning, match=r"run\.pt cannot be written .*goes on without it") as caught:
        found = ATTACK(tiny, seen, checkpoint=path, callback=fills)
    assert len(caught) == 1
    assert torch.equal(found.images, whole.images)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()

    def interrupts(progress):
        fills(progress)
        if progress.step == 4:
            raise KeyboardInterrupt

    with pytest.warns(UserWarning, match="goes on without it"):
        found = ATTACK(tiny, seen, checkpoint=path, callback=interrupts)
    assert found.status == "interrupted"
    assert found.images.isfinite().all()
    assert list(tmp_path.iterdir()) == []
