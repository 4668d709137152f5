"""Local training loops, recorded: as the simulated client, or with a word on what is doubtful."""

# ruff: noqa: PT012, PT031, SIM117 - a recording is a block

import copy
import random
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

import invlib as iv
from invlib.errors import ConfigError, DoubtWarning, ObservationError
from tests.conftest import build_tiny, random_batch

FACTS = {"normalization": iv.CIFAR10}


def train(net, x, y, optimizer, steps=3, *, size=None, before_step=lambda: None):
    """Train as a client does: steps on batches in order, and around again."""
    size, start = size or len(x), 0
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(net(iv.CIFAR10.encode(x[start : start + size])), y[start : start + size]).backward()
        before_step()
        optimizer.step()
        start = start + size if start + size < len(x) else 0


def normed():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return nn.Sequential(
            nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 5)
        )


def as_simulated(seen, x, y, protocol, **settings):
    """The observation equals the simulated client's, of the model that the recording kept."""
    found = seen.observation
    expected = iv.observe(seen.model, x, y, protocol, normalization=iv.CIFAR10, **settings)
    assert found.protocol == protocol
    assert found.training_mode == expected.training_mode
    assert (found.num_images, found.image_shape) == (expected.num_images, expected.image_shape)
    assert list(found.update) == list(expected.update)
    for name, value in expected.update.items():
        torch.testing.assert_close(found.update[name], value, rtol=1e-3, atol=2e-6)
    for name, value in expected.buffers.items():
        torch.testing.assert_close(found.buffers[name], value)
    return found


@pytest.mark.parametrize(
    ("make", "settings"),
    [
        (torch.optim.SGD, {"lr": 0.1}),
        (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}),
        (torch.optim.Adam, {"lr": 0.01, "betas": (0.8, 0.9)}),
        (torch.optim.AdamW, {"lr": 0.01, "weight_decay": 0.1}),
    ],
)
@pytest.mark.parametrize("build", [build_tiny, normed])
def test_what_was_recorded_is_what_the_simulated_client_sends(make, settings, build):
    net, (x, y) = build().train(), random_batch(4)
    start = copy.deepcopy(net.state_dict())
    with warnings.catch_warnings(), iv.record_client(net, images=x, labels=y, **FACTS) as seen:
        warnings.simplefilter("error")
        train(net, x, y, make(net.parameters(), **settings), steps=3)
    kind = {torch.optim.Adam: "adam", torch.optim.AdamW: "adamw"}.get(make, "sgd")
    client = iv.FedAvg(local_steps=3, optimizer=kind, **{"weight_decay": 0, **settings})
    found = as_simulated(seen, x, y, client, training_mode=True)
    assert (seen.rates, seen.batch_sizes) == ((settings["lr"],) * 3, (4, 4, 4))
    assert not found.notes
    assert all(torch.equal(v, start[n]) for n, v in seen.model.state_dict().items())
    found.validate(seen.model)


def test_minibatches_a_schedule_and_evaluation_mode():
    net, (x, y) = build_tiny().eval(), random_batch(5)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    with iv.record_client(net, num_images=5, **FACTS) as seen:
        for k in range(3):
            part = slice(2 * k, 2 * k + 2)
            optimizer.zero_grad()
            F.cross_entropy(net(iv.CIFAR10.encode(x[part])), y[part]).backward()
            optimizer.step()
            scheduler.step()
            with torch.no_grad():
                net(x)  # a validation on the way is no batch
    client = iv.FedAvg(lr=(0.1, 0.05, 0.025), local_steps=3, batch_size=2)
    found = as_simulated(seen, x, y, client)
    assert found.labels is None
    assert seen.batch_sizes == (2, 2, 1)


@pytest.mark.parametrize(("size", "sizes", "drop"), [(2, [2, 2, 1] * 2, False), (2, [2, 2] * 2, True)])
def test_the_last_batch_is_seen(size, sizes, drop):
    net, (x, y) = build_tiny(), random_batch(5)
    with iv.record_client(net, num_images=5, **FACTS) as seen:
        train(net, x[: 4 if drop else 5], y, torch.optim.SGD(net.parameters(), lr=0.1), len(sizes), size=size)
    assert list(seen.batch_sizes) == sizes
    assert seen.observation.protocol == iv.FedAvg(
        lr=0.1, local_steps=len(sizes), batch_size=2, drop_last=drop
    )


