"""Updates captured elsewhere: lists, arrays, state dicts, files; and what is refused."""

import copy
import json

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import nn

import invlib as iv
from invlib.errors import DataError, ObservationError
from tests.conftest import random_batch

FACTS = {"num_images": 1, "image_shape": (3, 8, 8), "normalization": iv.CIFAR10}


def same(a, b):
    assert list(a.update) == list(b.update)
    assert all(torch.equal(a.update[n], b.update[n]) for n in a.update)
    assert (a.protocol, a.num_images, a.image_shape) == (b.protocol, b.num_images, b.image_shape)
    assert (a.normalization, a.training_mode) == (b.normalization, b.training_mode)
    assert (a.labels is None) == (b.labels is None)
    if a.labels is not None:
        assert torch.equal(a.labels, b.labels)


def test_a_list_of_gradients(tiny, seen):
    x, y = random_batch()
    loss = F.cross_entropy(tiny(iv.CIFAR10.encode(x)), y)
    gradients = torch.autograd.grad(loss, list(tiny.parameters()))
    found = iv.from_gradients(tiny, gradients, labels=y, **FACTS)
    for name, value in seen.update.items():
        torch.testing.assert_close(found.update[name], value)
    found.update["0.bias"].zero_()
    assert gradients[1].any(), "the caller's tensors are not shared"


def test_a_list_of_the_wrong_length_is_refused(tiny):
    with pytest.raises(
        ObservationError, match=r"gradients has 2 tensors; expected 4.* 0.weight, 0.bias, 3.weight"
    ):
        iv.from_gradients(tiny, [torch.zeros(1)] * 2, **FACTS)


def test_numpy_arrays(tiny, seen):
    arrays = {name: value.numpy() for name, value in seen.update.items()}
    same(iv.from_arrays(tiny, arrays, labels=seen.labels, **FACTS), seen)
    arrays["0.bias"] = np.full(6, np.nan, dtype=np.float32)
    with pytest.raises(ObservationError, match="6 NaN or infinite numbers of 6"):
        iv.from_arrays(tiny, arrays, **FACTS)


def test_state_dicts_before_and_after():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 5))
    x, y = random_batch(2)
    client = copy.deepcopy(net).train()
    optimizer = torch.optim.SGD(client.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(client(iv.CIFAR10.encode(x)), y).backward()
        optimizer.step()
    facts = FACTS | {"num_images": 2, "protocol": iv.FedAvg(lr=0.1, local_steps=3), "training_mode": True}
    found = iv.from_state_dicts(net, net.state_dict(), client.state_dict(), labels=y, **facts)
    expected = iv.observe(net, x, y, facts["protocol"], normalization=iv.CIFAR10, training_mode=True)
    for name, value in expected.update.items():
        torch.testing.assert_close(found.update[name], value, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(found.buffers["1.running_mean"], expected.buffers["1.running_mean"])
    other = {n: t for n, t in client.state_dict().items() if n != "0.bias"}
    with pytest.raises(ObservationError, match=r"state dicts differ in \['0.bias'\]"):
        iv.from_state_dicts(net, net.state_dict(), other, **facts)


@pytest.mark.parametrize(
    "protocol",
    [
        iv.FedSGD(),
        iv.FedAvg(lr=0.1, epochs=2, batch_size=1, drop_last=True),
        iv.FedAvg(lr=(0.1, 0.0), local_steps=2, momentum=0.9, nesterov=True, clip_norm=0.5, dropout=7),
        iv.FedAvg(lr=0.01, local_steps=2, optimizer="adamw", betas=(0.8, 0.9), eps=1e-4, weight_decay=0.1),
    ],
    ids=str,
)
@pytest.mark.parametrize("reveal", [True, False])
def test_a_saved_observation_comes_back(tiny, tmp_path, protocol, reveal):
    seen = iv.observe(tiny, *random_batch(2), protocol, normalization=iv.CIFAR10, reveal_labels=reveal)
    path = tmp_path / "seen.safetensors"
    iv.save_observation(seen, path)
    same(iv.load_observation(path), seen)
    assert [p.name for p in tmp_path.iterdir()] == ["seen.safetensors"]


def test_a_file_from_before_other_optimizers_is_of_plain_sgd(tiny, tmp_path):
    path, client = tmp_path / "seen.safetensors", iv.FedAvg(lr=0.1, epochs=2, batch_size=1)
    seen = iv.observe(tiny, *random_batch(2), client, normalization=iv.CIFAR10)
    iv.save_observation(seen, path)
    with safetensors.safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["invlib"])
    of_old = ("lr", "local_steps", "epochs", "batch_size", "drop_last", "shuffle", "orders")
    header["protocol_settings"] = {name: header["protocol_settings"][name] for name in of_old}
    tensors = safetensors.torch.load_file(path)
    safetensors.torch.save_file(tensors, path, {"invlib": json.dumps(header)})
    same(iv.load_observation(path), seen)


def test_saved_buffers_come_back(tmp_path):
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 5))
    seen = iv.observe(net, *random_batch(2), iv.FedSGD(), normalization=iv.UNIT, training_mode=True)
    iv.save_observation(seen, tmp_path / "seen")
    found = iv.load_observation(tmp_path / "seen")
    same(found, seen)
    assert found.buffers.keys() == seen.buffers.keys()
    assert all(torch.equal(found.buffers[n], seen.buffers[n]) for n in seen.buffers)
    found.validate(net)


