"""The mod for Flower, on messages that are no more than the mod asks for."""

import copy
import logging
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import nn

import invlib as iv
from invlib.errors import ConfigError, DataError, DoubtWarning, InvlibError
from invlib.integrations.flower import record_updates
from tests.conftest import build_tiny, random_batch
from tests.federated.test_record import normed

X, Y = random_batch(4)


class Array:
    def __init__(self, value):
        self.value = value.numpy().copy()

    def numpy(self):
        return self.value


def message(state, kind="train", number=1, **metrics):
    """A message of Flower, as far as the mod looks at it."""
    arrays = {"arrays": {n: Array(t.detach()) for n, t in state.items()}}
    return SimpleNamespace(
        metadata=SimpleNamespace(message_type=kind, group_id=str(number)),
        content=SimpleNamespace(
            array_records=arrays,
            metric_records={"metrics": metrics} if metrics else {},
            config_records={"config": {"server-round": number}},
        ),
        has_error=lambda: False,
    )


def client(build=build_tiny, steps=3, change=lambda state: state):
    """The function of a client: it builds, loads, trains and replies; `sent` holds what it sent."""

    def train(msg, context):
        net = build()
        arrays = msg.content.array_records["arrays"]
        state = {n: torch.tensor(a.numpy()) for n, a in arrays.items()}
        net.load_state_dict(dict(zip(net.state_dict(), state.values(), strict=True)))
        net.train()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        for _ in range(steps):
            optimizer.zero_grad()
            F.cross_entropy(net(iv.CIFAR10.encode(X)), Y).backward()
            optimizer.step()
        train.sent = change(dict(net.state_dict()))
        return message(train.sent, **{"num-examples": 4, "loss": 1.0})

    return train


def chain(function, mods):
    """Wrap a client's function into its mods as Flower does, the first outermost."""

    def wrap(_ffn, _mod):
        def new_ffn(message, context):
            return _mod(message, context, _ffn)

        return new_ffn

    for mod in reversed(mods):
        function = wrap(function, mod)
    return function


NODE = SimpleNamespace(node_id=7)


def mod(tmp_path, build=build_tiny, **settings):
    facts = {"out": tmp_path / "audit", "normalization": iv.CIFAR10, "on_error": "raise"}
    return record_updates(build, **facts | settings)


@pytest.mark.parametrize("build", [build_tiny, normed])
def test_what_was_sent_is_saved_with_the_client_that_was_seen(tmp_path, build):
    start, train = build().state_dict(), client(build)
    generator = torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        reply = chain(train, [mod(tmp_path, build)])(message(start), NODE)
    assert torch.equal(torch.get_rng_state(), generator)
    names = sorted(p.name for p in (tmp_path / "audit").iterdir())
    assert names == ["round-0001-node-7.received.safetensors", "round-0001-node-7.safetensors"]
    found = iv.load_observation(tmp_path / "audit" / names[1])
    net = build()
    net.load_state_dict(safetensors.torch.load_file(tmp_path / "audit" / names[0]))
    protocol = iv.FedAvg(lr=0.1, local_steps=3, momentum=0.9)
    expected = iv.observe(net, X, Y, protocol, normalization=iv.CIFAR10, training_mode=True)
    assert (found.protocol, found.num_images, found.image_shape) == (protocol, 4, (3, 8, 8))
    assert found.training_mode
    assert found.labels is None
    assert not found.notes
    for name, value in expected.update.items():
        assert torch.equal(found.update[name], train.sent[name] - start[name])
        torch.testing.assert_close(found.update[name], value, rtol=1e-3, atol=2e-6)
    for name, value in expected.buffers.items():
        torch.testing.assert_close(found.buffers[name], value)
    found.validate(net)
    # the reply is the client's own, with nothing in it that was found
    assert reply.content.metric_records == {"metrics": {"num-examples": 4, "loss": 1.0}}
    assert list(reply.content.array_records) == ["arrays"]
    assert (tmp_path / "audit").stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "audit" / names[0]).stat().st_mode & 0o777 == 0o600