def test_shuffling_is_seen_and_augmentation_is_doubtful():
    (x, y), net = random_batch(4), build_tiny()
    with iv.record_client(net, num_images=4, **FACTS) as seen:
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        for order in ([0, 1, 2, 3], [2, 0, 3, 1]):
            train(net, x[order], y[order], optimizer, 2, size=2)
    assert seen.observation.protocol == iv.FedAvg(lr=0.1, local_steps=4, batch_size=2, shuffle=True)
    assert not seen.observation.notes
    with pytest.warns(DoubtWarning, match="as where images are augmented"):
        with iv.record_client(net, num_images=4, **FACTS) as seen:
            optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
            train(net, x, y, optimizer, 1)
            train(net, x.roll(3, 2) * 0.9, y, optimizer, 1)
    assert seen.observation.notes


def test_settings_that_cannot_be_seen_are_told():
    net, (x, y) = build_tiny(), random_batch(2)
    with iv.record_client(net, images=x, clip_norm=0.5, **FACTS) as seen:
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        train(
            net, x, y, optimizer, before_step=lambda: nn.utils.clip_grad_norm_(net.parameters(), 0.5) and None
        )
    as_simulated(seen, x, y, iv.FedAvg(lr=0.1, local_steps=3, clip_norm=0.5), training_mode=True)


def test_frozen_layers_stay_out():
    net, (x, y) = build_tiny(), random_batch(2)
    with iv.record_client(net, images=x, **FACTS) as seen:
        net[0].requires_grad_(False)  # within the block
        train(net, x, y, torch.optim.SGD(net[3].parameters(), lr=0.1))
    found = as_simulated(seen, x, y, iv.FedAvg(lr=0.1, local_steps=3), training_mode=True)
    assert list(found.update) == ["3.weight", "3.bias"]
    net = build_tiny()
    with pytest.warns(DoubtWarning, match=r"'0.weight' and 1 more parameters are trainable and not in"):
        with iv.record_client(net, images=x, **FACTS) as seen:
            train(net, x, y, torch.optim.SGD(net[3].parameters(), lr=0.1))
    assert list(seen.observation.update) == ["3.weight", "3.bias"]


@pytest.mark.parametrize("scale", [None, 2.0**15])
def test_mixed_precision_is_doubtful_and_right_to_its_precision(scale):
    net, (x, y) = build_tiny(), random_batch(2)
    scaler = torch.amp.GradScaler("cpu", enabled=scale is not None, init_scale=scale or 1.0)
    with pytest.warns(DoubtWarning, match="mixed precision"):
        with iv.record_client(net, images=x, **FACTS) as seen:
            optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
            for k in range(3):
                optimizer.zero_grad()
                with torch.autocast("cpu", torch.bfloat16):
                    loss = F.cross_entropy(net(iv.CIFAR10.encode(x)), y)
                scaler.scale(loss * (float("inf") if k == 1 and scale else 1)).backward()
                scaler.step(optimizer)  # skips the infinite one
                scaler.update()
    steps = 3 if scale is None else 2
    assert len(seen.rates) == steps
    client = iv.FedAvg(lr=0.1, local_steps=steps)
    expected = iv.observe(seen.model, x, y, client, normalization=iv.CIFAR10).update
    for name, value in seen.observation.update.items():
        assert (value - expected[name]).norm() < 0.03 * expected[name].norm(), name


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda net: torch.compile(net, backend="eager")])
def test_wrappers_are_taken_off(wrap):
    net, (x, y) = build_tiny(), random_batch(2)
    wrapped = wrap(net)
    with iv.record_client(wrapped, images=x, **FACTS) as seen:
        train(wrapped, x, y, torch.optim.SGD(wrapped.parameters(), lr=0.1))
    as_simulated(seen, x, y, iv.FedAvg(lr=0.1, local_steps=3), training_mode=True)
    assert seen.batch_sizes == (2, 2, 2)
    with warnings.catch_warnings():  # what is compiled may run without hooks inside
        warnings.filterwarnings("ignore", "the model was not seen running", DoubtWarning)
        with iv.record_client(net, images=x, **FACTS) as seen:
            train(wrapped, x, y, torch.optim.SGD(net.parameters(), lr=0.1))
    as_simulated(seen, x, y, iv.FedAvg(lr=0.1, local_steps=3), training_mode=True)


