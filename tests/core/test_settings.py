"""Settings of all classes and functions: what they take, and that anything else is refused by name."""

import dataclasses
import functools
import importlib
import inspect
import math
import pkgutil
import sys
from typing import Annotated, Any, Literal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import invlib as iv
from invlib import training
from invlib.attacks import starts
from invlib.attacks.analytic import FullyConnected
from invlib.attacks.auto import Best
from invlib.attacks.batches import Batching
from invlib.attacks.exact import ExactBatch
from invlib.attacks.patches import PatchEmbedding
from invlib.attacks.recursive import RecursiveInversion
from invlib.attacks.shifts import Shifting
from invlib.attacks.tokens import TokenEmbedding
from invlib.auditing.protections import Noise
from invlib.core.normalization import as_normalization
from invlib.errors import ConfigError
from invlib.integrations.opacus import Privacy
from invlib.legacy.config import AdamW
from invlib.legacy.costs import Listed
from invlib.settings import Checked, Count, Finite, expected


def number(value):
    """Whether a value is a finite number, of Python or NumPy."""
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, float, np.integer, np.floating)):
        return False
    return abs(value.item() if isinstance(value, np.generic) else value) <= sys.float_info.max


def whole(value):
    return number(value) and isinstance(value, (int, np.integer)) and abs(value) < 2**64


def takes(function, count):
    return getattr(function, "takes", None) == count


def pair(item):
    return lambda value: isinstance(value, (list, tuple)) and len(value) == 2 and all(map(item, value))


def each(item):
    return lambda value: isinstance(value, (list, tuple)) and all(map(item, value))


KINDS = {
    "count": lambda v: whole(v) and v >= 1,
    "whole from 0": lambda v: whole(v) and v >= 0,
    "1 to a million": lambda v: whole(v) and 1 <= v <= 1_000_000,
    "1 to 4096": lambda v: whole(v) and 1 <= v <= 4096,
    "2 to 32": lambda v: whole(v) and 2 <= v <= 32,
    "finite": number,
    "positive": lambda v: number(v) and v > 0,
    "from 0": lambda v: number(v) and v >= 0,
    "[0, 1]": lambda v: number(v) and 0 <= v <= 1,
    "[0, 1)": lambda v: number(v) and 0 <= v < 1,
    "(0, 1]": lambda v: number(v) and 0 < v <= 1,
    "flag": lambda v: isinstance(v, (bool, np.bool_)),
    "function of 2": lambda v: takes(v, 2),
    "text": lambda v: isinstance(v, str),
    "nothing else": lambda v: False,
}
KINDS["two of [0, 1)"] = pair(KINDS["[0, 1)"])
KINDS["two positive"] = pair(KINDS["positive"])
KINDS["many positive"] = each(KINDS["positive"])
KINDS["many finite"] = each(number)
KINDS["ascending"] = lambda v: each(lambda a: number(a) and 0 < a < 1)(v) and list(v) == sorted(v)
KINDS["empty"] = lambda v: isinstance(v, (list, tuple)) and not v
KINDS |= {f"{name} or None": lambda v, kind=kind: v is None or kind(v) for name, kind in KINDS.items()}