def test_other_messages_other_rounds_and_errors_pass(tmp_path):
    recorder, start = mod(tmp_path, every=3), build_tiny().state_dict()
    for number in range(1, 6):
        chain(client(), [recorder])(message(start, number=number), NODE)
    names = sorted(p.name for p in (tmp_path / "audit").glob("*7.safetensors"))
    assert names == ["round-0001-node-7.safetensors", "round-0004-node-7.safetensors"]
    failed = SimpleNamespace(has_error=lambda: True)
    assert recorder(message(start, number=7), NODE, lambda *_: failed) is failed
    assert recorder(message(start, kind="evaluate", number=10), NODE, lambda *_: "as it is") == "as it is"
    assert len(list((tmp_path / "audit").iterdir())) == 4


def test_mods_behind_are_recorded_and_mods_before_are_warned_of(tmp_path):
    def noisy(msg, context, call_next):
        reply = call_next(msg, context)
        for array in reply.content.array_records["arrays"].values():
            array.value = array.value + np.float32(0.5)
        return reply

    def arrays_size_mod(msg, context, call_next):
        return call_next(msg, context)

    start, recorder = build_tiny().state_dict(), mod(tmp_path)
    path = tmp_path / "audit" / "round-0001-node-7.safetensors"
    train = client()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        chain(train, [arrays_size_mod, recorder, noisy])(message(start), NODE)
    found = iv.load_observation(path).update["0.bias"]
    torch.testing.assert_close(found, train.sent["0.bias"] - start["0.bias"] + 0.5)
    with pytest.warns(DoubtWarning, match="noisy stands before record_updates"):
        chain(train, [noisy, recorder])(message(start), NODE)
    found = iv.load_observation(path)
    torch.testing.assert_close(found.update["0.bias"], train.sent["0.bias"] - start["0.bias"])
    assert found.notes[0].startswith("noisy stands before")

    def secaggplus_mod(msg, context, call_next):
        return call_next(msg, context)

    with pytest.warns(DoubtWarning, match="secaggplus_mod masks the update before it is recorded"):
        chain(train, [recorder, secaggplus_mod])(message(start), NODE)


def test_parameters_that_stay_at_home_and_names_that_are_numbers(tmp_path):
    start = build_tiny().state_dict()
    path = tmp_path / "audit" / "round-0001-node-7.safetensors"
    keep = client(change=lambda state: {n: t for n, t in state.items() if n.startswith("0")})
    chain(keep, [mod(tmp_path)])(message(start), NODE)
    found = iv.load_observation(path)
    assert {n: int(mask.sum()) for n, mask in found.sent.items()} == {"3.weight": 0, "3.bias": 0}
    assert "the reply lacks '3.weight' and 1 more" in found.notes[0]
    numbered = {str(k): t for k, t in enumerate(start.values())}
    train = client(change=lambda state: {str(k): t for k, t in enumerate(state.values())})
    chain(train, [mod(tmp_path)])(message(numbered), NODE)
    assert list(iv.load_observation(path).update) == list(start)


@pytest.mark.parametrize(
    ("build", "state", "reason"),
    [
        (lambda: 3, build_tiny().state_dict(), "build_model gives a int"),
        (lambda: 1 / 0, build_tiny().state_dict(), "ZeroDivisionError"),
        (lambda: build_tiny(classes=6), build_tiny().state_dict(), "do not fit the model"),
        (normed, build_tiny().state_dict(), "'0.bias' and 0 more that the model lacks"),
    ],
)
def test_a_recording_that_fails_leaves_the_round_alone(tmp_path, caplog, build, state, reason):
    start, train = copy.deepcopy(build_tiny().state_dict()), client()
    with caplog.at_level(logging.WARNING, "invlib"):
        reply = chain(train, [mod(tmp_path, build, on_error="log")])(message(state), NODE)
    assert np.array_equal(reply.content.array_records["arrays"]["0.bias"].numpy(), train.sent["0.bias"])
    assert not torch.equal(train.sent["0.bias"], start["0.bias"])
    assert reason in caplog.text
    assert not (tmp_path / "audit").exists()
    with pytest.raises((ValueError, ZeroDivisionError)):
        chain(train, [mod(tmp_path, build)])(message(state), NODE)


