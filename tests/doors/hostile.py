"""Hostile inputs: settings, models, updates, files, options that are wrong, and what the library says to each.

``python -m tests.doors.hostile`` runs all of them, prints what was not an error by name, and a table; its exit
status is 1 where one of them hung, changed global state, left a file, was taken in silence or raised a
foreign error. With words behind it, it runs those that have the words in their names.
"""

# ruff: noqa: E501

from __future__ import annotations

import contextlib
import copy
import io
import itertools
import json
import os
import random
import signal
import struct
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import invlib as iv
from invlib import cli
from invlib.errors import DoubtWarning, InvlibError
from tests.conftest import build_tiny, random_batch

SECONDS = 60  # after which a case hangs
NAN, INF = float("nan"), float("inf")


@dataclass(frozen=True, kw_only=True)
class Case:
    """A wrong input.

    Args:
        name: group and what is wrong.
        run: what is called with it, in an empty folder.
        right: of what is returned, whether it is right after all; None where nothing can be.
    """

    name: str
    run: Callable[[], Any]
    right: Callable[[Any], bool] | None = None


# --- settings -------------------------------------------------------------------------------------------------

COUNTS = (0, -1, 1.5, NAN, "3", True, [2])
NUMBERS = (NAN, INF, -1.0, "0.1", None, [0.1])
KINDS = ("none of these", 3, None, object)