def test_a_model_that_changes_its_type():
    net, (x, y) = build_tiny(), random_batch(2)
    with pytest.warns(DoubtWarning, match="'0.weight' went from float32 to bfloat16"):
        with iv.record_client(net, images=x, **FACTS) as seen:
            train(net, x, y, torch.optim.SGD(net.parameters(), lr=0.1))
            net.to(torch.bfloat16)
    assert seen.observation.update["0.weight"].dtype == torch.float32


def test_an_error_in_the_block_passes_and_leaves_no_observation():
    net, (x, y) = build_tiny(), random_batch(2)
    with pytest.raises(KeyError, match="mine"), iv.record_client(net, images=x, **FACTS) as seen:
        train(net, x, y, torch.optim.SGD(net.parameters(), lr=0.1))
        raise KeyError("mine")
    with pytest.raises(ObservationError, match="ended with KeyError"):
        _ = seen.observation
    assert not _global_optimizer_pre_hooks
    assert not net._forward_pre_hooks


def test_nothing_of_the_callers_is_touched():
    net, (x, y) = build_tiny(), random_batch(2)
    calls = []
    net.register_forward_pre_hook(lambda *_: calls.append(1))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002
    hooks = len(net._forward_pre_hooks), len(optimizer._optimizer_step_post_hooks)
    with iv.record_client(net, images=x, **FACTS) as seen:
        train(net, x, y, optimizer)
    trained = copy.deepcopy(net.state_dict())
    update = seen.observation.update
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.array_equal(np.random.get_state()[1], states[2])  # noqa: NPY002
    assert hooks == (len(net._forward_pre_hooks), len(optimizer._optimizer_step_post_hooks))
    assert not _global_optimizer_post_hooks
    net[0].weight.data.zero_()
    torch.testing.assert_close(
        seen.model[0].weight.detach() + update["0.weight"], trained["0.weight"], rtol=0, atol=1e-7
    )


def test_one_recording_within_another_and_beside_another_model():
    (x, y), net, other = random_batch(2), build_tiny(), normed()
    with iv.record_client(net, images=x, **FACTS) as outer:
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        train(net, x, y, optimizer, 2)
        train(other, x, y, torch.optim.Adam(other.parameters()), 2)
        with iv.record_client(net, images=x, **FACTS) as inner:
            train(net, x, y, optimizer, 1)
        with pytest.raises(ObservationError, match="has not ended"):
            _ = outer.observation
    as_simulated(outer, x, y, iv.FedAvg(lr=0.1, local_steps=3), training_mode=True)
    as_simulated(inner, x, y, iv.FedAvg(lr=0.1, local_steps=1), training_mode=True)


def test_an_optimizer_that_has_taken_steps_is_doubtful():
    (x, y), net = random_batch(2), build_tiny()
    optimizer = torch.optim.Adam(net.parameters())
    train(net, x, y, optimizer, 1)
    with pytest.warns(DoubtWarning, match="the Adam has taken steps"):
        with iv.record_client(net, images=x, **FACTS) as seen:
            train(net, x, y, optimizer, 1)
    assert "has taken steps" in seen.observation.notes[0]


@pytest.mark.parametrize(
    ("protocol", "doubt"),
    [
        (iv.FedAvg(lr=0.1, local_steps=2), "took 3 steps and the protocol says 2"),
        (iv.FedAvg(lr=0.1, local_steps=3, batch_size=1), "batches of 2, 2, 2 and the protocol says 1, 1, 1"),
    ],
)
def test_a_protocol_that_contradicts_what_was_seen_is_doubtful(protocol, doubt):
    net, (x, y) = build_tiny(), random_batch(2)
    with pytest.warns(DoubtWarning, match=doubt):
        with iv.record_client(net, images=x, protocol=protocol, **FACTS) as seen:
            train(net, x, y, torch.optim.SGD(net.parameters(), lr=0.1))
    assert seen.observation.protocol == protocol