def test_a_protocol_of_ones_own_cannot_be_saved(seen, tmp_path):
    from dataclasses import replace

    class Mine(iv.FedSGD):
        pass

    class Doubling(iv.FedSGD):
        def __call__(self, *args, **kwargs):
            return {name: 2 * g for name, g in super().__call__(*args, **kwargs).items()}

    iv.save_observation(replace(seen, protocol=Mine()), tmp_path / "fine")
    assert iv.load_observation(tmp_path / "fine").protocol == iv.FedSGD()
    with pytest.raises(ObservationError, match="protocol is Doubling; expected FedSGD or FedAvg"):
        iv.save_observation(replace(seen, protocol=Doubling()), tmp_path / "bad")
    with pytest.raises(ObservationError, match="protocol is function; expected FedSGD or FedAvg"):
        iv.save_observation(replace(seen, protocol=lambda: None), tmp_path / "bad")


def test_a_folder_that_is_not_there_is_named(seen, tmp_path):
    with pytest.raises(DataError, match="cannot be written"):
        iv.save_observation(seen, tmp_path / "no" / "where")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match="no observation at"):
        iv.load_observation(tmp_path / "nothing")


@pytest.mark.parametrize("keep", [0, 3, 100, 2000])
def test_a_cut_file_is_named(seen, tmp_path, keep):
    path = tmp_path / "seen"
    iv.save_observation(seen, path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DataError, match="corrupt"):
        iv.load_observation(path)


def test_another_format_is_named(tmp_path):
    path = tmp_path / "seen"
    safetensors.torch.save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(DataError, match="has format None; expected 'invlib-observation-1'"):
        iv.load_observation(path)
    safetensors.torch.save_file({"a": torch.zeros(1)}, path, metadata={"invlib": json.dumps({"format": "x"})})
    with pytest.raises(DataError, match="has format 'x'"):
        iv.load_observation(path)


@pytest.mark.parametrize(
    "change",
    [
        *({"protocol": value} for value in ("Mine", None, 3, [])),
        *({"protocol_settings": value} for value in (None, 3, {"lr": "fast"}, {"momentum": 1}, [1])),
        *({"num_images": value} for value in (0, -1, 2.5, "2", True, 10**12, None, [2])),
        *(
            {"image_shape": value}
            for value in (None, 3, [8, 8], [3, 8, -8], [3, 8, 10**12], "388", [3, 8, 8.0])
        ),
        *({"normalization": value} for value in (None, "unit", {}, {"mean": [0.0]}, {"mean": 0, "std": 1})),
        *(
            {"normalization": {"mean": m, "std": s}}
            for m, s in (("a", "b"), ([0.0] * 2, [1.0] * 2), ([0.0], [0.0]))
        ),
        {"normalization": {"mean": [float("nan")], "std": [1.0]}},
        *({"order": value} for value in (None, 3, ["0.weight"], ["no"], [[]])),
        *({"training_mode": value} for value in (None, 1, "yes")),
        *({key: ...} for key in ("protocol", "protocol_settings", "num_images", "image_shape", "order")),
        *({key: ...} for key in ("normalization", "training_mode")),
    ],
    ids=str,
)
def test_a_header_that_is_half_valid_is_named(seen, tmp_path, change):
    path = tmp_path / "seen"
    iv.save_observation(seen, path)
    header, tensors = opened(path)
    header = {key: value for key, value in (header | change).items() if value is not ...}
    safetensors.torch.save_file(tensors, path, metadata={"invlib": json.dumps(header)})
    with pytest.raises(DataError, match=r"seen holds no whole observation"):
        iv.load_observation(path)


@pytest.mark.parametrize("header", ["[]", "3", "null", "[" * 10**5, "{", '{"format": [1]}'])
def test_a_header_of_another_kind_is_named(tmp_path, header):
    safetensors.torch.save_file({"a": torch.zeros(1)}, tmp_path / "seen", metadata={"invlib": header})
    with pytest.raises(DataError, match=r"seen (has format|is corrupt)"):
        iv.load_observation(tmp_path / "seen")


@pytest.mark.parametrize("labels", [torch.zeros(1), torch.zeros(())])
def test_labels_of_a_file_are_checked(seen, tmp_path, labels):
    path = tmp_path / "seen"
    iv.save_observation(seen, path)
    header, tensors = opened(path)
    safetensors.torch.save_file(tensors | {"labels": labels}, path, metadata={"invlib": json.dumps(header)})
    with pytest.raises(DataError, match="holds no whole observation: labels"):
        iv.load_observation(path)


def opened(path):
    with safetensors.safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["invlib"]), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def test_an_observation_is_private_and_nothing_is_left_where_it_cannot_be_written(seen, tmp_path):
    iv.save_observation(seen, tmp_path / "seen")
    assert (tmp_path / "seen").stat().st_mode & 0o777 == 0o600
    (tmp_path / "folder").mkdir()
    with pytest.raises(DataError, match="is a folder; expected a file"):
        iv.save_observation(seen, tmp_path / "folder")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder", "seen"]


def test_one_tensor_under_two_names_is_saved_twice(seen, tmp_path):
    from dataclasses import replace

    tied = replace(seen, buffers={"a": seen.update["0.weight"], "b": seen.update["0.weight"]})
    iv.save_observation(tied, tmp_path / "seen")
    found = iv.load_observation(tmp_path / "seen")
    assert torch.equal(found.buffers["a"], seen.update["0.weight"])
    assert torch.equal(found.buffers["b"], seen.update["0.weight"])