def settings() -> Iterator[Case]:
    """Settings out of range, of another type, classes for instances, functions of the wrong arity."""
    best, matching = iv.best, iv.GradientMatching
    counts = {
        "GradientMatching": (
            matching,
            ("steps", "restarts", "record_every", "median_every", "patience", "chunk"),
        ),
        "best": (best, ("evaluations", "restarts")),
        "ForwardMatching": (iv.ForwardMatching, ("steps", "restarts")),
        "recursive_inversion": (iv.recursive_inversion, ("iterations",)),
        "Frames": (iv.Frames, ("every",)),
        "LBFGS": (iv.LBFGS, ("max_iter", "history_size")),
    }
    for kind, (make, names) in counts.items():
        for name, value in itertools.product(names, COUNTS):
            yield Case(
                name=f"setting {kind} {name}={value!r}", run=lambda m=make, n=name, v=value: m(**{n: v})
            )
    numbers = {
        "Adam": (iv.Adam, ("lr", "eps")),
        "SGD": (iv.SGD, ("lr", "momentum")),
        "FedAvg": (lambda **k: iv.FedAvg(local_steps=1, **k), ("lr",)),
        "inverting_gradients": (iv.inverting_gradients, ("tv",)),
        "best": (best, ("tv", "natural")),
        "fully_connected": (iv.fully_connected, ("tolerance",)),
        "GradientMatching": (matching, ("fading",)),
        "Smoothing": (iv.Smoothing, ("start", "end")),
    }
    for kind, (make, names) in numbers.items():
        for name, value in itertools.product(names, NUMBERS):
            yield Case(
                name=f"setting {kind} {name}={value!r}", run=lambda m=make, n=name, v=value: m(**{n: v})
            )
    for name in ("labels", "keep", "engine", "precision", "init", "optimizer", "objective", "layers", "loss"):
        for value in KINDS:
            if (name, value) not in (("loss", None),):
                yield Case(
                    name=f"setting GradientMatching {name}={value!r}",
                    run=lambda n=name, v=value: iv.GradientMatching(**{n: v}),
                )
    odd: dict[str, Callable[[], Any]] = {
        "best shifts=1.5": lambda: best(shifts=1.5),
        "best shifts=-1": lambda: best(shifts=-1),
        "optimizer is a class": lambda: matching(optimizer=iv.Adam),
        "decay is a class": lambda: matching(decay=iv.StepDecay),
        "coordinates is a class": lambda: matching(coordinates=iv.NaturalImages),
        "smoothing is a number": lambda: matching(smoothing=3.0),
        "objective of one argument": lambda: matching(objective=lambda candidate: candidate[0].sum()),
        "loss of one argument": lambda: matching(loss=lambda logits: logits.sum()),
        "prior without a weight": lambda: matching(priors=(iv.priors.total_variation,)),
        "prior of a negative weight": lambda: matching(priors=((-1.0, iv.priors.total_variation),)),
        "prior of NaN": lambda: matching(priors=((NAN, iv.priors.total_variation),)),
        "prior of two arguments": lambda: matching(priors=((1.0, lambda a, b: a),)),
        "priors are a number": lambda: matching(priors=0.1),
        "10**10 restarts": lambda: iv.inverting_gradients(restarts=10**10, steps=1)(*one()),
        "10**10 restarts of best": lambda: iv.best(restarts=10**10, evaluations=1000)(*conv()),
        "init in 0..255": lambda: matching(init=torch.full((1, 3, 8, 8), 255.0), steps=1)(*one()),
        "init of NaN": lambda: matching(init=torch.full((1, 3, 8, 8), NAN), steps=1)(*one()),
        "init of another shape": lambda: matching(init=torch.zeros(1, 3, 9, 9), steps=1)(*one()),
        "a callback that is none": lambda: matching(steps=1)(*one(), callback=3),
        "a generator that is none": lambda: matching(steps=1)(*one(), generator=0),
        "both evaluations and steps": lambda: best(evaluations=2, steps=2),
        "FedAvg without steps": lambda: iv.FedAvg(lr=0.1),
        "FedAvg with both": lambda: iv.FedAvg(lr=0.1, local_steps=1, epochs=1),
        "FedAvg epochs=1.5": lambda: iv.FedAvg(lr=0.1, epochs=1.5),
        "FedAvg batch_size=0": lambda: iv.FedAvg(lr=0.1, epochs=1, batch_size=0),
        "FedAvg local_steps='3'": lambda: iv.FedAvg(lr=0.1, local_steps="3"),
        "FedAvg of larger minibatches": lambda: see(protocol=iv.FedAvg(lr=0.1, epochs=1, batch_size=4)),
        "Normalization of NaN": lambda: iv.Normalization(mean=(NAN,), std=(1.0,)),
        "Normalization of infinity": lambda: iv.Normalization(mean=(0.0,), std=(INF,)),
        "Normalization of zero": lambda: iv.Normalization(mean=(0.0,), std=(0.0,)),
        "Normalization of text": lambda: iv.Normalization(mean=("a",), std=(1.0,)),
        "Normalization of numbers": lambda: iv.Normalization(mean=0.5, std=0.5),
        "Normalization of two lengths": lambda: iv.Normalization(mean=(0.0, 0.0), std=(1.0,)),
        "Layers of text": lambda: iv.Layers(which="some"),
        "StepDecay of NaN": lambda: iv.StepDecay(gamma=NAN),
        "a model of no name": lambda: iv.models.build("NoNet"),
        "a model of -3 classes": lambda: iv.models.build("LeNetZhu", num_classes=-3),
        "a model of 10**12 classes": lambda: iv.models.build("LeNetZhu", num_classes=10**12),
        "a model of text classes": lambda: iv.models.build("LeNetZhu", num_classes="10"),
        "a model of a huge seed": lambda: iv.models.build("LeNetZhu", num_classes=10, seed=2**70),
        "weights that leave the folder": lambda: iv.models.build("LeNetZhu", weights="../../../etc/passwd"),
        "weights of no name": lambda: iv.models.build("LeNetZhu", weights="none"),
        "samples of no name": lambda: iv.data.samples("none"),
        "samples 10**9": lambda: iv.data.samples("photos32", indices=[10**9]),
        "samples of text": lambda: iv.data.samples("photos32", indices=["a"]),
        "folder(size=0)": lambda: iv.data.folder(".", size=0),
        "folder(size=1.5)": lambda: iv.data.folder(".", size=1.5),
        "attack_many of nothing": lambda: iv.attack_many(matching(), build_tiny(), []),
    }  # fmt: skip
    for name, run in odd.items():
        yield Case(name=f"setting {name}", run=run)


# --- models ---------------------------------------------------------------------------------------------------