# class → what it is made of where nothing is wrong, and what each field takes of the values below.
LR, SIGNED = {"lr": "positive"}, {"signed": "flag", "together": None}
CLASSES: dict[type, tuple[dict[str, Any], dict[str, str | None]]] = {
    iv.Adam: ({}, LR | SIGNED | {"betas": "two of [0, 1)", "eps": "from 0"}),
    AdamW: ({}, LR | SIGNED | {"betas": "two of [0, 1)", "eps": "from 0", "weight_decay": "from 0"}),
    iv.SGD: ({}, LR | SIGNED | {"momentum": "[0, 1)"}),
    iv.LBFGS: (
        {},
        LR
        | SIGNED
        | {"max_iter": "count", "max_eval": "count or None", "history_size": "count"}
        | {"tolerance_grad": "from 0", "tolerance_change": "from 0", "line_search": "nothing else or None"},
    ),
    iv.StepDecay: ({}, {"at": "ascending", "gamma": "(0, 1]"}),
    iv.CosineDecay: ({}, {"warmup": "whole from 0"}),
    iv.NaturalImages: (
        {},
        {"falloff": "from 0", "correlation": "[0, 1)", "mean": "[0, 1]", "contrast": "positive"},
    ),
    iv.Tiles: ({"side": 4}, {"side": "1 to 4096"}),
    iv.Smoothing: ({}, {"start": "positive", "end": "positive"}),
    iv.objectives.Masked: ({"objective": iv.objectives.l2}, {"objective": "function of 2"}),
    iv.Layers: (
        {"which": "first", "count": 2},
        {"which": "nothing else", "count": "count", "weights": "nothing else"},
    ),
    Listed: (
        {"tensors": (1,)},
        {"which": "nothing else", "count": None, "weights": "nothing else", "tensors": None},
    ),
    iv.priors.SmoothTotalVariation: ({"power": 1.0}, {"power": "positive", "opponents": "flag"}),
    iv.Normalization: ({"mean": (0.5, 0.5), "std": (1, 1)}, {"mean": None, "std": "two positive"}),
    iv.FedAvg: (
        {"lr": 0.1, "local_steps": 2},
        {"lr": None, "local_steps": "1 to a million", "epochs": "nothing else or None"}
        | {"batch_size": "count or None", "drop_last": "flag", "shuffle": "flag"}
        | {"orders": "nothing else or None", "optimizer": "nothing else", "momentum": "from 0"}
        | {"weight_decay": "from 0", "clip_norm": "positive or None", "proximal": "from 0"}
        # what another optimiser has, or momentum asks for, is in the tests of clients
        | dict.fromkeys(("dampening", "nesterov", "betas", "eps", "dropout")),
    ),
    iv.GradientMatching: (
        {},
        {"objective": "function of 2", "priors": "empty", "optimizer": "nothing else", "steps": "count"}
        | {"decay": "nothing else or None", "restarts": "count", "init": "nothing else", "box": "flag"}
        | {"layers": "nothing else", "labels": "nothing else", "loss": "function of 2"}
        | {"smoothing": "nothing else or None", "fading": "(0, 1]", "median_every": "count or None"}
        | {"coordinates": "nothing else or None", "keep": "nothing else", "tolerance": "finite or None"}
        | {"patience": "count or None", "chunk": "count or None", "prune": "flag", "engine": "nothing else"}
        | {"recompute": "flag or None", "precision": "nothing else", "record_every": "count"}
        | {"log_odds": "flag or None"},
    ),
    iv.ForwardMatching: (
        {},
        {"steps": "count", "restarts": "count", "lr": "positive", "tv": "two positive"},
    ),
    Best: (
        {"matching": iv.GradientMatching()},
        {"matching": "nothing else", "evaluations": "count", "tv": "from 0", "natural": "from 0"}
        | {"shifts": "whole from 0", "near_grey": "flag", "measured_smoothing": "flag"},
    ),
    FullyConnected: ({}, {"tolerance": "from 0", "agreement": "flag"}),
    ExactBatch: ({}, {"layer": "text or None", "seconds": "positive", "search": None}),
    PatchEmbedding: (
        {},
        {"tolerance": "from 0", "decay": "flag", "weight": "text or None", "positions": "text or None"},
    ),
    TokenEmbedding: (
        {},
        {"tokens": "text or None", "positions": "text or None", "method": "nothing else", "most": "count"},
    ),
    RecursiveInversion: ({}, {"tolerance": "from 0", "iterations": "count"}),
    Shifting: (
        {"search": iv.GradientMatching(), "places": ((0, 4),), "copies": 1, "stage": 1, "per_step": 1},
        {"search": "nothing else", "places": "empty", "copies": "count", "stage": "count"}
        | {"per_step": "count"},
    ),
    Batching: (
        {"search": iv.GradientMatching(), "places": ((0, 4),), "copies": 1, "stage": 1, "per_step": 1},
        {"search": "nothing else", "places": "empty", "copies": "whole from 0", "stage": "count"}
        | {"per_step": "count"},
    ),
    iv.defenses.PerExample: ({"clip": 1.0}, {"clip": "positive"}),
    iv.defenses.SecureAggregation: ({"clients": 2}, {"clients": "count", "client": None}),
    iv.defenses.Soteria: (
        {"layer": "fc"},
        {"layer": "text", "share": "(0, 1]", "client": None, "public": "flag"},
    ),
    iv.defenses.Mixup: ({}, {"alpha": "positive", "client": None}),
}
CLASSES |= {
    iv.Defended: ({"client": iv.FedSGD()}, {"client": None, "transforms": "empty", "public": "flag"}),
    iv.defenses.Clip: ({"norm": 1.0}, {"norm": "positive"}),
    iv.defenses.GaussianNoise: ({"sigma": 1.0}, {"sigma": "from 0"}),
    iv.defenses.LaplaceNoise: ({"sigma": 1.0}, {"sigma": "from 0"}),
    iv.defenses.TopK: ({"share": 0.5}, {"share": "(0, 1]"}),
    iv.defenses.Sign: ({}, {}),
    iv.defenses.Quantize: ({}, {"bits": "2 to 32"}),
    iv.defenses.Transport: ({}, {"dtype": "nothing else"}),
    iv.defenses.MaskLayer: ({"names": "fc"}, {"names": None}),
    Noise: ({"noise_multiplier": 1.0}, {"noise_multiplier": "positive", "rate": "(0, 1]", "steps": "count"}),
    Privacy: (
        {"clip_norm": 1.0, "noise_multiplier": 1.0, "batch_size": 8, "noise": 0.1},
        {
            **{"clip_norm": "positive", "noise_multiplier": "from 0", "batch_size": "count"},
            **{"noise": "from 0", "rate": "(0, 1]", "steps": "count or None"},
        },
    ),
}
NO_SETTINGS = {  # what flows, and classes without fields
    *(iv.Observation, iv.Reconstruction, iv.Progress, iv.Report, iv.Identified, iv.FedSGD),
    *(iv.optimizers.Variable, iv.analytic.LayerInput, iv.labels.LabelInference),
    *(iv.priors.Prediction, iv.priors.LastLayerInput, iv.priors.BatchNormStatistics),
    iv.priors.BatchStatistics,
}


