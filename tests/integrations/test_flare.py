"""The filter for FLARE, over classes that are no more than what it asks for."""

import importlib
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import invlib as iv
from invlib.errors import ConfigError, DependencyError, ObservationError
from tests.conftest import build_tiny, random_batch

X, Y = random_batch(4)
FACTS = {"num_images": 4, "image_shape": [3, 8, 8], "normalization": [[0.0], [1.0]]}


class Filter:
    """What FLARE's DXOFilter is, as far as the recorder uses it."""

    def __init__(self, supported_data_kinds, data_kinds_to_filter):
        self.kinds = supported_data_kinds

    def get_prop(self, key, default=None):
        return getattr(self, key, default)


class Context(dict):
    def set_prop(self, key, value, private, sticky):
        assert private, "nothing leaves the client"
        self[key] = value

    def get_prop(self, key):
        return self.get(key)

    def get_identity_name(self):
        return "site 1"


@pytest.fixture
def flare(monkeypatch):
    apis = ModuleType("nvflare.apis.dxo_filter")
    apis.DXOFilter = Filter
    for name in ("nvflare", "nvflare.apis"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "nvflare.apis.dxo_filter", apis)
    monkeypatch.delitem(sys.modules, "invlib.integrations.flare", raising=False)
    yield importlib.import_module("invlib.integrations.flare")
    sys.modules.pop("invlib.integrations.flare", None)


def dxo(kind, state, **meta):
    data = {n: t.detach().numpy().copy() for n, t in state.items()}
    get = lambda key, default=None: meta.get(key, default)  # noqa: E731
    return SimpleNamespace(data_kind=kind, data=data, get_meta_prop=get)


def trained(net, steps=2):
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(net(X), Y).backward()
        optimizer.step()
    return net.state_dict()


SHAREABLE = SimpleNamespace(get_header=lambda key, default: default)


def filters(flare, tmp_path, **settings):
    """The filter of the task's data and that of its result, two objects, as from a configuration."""
    facts = {"out": str(tmp_path), "protocol": {"lr": 0.1}, "facts": FACTS, "on_error": "raise"}
    made = [flare.RecordUpdates(**{"build_model": build_tiny, **facts, **settings}) for _ in range(2)]
    for one, chain in zip(made, ("task_data", "task_result"), strict=True):
        setattr(one, "__chain_type", chain)
    return made


@pytest.mark.parametrize("kind", ["WEIGHTS", "WEIGHT_DIFF"])
def test_what_leaves_is_saved(flare, tmp_path, kind):
    start = {n: t.clone() for n, t in build_tiny().state_dict().items()}
    first, last = filters(flare, tmp_path, build_model="tests.conftest:build_tiny")
    context, after = Context(), trained(build_tiny())
    assert first.process_dxo(dxo("WEIGHTS", start, current_round=0), SHAREABLE, context) is None
    sent = after if kind == "WEIGHTS" else {n: after[n] - start[n] for n in start}
    out = dxo(kind, sent, current_round=0, NUM_STEPS_CURRENT_ROUND=2)
    data = {n: a.copy() for n, a in out.data.items()}
    assert last.process_dxo(out, SHAREABLE, context) is None
    assert all((out.data[n] == data[n]).all() for n in data)
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names == ["round-0000-site_1.received.safetensors", "round-0000-site_1.safetensors"]
    found = iv.load_observation(tmp_path / names[1])
    assert found.protocol == iv.FedAvg(lr=0.1, local_steps=2)
    expected = iv.observe(build_tiny(), X, Y, found.protocol, normalization=iv.UNIT).update
    for name, value in expected.items():
        torch.testing.assert_close(found.update[name], value, rtol=1e-3, atol=2e-6)


def test_rounds_between_pass_and_what_fails_is_logged(flare, tmp_path, caplog):
    start = build_tiny().state_dict()
    first, last = filters(flare, tmp_path, every=2, on_error="log")
    context = Context()
    assert last.process_dxo(dxo("WEIGHTS", start, current_round=0), SHAREABLE, context) is None
    assert "no weights came in through RecordUpdates" in caplog.text
    first.process_dxo(dxo("WEIGHTS", start, current_round=1), SHAREABLE, context)
    last.process_dxo(dxo("WEIGHTS", start, current_round=1), SHAREABLE, context)
    assert not list(tmp_path.iterdir())
    last.on_error, (_, raising) = "log", filters(flare, tmp_path)
    with pytest.raises(ObservationError, match="the result says no steps"):
        raising.process_dxo(dxo("WEIGHTS", start, current_round=2), SHAREABLE, context)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"build_model": "tests.conftest:nothing"}, "build_model is 'tests.conftest:nothing'"),
        ({"protocol": {"rate": 1}}, "rate"),
        ({"facts": FACTS | {"protocol": None}}, "protocol is given in facts"),
        ({"every": 0}, "every is 0"),
    ],
)
def test_bad_settings_are_named(flare, tmp_path, settings, message):
    with pytest.raises((ConfigError, TypeError), match=message):
        filters(flare, tmp_path, **settings)


def test_without_flare_it_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "nvflare", None)
    monkeypatch.delitem(sys.modules, "invlib.integrations.flare", raising=False)
    module = importlib.import_module("invlib.integrations.flare")
    with pytest.raises(DependencyError, match="pip install nvflare"):
        module.RecordUpdates(build_tiny, "out", {}, {})
    sys.modules.pop("invlib.integrations.flare")