class Forward(nn.Module):
    """A network whose forward pass ends in a function."""

    def __init__(self, last: Callable[[torch.Tensor], Any]) -> None:
        super().__init__()
        self.net, self.last = build_tiny(), last

    def forward(self, x: torch.Tensor) -> Any:
        """Run it."""
        return self.last(self.net(x))


def models() -> Iterator[Case]:
    """Models that are none, or whose forward pass gives no logits."""
    x, y = random_batch()
    bad: dict[str, Callable[[], Any]] = {
        "None": lambda: None,
        "text": lambda: "LeNetZhu",
        "a class": lambda: nn.Linear,
        "a function": lambda: torch.relu,
        "a state dict": lambda: build_tiny().state_dict(),
        "empty": nn.Sequential,
        "frozen": lambda: build_tiny().requires_grad_(False),
        "on the meta device": lambda: build_tiny().to("meta"),
        "lazy": lambda: nn.Sequential(nn.Flatten(), nn.LazyLinear(5)),
        "scripted": lambda: torch.jit.script(build_tiny()),
        "traced": lambda: torch.jit.trace(build_tiny(), x),
        "a map": lambda: _made(lambda: nn.Conv2d(3, 5, 3)),
        "of one number": lambda: Forward(lambda z: z.sum()),
        "of None": lambda: Forward(lambda z: None),
        "of text": lambda: Forward(lambda z: "logits"),
        "of an empty tuple": lambda: Forward(lambda z: ()),
        "of two dict entries": lambda: Forward(lambda z: {"a": z, "b": z}),
        "of NumPy": lambda: Forward(lambda z: z.detach().numpy()),
        "of whole numbers": lambda: Forward(lambda z: z.argmax(1, keepdim=True)),
        "of NaN": lambda: Forward(lambda z: z * NAN),
        "of no gradient": lambda: Forward(lambda z: z.detach()),
        "of complex numbers": lambda: Forward(lambda z: z.to(torch.complex64)),
        "that raises": lambda: Forward(lambda z: 1 / 0),
        "that raises KeyError": lambda: Forward(lambda z: {}["a"]),
        "that raises AttributeError": lambda: Forward(lambda z: z.none),
        "of another image shape": lambda: _made(lambda: nn.Sequential(nn.Flatten(), nn.Linear(10, 5))),
        "of NaN weights": lambda: _filled(NAN),
        "of infinite weights": lambda: _filled(INF),
        "complex weights": lambda: build_tiny().to(torch.complex64),
        "of one class": lambda: _made(lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 1))),
    }
    for name, build in bad.items():
        yield Case(
            name=f"model {name}, observe",
            run=lambda b=build: iv.observe(b(), x, y * 0, iv.FedSGD(), normalization=iv.CIFAR10),
        )
        yield Case(
            name=f"model {name}, attack",
            run=lambda b=build: iv.inverting_gradients(steps=2)(b(), see()),
        )