def function_of(count):
    """A function that takes so many arguments by position."""
    made = {0: lambda: 0, 1: lambda a: 0, 2: lambda a, b: 0, 3: lambda a, b, c: 0}[count]
    made.takes = count
    return made


numbers = st.one_of(
    st.integers(-3, 5),
    st.integers(),
    st.floats(),
    st.sampled_from([0.5, 1.0, 1.5, math.nan, math.inf, -math.inf, 10**400, 2**64, 4096, 4097]),
    st.sampled_from([np.int64(3), np.int64(0), np.float32(0.5), np.float64(1.5), np.float32(np.nan)]),
    st.floats(0, 1),
)
things = st.one_of(
    st.sampled_from([None, True, False, np.bool_(True), b"1", {}, {"a": 1}, object(), nn.Linear(2, 2)]),
    st.sampled_from(["", "1", "nan", "word", torch.full((2,), 2.0), np.ones(2), iv.Adam, int, nn.Linear]),
    st.sampled_from([math, range(2), {0.5}, iv.StepDecay, iv.FedSGD()]),
    st.integers(0, 3).map(function_of),
)
items = st.lists(numbers | things, max_size=3)
hostile = st.one_of(numbers, things, items, items.map(tuple))

FIELDS = [
    pytest.param(cls, field, kind, id=f"{cls.__name__} {field}")
    for cls, (_, fields) in CLASSES.items()
    for field, kind in fields.items()
    if kind is not None
]