def test_an_unwritable_file_and_a_client_that_raises(tmp_path, caplog):
    recorder, start = mod(tmp_path, on_error="log"), build_tiny().state_dict()
    (tmp_path / "audit" / "round-0001-node-7.safetensors").mkdir(parents=True)
    chain(client(), [recorder])(message(start), NODE)
    assert "is a folder; expected a file" in caplog.text

    def broken(msg, context):
        raise KeyError("the client's own")

    with pytest.raises(KeyError, match="the client's own"):
        chain(broken, [recorder])(message(start), NODE)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"every": 0}, ConfigError, "every is 0"),
        ({"on_error": "withhold"}, ConfigError, "on_error is 'withhold'"),
        ({"epochs": 1}, ConfigError, "epochs is no setting"),
        ({"normalization": None}, ConfigError, "normalization is None"),
        ({"build": build_tiny()}, ConfigError, "build_model is Sequential"),
        ({"out": __file__}, DataError, "cannot be written"),
        ({"protocol": iv.FedAvg(lr=1, epochs=1), "shuffle": True}, ConfigError, "shuffle is given beside"),
        ({"data": (X, Y)}, ConfigError, "expected a function of the context"),
        ({"data": lambda _: (X, Y), "on_leak": "drop"}, ConfigError, "on_leak is 'drop'"),
        ({"on_leak": "withhold"}, ConfigError, "on_leak is 'withhold' with data=None"),
        (
            {"data": lambda _: (X, Y), "on_leak": "raise", "every": 2},
            ConfigError,
            "every=2; expected data and every=1",
        ),
    ],
)
def test_bad_settings_are_named_before_any_round(tmp_path, settings, error, message):
    with pytest.raises(error, match=message):
        mod(tmp_path, **settings)


def test_a_client_whose_optimizer_is_unknown_is_told(tmp_path):
    start, told = build_tiny().state_dict(), iv.FedAvg(lr=0.5, local_steps=1)

    def by_hand(msg, context):
        return message({n: t + 1 for n, t in start.items()})

    recorder = mod(tmp_path, protocol=told, num_images=4, image_shape=(3, 8, 8), training_mode=False)
    chain(by_hand, [recorder])(message(start), NODE)
    found = iv.load_observation(tmp_path / "audit" / "round-0001-node-7.safetensors")
    assert (found.protocol, found.num_images) == (told, 4)


def build_open():
    """A network that gives its images away: a fully connected layer that sees them, with zeros behind."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 40), nn.ReLU(), nn.Linear(40, 5))


def own(_):
    return X, Y


def test_what_leaks_is_logged_and_sent_unless_told_otherwise(tmp_path, caplog):
    start, train = build_open().state_dict(), client(build_open, steps=1)
    with caplog.at_level(logging.INFO, "invlib"):
        reply = chain(train, [mod(tmp_path, build_open, data=own)])(message(start), NODE)
    assert "images can be read off" in caplog.text
    assert np.array_equal(reply.content.array_records["arrays"]["1.bias"].numpy(), train.sent["1.bias"])
    assert reply.content.metric_records == {"metrics": {"num-examples": 4, "loss": 1.0}}
    quiet, train = build_tiny().state_dict(), client(steps=1)
    reply = chain(train, [mod(tmp_path, data=own, on_leak="withhold")])(message(quiet), NODE)
    assert np.array_equal(reply.content.array_records["arrays"]["0.bias"].numpy(), train.sent["0.bias"])


def test_withheld_is_an_update_of_zero_and_an_error_says_nothing(tmp_path):
    start = build_open().state_dict()
    more = client(build_open, steps=1, change=lambda state: state | {"own": torch.ones(3)})
    for train in (client(build_open, steps=1), more):
        recorder = mod(tmp_path, build_open, data=own, on_leak="withhold", on_error="log")
        reply = chain(train, [recorder])(message(start), NODE)
        arrays = reply.content.array_records["arrays"]
        assert list(arrays) == list(start)
        assert all(np.array_equal(arrays[n].numpy(), start[n]) for n in start)
        assert not torch.equal(train.sent["1.weight"], start["1.weight"])
        assert reply.content.metric_records == {"metrics": {"num-examples": 4, "loss": 1.0}}
    with pytest.raises(InvlibError) as error:
        chain(client(build_open, steps=1), [mod(tmp_path, build_open, data=own, on_leak="raise")])(
            message(start), NODE
        )
    assert str(error.value) == "the client does not send its update"


@pytest.mark.parametrize("data", [lambda _: 1 / 0, lambda _: (X[:2], Y[:2])])
def test_a_check_that_fails_sends_nothing(tmp_path, data):
    start, train = build_tiny().state_dict(), client(steps=1)
    recorder = mod(tmp_path, data=data, on_leak="withhold", on_error="log")
    reply = chain(train, [recorder])(message(start), NODE)
    assert np.array_equal(reply.content.array_records["arrays"]["0.bias"].numpy(), start["0.bias"])