def _made(build: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        return build()


def _filled(value: float) -> nn.Module:
    net = build_tiny()
    with torch.no_grad():
        next(iter(net.parameters())).fill_(value)
    return net


# --- updates --------------------------------------------------------------------------------------------------


def see(**more: Any) -> iv.Observation:
    """Return an honest observation of the tiny network."""
    x, y = random_batch()
    protocol = more.pop("protocol", iv.FedSGD())
    return iv.observe(build_tiny(), x, y, protocol, normalization=iv.CIFAR10, **more)


def one() -> tuple[nn.Module, iv.Observation]:
    """Return the tiny network and an observation of it."""
    return build_tiny(), see()


def conv() -> tuple[nn.Module, iv.Observation]:
    """Return a network that no closed form applies to, and an observation of it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.MaxPool2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(36, 5))
    x, y = random_batch()
    return net, iv.observe(net, x, y, iv.FedSGD(), normalization=iv.CIFAR10)


def updates() -> Iterator[Case]:
    """Updates, facts and private batches that contradict the model or each other."""
    net, seen, (x, y) = build_tiny(), see(), random_batch()
    parts = list(seen.update.values())
    facts: dict[str, Any] = {"num_images": 1, "image_shape": (3, 8, 8), "normalization": iv.CIFAR10}

    def sent(gradients: Any = parts, **more: Any) -> Any:
        return iv.inverting_gradients(steps=2)(net, iv.from_gradients(net, gradients, **{**facts, **more}))

    entries: dict[str, Any] = {
        "None": None, "text": "a", "a number": 1.0, "an object": object(), "a dict": {}, "complex": 1j * parts[0],
        "NaN": parts[0] * NAN, "infinity": parts[0] * INF, "another shape": parts[0][:1], "one axis more": parts[0][None],
        "empty": torch.empty(0), "meta": parts[0].to("meta"), "ragged": [[1.0], [1.0, 2.0]], "strings": np.array(["a"]),
        "objects": np.array([None]), "times 1e30": parts[0] * 1e30, "times 1e9": parts[0] * 1e9,
        "a parameter's class": nn.Parameter, "a coroutine": (k for k in range(3)),
    }  # fmt: skip
    for name, value in entries.items():
        right = (lambda _: True) if name == "None" else None  # is taken as zeros, as torch gives it
        yield Case(name=f"update entry {name}", run=lambda v=value: sent([v, *parts[1:]]), right=right)
    lists: dict[str, Any] = {
        "empty": [], "too short": parts[:2], "too long": [*parts, *parts[:1]], "reversed": parts[::-1], "a tensor": parts[0],
        "text": "abcd", "None": None, "a number": 3, "all None": [None] * 4, "all zero": [0 * p for p in parts],
        "of NaN": [p * NAN for p in parts], "a mapping": dict(seen.update), "times 1e8": [p * 1e8 for p in parts],
    }  # fmt: skip
    for name, value in lists.items():
        yield Case(name=f"update {name}", run=lambda v=value: sent(v))
    for name, values in {
        "num_images": (0, -1, 1.5, "1", None, 10**12, True, NAN),
        "vocabulary": ("abc", [1], 3, ["a"], {"a": 0}),
        "image_shape": ((192,), (8, 8), (3, 8), 3, None, (3, 0, 8), (3, 8.5, 8), (3, -8, 8), (10**6,) * 3, "388", (3, 9, 9)),
        "normalization": (None, "CIFAR10", (0.5, 0.5), ((0.5,),), ((0.5, 0.5), (1.0, 1.0)), ((NAN,), (1.0,)), iv.MNIST.mean, object()),
        "labels": ([1, 2], ["a"], 3, [-1], [99], torch.tensor([NAN]), torch.tensor([[0.2] * 5]) * 3, torch.tensor([0.5]), object()),
        "protocol": (iv.FedSGD, "FedSGD", 3, iv.FedAvg),
        "training_mode": ("yes", 1, None),
        "sent": ("some", {"none": [True]}, {"0.bias": [True]}, 3),
        "buffers": ([1, 2], "a", {"x": "y"}),
    }.items():  # fmt: skip
        for value in values:
            right = (lambda r: r.labels.tolist() == [1]) if name == "labels" else None
            yield Case(
                name=f"fact {name}={_short(value)}", run=lambda n=name, v=value: sent(**{n: v}), right=right
            )
    trained = copy.deepcopy(net)
    with torch.no_grad():
        for p in trained.parameters():
            p.add_(0.01)
    before, after = net.state_dict(), trained.state_dict()
    average = {**facts, "protocol": iv.FedAvg(lr=0.1, local_steps=2), "labels": y}
    dicts: dict[str, Callable[[], Any]] = {
        "the trained model": lambda: iv.from_state_dicts(trained, before, after, **average),
        "swapped": lambda: iv.from_state_dicts(net, after, before, **average),
        "before is after": lambda: iv.from_state_dicts(net, before, before, **average),
        "another model": lambda: iv.from_state_dicts(conv()[0], before, after, **average),
        "fewer names": lambda: iv.from_state_dicts(net, before, dict(list(after.items())[1:]), **average),
        "a list and too short": lambda: iv.from_state_dicts(net, list(before.values())[1:], list(after.values()), **average),
        "None": lambda: iv.from_state_dicts(net, before, None, **average),
        "a path": lambda: iv.from_state_dicts(net, "before.pth", "after.pth", **average),
        "a gradient's protocol": lambda: iv.from_state_dicts(net, before, after, **{**average, "protocol": iv.FedSGD()}),
        "another shape": lambda: iv.from_state_dicts(net, before, {**after, "0.bias": torch.zeros(1)}, **average),
        "NaN": lambda: iv.from_state_dicts(net, before, {**after, "0.bias": torch.full((6,), NAN)}, **average),
        "text for a tensor": lambda: iv.from_state_dicts(net, before, {**after, "0.bias": "x"}, **average),
    }  # fmt: skip
    for name, run in dicts.items():
        yield Case(name=f"state dict {name}", run=run)
    batches: dict[str, tuple[Any, Any]] = {
        "of NaN": (x * NAN, y), "0 to 255": (x * 255, y), "normalised": (iv.CIFAR10.encode(x), y), "three axes": (x[0], y),
        "no images": (x[:0], y[:0]), "text": ("a", y), "None": (None, y), "whole numbers": (x.long(), y), "channels last": (x.permute(0, 2, 3, 1), y),
        "two labels": (x, y.repeat(2)), "label 99": (x, y + 99), "label -1": (x, y - 99), "half a label": (x, y + 0.5),
        "a label of text": (x, ["a"]), "no label": (x, None), "complex": (x * 1j, y), "a list of arrays": ([np.zeros((3, 8, 8)), np.zeros((3, 9, 9))], y),
    }  # fmt: skip
    for name, (images, labels) in batches.items():
        yield Case(
            name=f"batch {name}",
            run=lambda i=images, t=labels: iv.observe(net, i, t, iv.FedSGD(), normalization=iv.CIFAR10),
        )
        if name not in ("two labels", "label 99", "label -1", "half a label", "a label of text", "no label"):
            found = iv.inverting_gradients(steps=1)(net, seen)
            yield Case(name=f"truth {name}", run=lambda i=images, f=found: iv.evaluate(f, i))
    losses: dict[str, Any] = {
        "of no reduction": lambda o, t: F.cross_entropy(o, t, reduction="none"), "a constant": lambda o, t: 3.0,
        "None": None, "text": "cross_entropy", "BCE on classes": F.binary_cross_entropy_with_logits, "of one argument": lambda o: o.sum(),
    }  # fmt: skip
    for name, loss in losses.items():
        yield Case(
            name=f"loss {name}, observe",
            run=lambda f=loss: iv.observe(net, x, y, iv.FedSGD(), normalization=iv.CIFAR10, loss=f),
        )
        if loss is not None:
            yield Case(
                name=f"loss {name}, attack",
                run=lambda f=loss: iv.inverting_gradients(steps=1, loss=f)(net, seen),
            )


def _short(value: Any) -> str:
    words = f"tensor {value.tolist()}" if isinstance(value, torch.Tensor) else repr(value)
    return words.split(" at 0x")[0][:50]


# --- files ----------------------------------------------------------------------------------------------------


def files() -> Iterator[Case]:
    """Files that are truncated, foreign, half-valid, of absurd sizes, folders, or in folders that are not there."""
    good = Path("good.safetensors")

    def saved(change: Callable[[bytes], bytes]) -> Callable[[], Any]:
        def run() -> Any:
            iv.save_observation(see(), good)
            good.write_bytes(change(good.read_bytes()))
            try:
                return iv.load_observation(good)
            finally:
                good.unlink()

        return run

    def header(**changes: Any) -> Callable[[], Any]:
        def run() -> Any:
            seen = see()
            iv.save_observation(seen, good)
            size = struct.unpack("<Q", good.read_bytes()[:8])[0]
            known = json.loads(json.loads(good.read_bytes()[8 : 8 + size])["__metadata__"]["invlib"])
            tensors = safetensors.torch.load_file(good)
            for key, value in changes.items():
                known.pop(key) if value is ... else known.update({key: value})
            safetensors.torch.save_file(tensors, good, {"invlib": json.dumps(known)})
            try:
                return iv.inverting_gradients(steps=1)(build_tiny(), iv.load_observation(good))
            finally:
                good.unlink()

        return run

    for name, change in {
        "empty": lambda b: b"", "of eight bytes": lambda b: b[:8], "one byte short": lambda b: b[:-1], "half": lambda b: b[: len(b) // 2],
        "with bytes behind": lambda b: b + b"x", "of text": lambda b: b"hello" * 9, "of zeros": lambda b: bytes(len(b)),
        "a pickle": lambda b: b"\x80\x04}q\x00.", "a header of 2**63": lambda b: struct.pack("<Q", 2**63) + b[8:],
        "a header of 100 MB": lambda b: struct.pack("<Q", 10**8) + b[8:], "a zip": lambda b: b"PK\x03\x04" + b,
    }.items():  # fmt: skip
        yield Case(name=f"observation file {name}", run=saved(change))
    for key, values in {
        "format": (..., "other", 3, None), "protocol": (..., "Other", None, 3, "__class__"), "order": (..., ["x"], 3, None, "ab", []),
        "num_images": (..., 0, "1", 10**12, 1.5, None), "image_shape": (..., [8, 8], "a", None, [3, 8, 10**9]),
        "normalization": (..., {}, 3, None, {"mean": ["a"], "std": [1]}, {"mean": [0.5]}), "protocol_settings": (..., {"lr": 1}, 3, None, []),
        "training_mode": (..., "yes", None),
    }.items():  # fmt: skip
        for value in values:
            yield Case(name=f"observation header {key}={value!r}", run=header(**{key: value}))
    yield Case(name="observation file missing", run=lambda: iv.load_observation("none"))
    yield Case(name="observation file a folder", run=lambda: iv.load_observation("."))
    yield Case(name="observation to a folder", run=lambda: iv.save_observation(see(), "."))
    yield Case(name="observation to no folder", run=lambda: iv.save_observation(see(), "none/x"))

    def checkpoint(content: bytes | None, name: str = "c") -> Callable[[], Any]:
        def run() -> Any:
            path = Path(name)
            if content is not None:
                path.write_bytes(content)
            try:
                return iv.inverting_gradients(steps=1)(*one(), checkpoint=path)
            finally:
                if content is not None:
                    path.unlink()

        return run

    for name, content in {
        "empty": b"",
        "text": b"hello",
        "a pickle": b"\x80\x04}q\x00.",
        "a zip": b"PK\x03\x04" + bytes(99),
    }.items():
        yield Case(name=f"checkpoint {name}", run=checkpoint(content))
    yield Case(name="checkpoint a folder", run=checkpoint(None, "."))
    yield Case(name="checkpoint in no folder", run=checkpoint(None, "none/c"))
    yield Case(
        name="checkpoint a number", run=lambda: iv.inverting_gradients(steps=1)(*one(), checkpoint=3.5)
    )

    def arrays(**content: Any) -> Callable[[], Any]:
        def run() -> Any:
            os.environ["INVLIB_DATA"] = os.getcwd()
            np.savez("cifar10_test.npz", **content)
            try:
                return iv.data.load("CIFAR10", split="test", indices=[0], download=False)
            finally:
                Path("cifar10_test.npz").unlink()
                del os.environ["INVLIB_DATA"]

        return run

    images, classes = np.zeros((4, 32, 32, 3), np.uint8), np.zeros(4, np.int64)
    for name, content in {
        "without y": {"x": images}, "without x": {"y": classes}, "channels first": {"x": images.transpose(0, 3, 1, 2), "y": classes},
        "two channels": {"x": images[..., :2], "y": classes}, "no images": {"x": images[:0], "y": classes[:0]}, "negative y": {"x": images, "y": classes - 1},
        "y of 1000": {"x": images, "y": classes + 1000}, "float y": {"x": images, "y": classes + 0.5}, "float x": {"x": images / 255.0, "y": classes},
        "fewer y": {"x": images, "y": classes[:2]}, "objects": {"x": np.array([None] * 4), "y": classes}, "text": {"x": np.array("a"), "y": classes},
    }.items():  # fmt: skip
        yield Case(name=f"npz {name}", run=arrays(**content))

    def raw(content: bytes, name: str, call: Callable[[Path], Any]) -> Callable[[], Any]:
        def run() -> Any:
            folder = Path("f") / "cat"
            folder.mkdir(parents=True)
            (folder / name).write_bytes(content)
            try:
                return call(folder / name)
            finally:
                (folder / name).unlink()
                folder.rmdir()
                folder.parent.rmdir()

        return run

    picture = io.BytesIO()
    Image.new("RGB", (16, 16)).save(picture, "png")
    png = picture.getvalue()
    for name, content in {
        "empty.png": b"", "text.png": b"hello", "cut.png": png[:40], "bomb.png": png[:16] + struct.pack(">II", 60000, 60000) + png[24:],
        "cut.jpg": b"\xff\xd8\xff\xe0" + bytes(30), "gif.gif": b"GIF89a" + bytes(9), "letters.ppm": b"P3 a b c", "page.png": b"<html></html>",
    }.items():  # fmt: skip
        yield Case(
            name=f"image {name}", run=raw(content, name, lambda p: iv.data.folder(p.parent.parent, size=8))
        )
    for name, content in {
        "empty.safetensors": b"", "text.safetensors": b"hello", "pickle.pth": b"\x80\x04}q\x00.", "text.pth": b"hello", "zip.pth": b"PK\x03\x04" + bytes(50),
        "huge.safetensors": struct.pack("<Q", 2**62), "none.onnx": b"x",
    }.items():  # fmt: skip
        yield Case(
            name=f"weights {name}",
            run=raw(content, name, lambda p: iv.models.build("LeNetZhu", num_classes=10, weights=p)),
        )


# --- options --------------------------------------------------------------------------------------------------

OPTIONS = """
| nonsense | --none | train | train --model NoNet --dataset CIFAR10 | train --model LeNetZhu --dataset None
| train --model LeNetZhu --dataset CIFAR10 --epochs -1 | train --model LeNetZhu --dataset CIFAR10 --lr -1
| train --model LeNetZhu --dataset CIFAR10 --lr nan | train --model LeNetZhu --dataset CIFAR10 --device foo
| train --model LeNetZhu --dataset CIFAR10 --device meta | train --model LeNetZhu --dataset CIFAR10 --out /dev/null/x.safetensors
| train --model LeNetZhu --dataset CIFAR10 --out . | reconstruct-image --model NoNet | reconstruct-image --dataset None
| reconstruct-image --num_images 0 --target_id -1 | reconstruct-image --num_images -3 --target_id -1
| reconstruct-image --num_images 10**9 --target_id -1 | reconstruct-image --target_id x | reconstruct-image --restarts 0 --target_id -1
| reconstruct-image --restarts 10000000000 --target_id -1 --model LeNetZhu --optim ours | reconstruct-image --iterations 0 --target_id -1
| reconstruct-image --iterations 1.5 | reconstruct-image --optim foo | reconstruct-image --cost_fn foo --target_id -1
| reconstruct-image --indices foo --target_id -1 | reconstruct-image --weights foo --target_id -1 | reconstruct-image --optimizer foo --target_id -1
| reconstruct-image --init foo --target_id -1 | reconstruct-image --tv nan --target_id -1 | reconstruct-image --tv -1 --target_id -1
| reconstruct-image --lr nan --target_id -1 | reconstruct-image --lr -1 --target_id -1 --optim ours | reconstruct-image --local_lr nan --accumulation 2 --target_id -1
| reconstruct-image --accumulation -2 --target_id -1 | reconstruct-image --batch_size -1 --accumulation 2 --target_id -1
| reconstruct-image --dtype int8 --target_id -1 | reconstruct-image --device foo --target_id -1 | reconstruct-image --device meta --target_id -1
| reconstruct-image --image_path /dev/null/x --save_image --target_id -1 --model LeNetZhu --iterations 1
| rec-mult --num_exp 0 --target_id -1 | rec-mult --num_exp -1 | rec-mult --num_exp x | rec-mult --name ../../x --target_id -1 --num_exp 1
| experiment | experiment none | experiment table1 --images 0 | experiment table1 --steps 0 | experiment table1 --first -1 --reduced
| experiment table1 --reduced --out /dev/full | experiment table1 --reduced --out . | experiment table1 --workers -1 --reduced
| experiment table1 --figure x.txt --reduced | experiment table1 --dataset None --reduced | experiment table1 --seed x
| evaluate | evaluate NoNet | evaluate --model NoNet --dataset CIFAR10 | models extra | data extra
"""


def options() -> Iterator[Case]:
    """Command lines with values that are out of range, unknown, or name places that cannot be written."""
    for line in OPTIONS.replace("\n", " ").split("|"):
        words = line.split()
        yield Case(name=f"options {' '.join(words)}", run=lambda w=words: _command(w))


def _command(words: list[str]) -> None:
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            status = cli.main(words)
        except SystemExit as end:
            status = int(end.code or 0)
    text = said.getvalue()
    if status == 2 and "Traceback" not in text:
        raise InvlibError(text.strip().splitlines()[-1])
    raise RuntimeError(f"status {status}: {text[-300:]}")


# --- what happened --------------------------------------------------------------------------------------------


def state() -> tuple[Any, ...]:
    """Return the global state of torch, NumPy and Python that no public call may change."""
    numbers = np.random.get_state()  # noqa: NPY002
    return (
        torch.random.get_rng_state().tolist(), numbers[1].tolist(), numbers[2], random.getstate(), torch.get_default_dtype(),
        torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_num_threads(), os.getcwd(),
        signal.getsignal(signal.SIGINT), os.environ.get("INVLIB_DATA"),
    )  # fmt: skip


class Hang(BaseException):
    """A case took too long."""


def outcome(case: Case) -> tuple[str, str]:
    """Run a case and say in a word what happened, and in a line why."""
    before = state()

    def stop(*_: Any) -> None:
        raise Hang

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            found = case.run()
        doubts = [str(w.message) for w in said if issubclass(w.category, DoubtWarning)]
        if case.right is not None and case.right(found):
            what, why = "right after all", ""
        elif doubts or getattr(found, "warnings", ()) or getattr(found, "status", "") == "non_finite":
            what, why = "said to be doubtful", (*doubts, getattr(found, "status", ""))[0]
        else:
            what, why = "SILENT", repr(found)[:100]
    except InvlibError as error:
        what, why = "named", str(error)
    except Hang:
        what, why = "HANG", ""
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        what, why = "FOREIGN", f"{type(error).__name__}: {error} ({Path(where.filename).name}:{where.lineno})"
    finally:
        signal.alarm(0)
    if state() != before:
        what = f"{what}, STATE CHANGED"
    if left := [str(path) for path in Path().rglob("*")]:
        what, why = f"{what}, FILES LEFT", f"{left}: {why}"
        for path in sorted(Path().rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
    return what, why


GROUPS = {"settings": settings, "models": models, "updates": updates, "files": files, "options": options}


def main(words: list[str]) -> int:
    """Run the cases, print what was not an error by name, and a table."""
    torch.set_num_threads(1)
    table: dict[str, Counter[str]] = {group: Counter() for group in GROUPS}
    home = os.getcwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            for group, cases in GROUPS.items():
                for case in cases():
                    if all(word in case.name for word in words):
                        what, why = outcome(case)
                        table[group][what] += 1
                        if what != "named" or "-v" in sys.argv:
                            print(f"{what:20} {case.name}: {' '.join(why.split())[:170]}", flush=True)
        finally:
            os.chdir(home)
    kinds = sorted({what for row in table.values() for what in row})
    print()
    print(f"{'':10}" + "".join(f"{kind:>22}" for kind in ("all", *kinds)))
    total: Counter[str] = sum(table.values(), Counter())
    for group, row in (*table.items(), ("all", total)):
        print(
            f"{group:10}" + "".join(f"{n:>22}" for n in (sum(row.values()), *(row[kind] for kind in kinds)))
        )
    return int(any(kind.isupper() or "," in kind for kind in total))


if __name__ == "__main__":
    sys.exit(main([word for word in sys.argv[1:] if word != "-v"]))