@pytest.mark.parametrize(("cls", "field", "kind"), FIELDS)
@settings(max_examples=30, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
@given(value=hostile)
def test_a_field_takes_what_it_should_and_names_itself_otherwise(cls, field, kind, value):
    made_of = CLASSES[cls][0] | {field: value}
    if KINDS[kind](value):
        kept = getattr(cls(**made_of), field)
        assert not isinstance(kept, (np.generic, list))
        assert kept == (tuple(value) if isinstance(value, list) else value)
        return
    with pytest.raises(ConfigError) as caught:
        cls(**made_of)
    assert str(caught.value).startswith(f"{cls.__name__} ")
    assert field in str(caught.value).split("; expected ")[0]
    assert "; expected " in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(("cls", "field", "kind"), FIELDS)
def test_the_usual_mistakes_are_refused_at_every_field(cls, field, kind):
    check = test_a_field_takes_what_it_should_and_names_itself_otherwise.hypothesis.inner_test
    for value in (
        math.nan,
        math.inf,
        -1,
        1.5,
        None,
        "word",
        iv.Adam,
        function_of(0),
        [None],
        np.float32(2.5),
    ):
        check(cls, field, kind, value)


def everything():
    for module in pkgutil.walk_packages(iv.__path__, "invlib."):
        if not module.name.endswith("__main__") and ".triton" not in module.name:
            importlib.import_module(module.name)


def descendants(cls):
    return {cls, *(below for child in cls.__subclasses__() for below in descendants(child))}


def test_the_table_has_every_class_of_settings_and_every_field():
    everything()
    own = {cls for cls in descendants(Checked) if cls.__module__.startswith("invlib.")}
    public = {
        thing
        for module in (iv, iv.objectives, iv.optimizers, iv.priors, iv.smoothing, iv.analytic, iv.labels)
        for name, thing in vars(module).items()
        if dataclasses.is_dataclass(thing) and isinstance(thing, type)
        if not name.startswith("_") and (module is iv or thing.__module__ == module.__name__)
    }
    named = {cls for cls in own if dataclasses.is_dataclass(cls) and not cls.__name__.startswith("_")}
    assert named | public == {*CLASSES, *NO_SETTINGS}
    for cls, (_, fields) in CLASSES.items():
        assert issubclass(cls, Checked), cls
        assert set(fields) == {field.name for field in dataclasses.fields(cls)}, cls


CALLS: dict[Any, dict[str, Any]] = {
    **{getattr(iv, name): {} for name in ("best", "inverting_gradients", "deep_leakage", "modern")},
    **{getattr(iv, name): {} for name in ("improved_deep_leakage", "client_privacy_leakage")},
    **{getattr(iv, name): {} for name in ("beyond_inferring", "see_through_gradients")},
    training.train: {
        "model_name": "LeNetZhu",
        **dict.fromkeys(("images", "val_images"), torch.zeros(1, 1, 8, 8)),
        **dict.fromkeys(("labels", "val_labels"), torch.zeros(1, dtype=torch.int64)),
        **{"normalization": iv.UNIT, "epochs": 1},
    },
    training.accuracy: {
        "model": nn.Linear(1, 1),
        "images": torch.zeros(1, 1),
        "labels": torch.zeros(1),
        "normalization": iv.UNIT,
    },
}
ARGUMENTS = [
    pytest.param(function, name, id=f"{function.__name__} {name}")
    for function in CALLS
    for name, parameter in inspect.signature(function).parameters.items()
    if parameter.kind is not parameter.VAR_KEYWORD
]


@pytest.mark.parametrize(("function", "name"), ARGUMENTS)
@pytest.mark.parametrize("value", [math.nan, -1.5, iv.Adam, function_of(1), {}])
def test_an_argument_names_itself_and_its_function(function, name, value):
    with pytest.raises(ConfigError, match=f"^{function.__name__} {name} is .*; expected "):
        function(**CALLS[function] | {name: value})


def test_what_python_says_of_arguments_that_are_missing_is_left_as_it_is():
    with pytest.raises(TypeError, match=r"inverting_gradients\(\) takes 0 positional arguments"):
        iv.inverting_gradients(3)


def test_numbers_of_numpy_and_lists_become_pythons():
    natural = iv.NaturalImages(mean=np.float32(0.5), falloff=2)
    assert type(natural.mean) is float
    assert type(natural.falloff) is int
    assert iv.Adam(betas=[np.float64(0.5), 0.9]).betas == (0.5, 0.9)
    assert iv.GradientMatching(priors=[[1, iv.priors.l2_norm]]).priors == ((1, iv.priors.l2_norm),)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: iv.Adam(lr=0), "Adam lr is 0; expected a positive number"),
        (lambda: iv.best(shifts=1.5), "best shifts is 1.5; expected a whole number of at least 0"),
        (
            lambda: iv.GradientMatching(optimizer=iv.Adam),
            "GradientMatching optimizer is Adam; expected an instance, Adam(), not the class Adam",
        ),
        (
            lambda: iv.GradientMatching(priors=((1.0, iv.priors.Prediction),)),
            "GradientMatching priors is ((1.0, Prediction),); expected an instance, Prediction(), not the "
            "class Prediction",
        ),
        (
            lambda: iv.GradientMatching(init=255 * torch.ones(1, 3, 8, 8)),
            "GradientMatching init is Tensor (1, 3, 8, 8); expected 'randn', 'rand' or 'zeros', a tensor of "
            "images in [0, 1] or Tiles",
        ),
        (
            lambda: iv.LBFGS(line_search="golden"),
            "LBFGS line_search is 'golden'; expected 'strong_wolfe' or None",
        ),
        (lambda: iv.modern(features=math.nan), "modern features is nan; expected a number from 0 on"),
        (
            lambda: iv.Normalization(mean=(0.5,), std=(math.nan,)),
            "Normalization std is (nan,); expected a tuple, each a positive number",
        ),
        (
            lambda: iv.Normalization(mean=(0.5, 0.5), std=(1.0, math.nan)),
            "Normalization std is (1.0, nan); expected a tuple, each a positive number",
        ),
        (lambda: iv.Frames(every=0), "Frames every is 0; expected a whole number of at least 1"),
        (
            lambda: iv.models.build("LeNetZhu", seed=2**64),
            f"build seed is {2**64}; expected a whole number of 64 bits or None",
        ),
    ],
)
def test_an_error_names_thing_value_and_expectation(make, message):
    with pytest.raises(ConfigError) as caught:
        make()
    assert str(caught.value) == message