def test_steps_that_are_no_batches_of_the_images_and_accumulation_are_doubtful():
    net, (x, y) = build_tiny(), random_batch(4)
    with pytest.warns(DoubtWarning) as said:
        with iv.record_client(net, num_images=4, **FACTS) as seen:
            optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
            train(net, x[:1], y, optimizer, 1)
            F.cross_entropy(net(iv.CIFAR10.encode(x[:2])), y[:2]).backward()
            train(net, x[2:], y[2:], optimizer, 1)
    said = " ".join(str(w.message) for w in said)
    assert "ran on batches of 1, 4, which are no batches of 4 images" in said
    assert "ran several times for one step" in said
    assert seen.observation.protocol.local_steps == 2


def grown(net, x, y):
    train(net, x, y, torch.optim.SGD(net.parameters(), 0.1), 1)
    net.register_buffer("spare", torch.zeros(1))


@pytest.mark.parametrize(
    ("loop", "message"),
    [
        (lambda net, x, y: None, "no optimizer of torch.optim stepped"),
        (
            lambda net, x, y: train(net, x, y, torch.optim.RMSprop(net.parameters())),
            "optimizer is RMSprop; expected",
        ),
        (
            lambda net, x, y: [
                train(net, x, y, torch.optim.SGD(part.parameters(), 0.1)) for part in net[::3]
            ],
            "SGD and SGD both step the model",
        ),
        (grown, r"differ in \['spare'\]"),
        (
            lambda net, x, y: train(net, x, y * 0 + 1, torch.optim.SGD(net.parameters(), 0.0)),
            "lr",
        ),
    ],
    ids=["no step", "unknown", "two optimizers", "a changed model", "a rate of 0"],
)
def test_what_cannot_be_recorded_is_named_after_the_block(loop, message):
    net, (x, y) = build_tiny(), random_batch(2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DoubtWarning)
        with iv.record_client(net, images=x, **FACTS) as seen:
            loop(net, x, y)
    with pytest.raises((ObservationError, ConfigError), match=message):
        _ = seen.observation


def test_a_momentum_that_is_scheduled_is_named():
    net, (x, y) = build_tiny(), random_batch(2)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=10)
    with iv.record_client(net, images=x, **FACTS) as seen:
        for _ in range(2):
            train(net, x, y, optimizer, 1)
            cycle.step()
    with pytest.raises(ConfigError, match="the settings of SGD change between steps"):
        _ = seen.observation


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"epochs": 2}, ConfigError, "epochs is no setting of record_client"),
        ({"protocol": iv.FedAvg(lr=1, epochs=1), "clip_norm": 1}, ConfigError, "clip_norm is given beside"),
        ({"protocol": iv.FedSGD()}, ObservationError, "protocol is FedSGD, which sends gradients"),
        ({"normalization": None}, ConfigError, "normalization is None"),
        ({"num_images": 3}, ObservationError, "images are 2 of shape .* num_images is 3"),
        ({"images": None, "num_images": 0}, ObservationError, "num_images is 0"),
    ],
)
def test_bad_settings_are_named_before_the_training(settings, error, message):
    x, _ = random_batch(2)
    with (
        pytest.raises(error, match=message),
        iv.record_client(build_tiny(), **{"images": x, **FACTS} | settings),
    ):
        pytest.fail("the block ran")


def test_no_model_and_no_count():
    with pytest.raises(ObservationError, match="the model is a int"), iv.record_client(3, **FACTS):
        pytest.fail("the block ran")
    net, (x, y) = build_tiny(), random_batch(2)
    with iv.record_client(net, **FACTS) as seen:
        train(net, x, y, torch.optim.SGD(net.parameters(), 0.1), 2)
    with pytest.raises(ObservationError, match="num_images is None and 2 steps were seen"):
        _ = seen.observation
    with iv.record_client(net, **FACTS) as seen:
        train(net, x, y, torch.optim.SGD(net.parameters(), 0.1), 1)
    assert seen.observation.num_images == 2


def test_text(tmp_path):
    net = nn.Sequential(nn.Embedding(7, 3), nn.Flatten(), nn.Linear(12, 7))
    tokens = torch.randint(7, (1, 4), generator=torch.Generator().manual_seed(0))
    with iv.record_client(net, images=tokens) as seen:
        optimizer = torch.optim.SGD(net.parameters(), 0.1)
        F.cross_entropy(net(tokens), tokens[:, 0]).backward()
        optimizer.step()
    assert seen.observation.is_text
    iv.save_observation(seen.observation, tmp_path / "seen")
    assert iv.load_observation(tmp_path / "seen").image_shape == (4,)