def weighed(inputs, weight=1.0, *, width=1.0):
    return inputs


@pytest.mark.parametrize("loss", [F.cross_entropy, nn.CrossEntropyLoss(), functools.partial(F.cross_entropy)])
def test_losses_and_priors_of_all_kinds_are_taken(loss):
    made = iv.GradientMatching(loss=loss, priors=((0.5, weighed), (1, functools.partial(weighed, width=2))))
    assert made.loss is loss


def test_an_optimizer_and_a_schedule_of_ones_own_are_taken():
    class Own:
        together = True

        def init(self, values):
            return {}

        def step(self, values, variables, state, evaluate, factor):
            pass

        def factor(self, step, steps):
            return 1.0

    own = Own()
    made = iv.GradientMatching(optimizer=own, decay=own)
    assert made.optimizer is own
    assert made.decay is own


def test_a_class_of_ones_own_is_checked_as_far_as_its_types_are_known():
    class Local:
        pass

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Own(iv.Adam):
        extra: "Local" = 3  # type: ignore[assignment]

    assert Own().extra == 3
    with pytest.raises(ConfigError, match="Own lr is nan"):
        Own(lr=math.nan)


@pytest.mark.parametrize("value", [((0.5, 0.4), (0.1, 0.2)), [[0.5, 0.4], [0.1, 0.2]]])
def test_a_pair_is_a_normalization(value):
    expected = iv.Normalization(mean=(0.5, 0.4), std=(0.1, 0.2))
    assert as_normalization(value) == as_normalization(expected) == expected
    assert as_normalization(np.array(value)) == as_normalization(tuple(map(np.array, value))) == expected
    assert as_normalization(torch.tensor(value, dtype=torch.float64)) == expected


@pytest.mark.parametrize("value", [None, 3, "ab", (), (0.5, 0.5), ((0.5,), (0.0,)), ((0.5,), (np.nan,))])
def test_what_is_no_normalization_is_refused(value):
    with pytest.raises(ConfigError, match=r"(?i)^normalization .*; expected "):
        as_normalization(value)


def test_starting_points_that_no_memory_holds_are_refused_before_they_are_drawn(tiny, seen):
    attack = iv.inverting_gradients(restarts=10**12, steps=1)
    for draw in (
        lambda: attack(tiny, seen),
        lambda: starts.faint(attack, seen, torch.Generator()),
    ):
        with pytest.raises(ConfigError, match=f"GradientMatching restarts is {10**12}; expected fewer"):
            draw()


@pytest.mark.parametrize("name", ["generator", "callback"])
def test_what_an_attack_is_called_with_is_checked(tiny, seen, name):
    for value in (3, "word", torch.Generator, function_of(0)):
        with pytest.raises(ConfigError, match=f"^{name} is .*; expected"):
            iv.inverting_gradients(steps=1)(tiny, seen, **{name: value})


def test_words_of_types():
    assert expected(Literal["mean", "sum"] | None) == "'mean' or 'sum' or None"
    assert expected(tuple[Count, Finite]) == "a tuple of a whole number of at least 1 and a finite number"
    assert expected(Annotated[int, "not a rule"] | str) == "int or a string"
