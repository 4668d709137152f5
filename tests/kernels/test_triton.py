"""The Triton kernels against the reference: in the interpreter, and with `pytest -m gpu` on a CUDA device."""

import os
import subprocess
import sys
from unittest.mock import create_autospec

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import grad, grad_and_value, vmap

from invlib import kernels
from invlib.errors import DeviceError
from invlib.kernels import dispatch

pytest.importorskip("triton")

import triton

from invlib.kernels.triton import adam, common, gradients, variation

GPU = torch.cuda.is_available()
pytestmark = pytest.mark.parametrize(
    "device",
    [
        pytest.param("cpu", marks=pytest.mark.skipif(GPU, reason="with a GPU the kernels are compiled")),
        pytest.param(
            "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not GPU, reason="needs a CUDA device")]
        ),
    ],
)

# Odd sizes around the tiles of the interpreter below: 128 numbers that a program holds, 256 that it sums.
SHAPES = [(), (1,), (7,), (127,), (3, 43), (257,), (2, 3, 4, 5)]
WEIGHTS = [1.5, 0.0, -2.0, 0.25, 1.0, 3.0, 0.5]
TOLERANCES = {
    torch.float64: {"rtol": 1e-12, "atol": 1e-12},
    torch.float32: {"rtol": 2e-5, "atol": 2e-5},
    torch.bfloat16: {"rtol": 1e-2, "atol": 1e-2},
    torch.float16: {"rtol": 2e-3, "atol": 2e-3},
}


def tile(monkeypatch, chunk, block):
    gradients._layout.cache_clear()
    for module in (gradients, variation):
        monkeypatch.setattr(module, "CHUNK_SIZE", chunk)
        monkeypatch.setattr(module, "BLOCK_SIZE", block)
    monkeypatch.setattr(adam, "BLOCK_SIZE", block)


@pytest.fixture(autouse=True)
def _triton_runs(device, monkeypatch):
    """No test here may pass because the reference ran instead; in the interpreter, small tiles save time."""
    if device == "cpu":
        assert os.environ.get("TRITON_INTERPRET") == "1"
        tile(monkeypatch, chunk=256, block=128)
    assert kernels.choose("triton", torch.zeros(1, device=device)) == "triton"
    yield
    gradients._layout.cache_clear()


@pytest.fixture
def launches(monkeypatch):
    """Count what is launched: the names of the kernels, in order."""
    names = []
    for module in (gradients, variation, adam):
        launch = module.launch

        def counting(kernel, *args, _launch=launch, **constants):
            names.append(kernel.__name__)
            _launch(kernel, *args, **constants)

        monkeypatch.setattr(module, "launch", counting)
    return names


def numbers(shape, device, dtype=torch.float32, seed=0):
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed)).to(device)


def lists(shapes, device, dtype=torch.float32, rows=()):
    candidate = [numbers((*rows, *shape), device, dtype, seed=i) for i, shape in enumerate(shapes)]
    target = [numbers(shape, device, dtype, seed=100 + i) for i, shape in enumerate(shapes)]
    return candidate, target


def matching(kernel, weights, impl):
    """A cost of a candidate whose gradient needs every differentiable output of the kernel."""

    def cost(candidate, target):
        if kernel == "difference":
            return kernels.squared_difference(candidate, target, weights, impl=impl).sqrt()
        dot, ours, theirs = kernels.gradient_statistics(candidate, target, weights, impl=impl)
        return 1 - dot / (1 + ours.square() + theirs.square()).sqrt() + 1e-3 * ours + 1e-3 * theirs

    return cost


def value_and_gradients(cost, candidate, target):
    candidate = [tensor.detach().requires_grad_() for tensor in candidate]
    value = cost(candidate, target)
    return value.detach(), torch.autograd.grad(value, candidate)


def assert_same(run, dtype=torch.float32):
    """Compare what a function of `impl` gives for both implementations, dtypes included."""
    torch.testing.assert_close(run("triton"), run("reference"), **TOLERANCES[dtype])


# --- lists of gradients


@pytest.mark.parametrize("kernel", ["statistics", "difference"])
@pytest.mark.parametrize("dtype", list(TOLERANCES), ids=str)
def test_lists_of_odd_sizes(device, kernel, dtype):
    candidate, target = lists(SHAPES, device, dtype)
    weights = [abs(w) for w in WEIGHTS]
    assert_same(lambda impl: value_and_gradients(matching(kernel, weights, impl), candidate, target), dtype)


def test_lists_in_full_tiles(device, monkeypatch):
    tile(monkeypatch, common.CHUNK_SIZE, common.BLOCK_SIZE)
    candidate, target = lists([(1023,), (1025,), (4097,)], device)
    assert_same(lambda impl: value_and_gradients(matching("statistics", None, impl), candidate, target))


def test_each_statistic_and_its_gradient(device):
    candidate, target = lists(SHAPES, device)
    assert_same(lambda impl: kernels.gradient_statistics(candidate, target, WEIGHTS, impl=impl))
    for which in (0, 1):
        assert_same(
            lambda impl, which=which: value_and_gradients(
                lambda c, t: kernels.gradient_statistics(c, t, WEIGHTS, impl=impl)[which], candidate, target
            )
        )


def test_target_may_have_another_dtype(device):
    candidate, target = lists(SHAPES, device)
    narrow = [tensor.bfloat16() for tensor in target]
    assert_same(lambda impl: value_and_gradients(matching("statistics", None, impl), candidate, narrow))
    wide = [tensor.double() for tensor in target]
    assert_same(lambda impl: value_and_gradients(matching("statistics", None, impl), candidate, wide))


def test_lists_of_mixed_dtypes_are_refused(device):
    mixed = [torch.ones(2, device=device), torch.ones(2, device=device, dtype=torch.float64)]
    with pytest.raises(
        DeviceError, match=r"one dtype .* throughout candidate, got torch.float32, torch.float64"
    ):
        kernels.gradient_statistics(mixed, mixed, impl="triton")
    assert kernels.squared_difference(mixed, mixed) == 0


def test_network_of_65_tensors_takes_one_launch(device, launches):
    shapes = [(3, 3), (5,), (1,)] * 21 + [(10, 7), (10,)]
    candidate, target = lists(shapes, device, rows=(2,))
    cost = matching("statistics", None, "triton")
    vmap(grad_and_value(cost), in_dims=(0, None))(candidate, target)
    assert launches == ["_sums_kernel", "_gradients_kernel"]


@pytest.mark.parametrize("kernel", ["statistics", "difference"])
def test_strided_tensors(device, kernel):
    candidate = [
        numbers((6, 5), device).t(),
        numbers((4, 7), device)[:, 1::2],
        numbers((1,), device).expand(3),
    ]
    target = [
        numbers((5, 6), device, seed=9),
        numbers((3, 4), device, seed=8).t(),
        numbers((3,), device, seed=7),
    ]
    assert_same(lambda impl: value_and_gradients(matching(kernel, None, impl), candidate, target))


@pytest.mark.parametrize("kernel", ["statistics", "difference"])
def test_restarts_under_vmap(device, kernel):
    shapes = [(), (7,), (1025,), (2, 3)]
    candidate, target = lists(shapes, device, rows=(3,))

    def run(impl):
        cost = matching(kernel, [1.0, 2.0, 0.5, 1.0], impl)
        plain = vmap(cost, in_dims=(0, None))(candidate, target)
        gradient, value = vmap(grad_and_value(cost), in_dims=(0, None))(candidate, target)
        one = grad_and_value(cost)([tensor[1] for tensor in candidate], target)
        return plain, gradient, value, one

    assert_same(run)


def test_restarts_in_other_dimensions(device):
    candidate = [numbers((7, 3), device), numbers((2, 3, 5), device), numbers((4,), device)]
    target = [numbers((7,), device, seed=5), numbers((2, 5), device, seed=6), numbers((4,), device, seed=7)]

    def run(impl):
        cost = matching("statistics", None, impl)
        return vmap(grad_and_value(cost), in_dims=([1, 1, None], None))(candidate, target)

    assert_same(run)


@pytest.mark.parametrize("kernel", ["statistics", "difference"])
def test_separate_targets_under_vmap(device, kernel):
    candidate, _ = lists([(7,), (3, 4)], device, rows=(5,))
    _, target = lists([(5, 7), (5, 3, 4)], device)

    def run(impl):
        cost = matching(kernel, None, impl)
        pairs = vmap(grad_and_value(cost))(candidate, target)
        one_candidate = vmap(grad_and_value(cost), in_dims=(None, 0))([c[0] for c in candidate], target)
        return pairs, one_candidate

    assert_same(run)


def test_restarts_of_separate_targets(device):
    # Nested either way: observations outside, restarts inside, and the reverse.
    candidate, _ = lists([(7,), (3, 4)], device, rows=(3, 2))
    _, target = lists([(3, 7), (3, 3, 4)], device)

    def run(impl):
        step = grad_and_value(matching("statistics", None, impl))
        outside = vmap(vmap(step, in_dims=(0, None)))(candidate, target)
        inside = vmap(vmap(step), in_dims=(1, None))(candidate, target)
        shared = vmap(vmap(step, in_dims=(0, None)), in_dims=(0, None))(candidate, [t[0] for t in target])
        return outside, inside, shared

    assert_same(run)


def test_gradient_of_a_sum_over_restarts(device):
    # The gradient of a sum is one number repeated without a copy, which a kernel cannot step through.
    images = numbers((3, 1, 2, 5, 4), device)
    target = numbers((1, 2, 5, 4), device, seed=1)

    def run(impl):
        costs = [
            lambda x: kernels.squared_difference([x], [target], impl=impl),
            lambda x: kernels.gradient_statistics([x], [target], impl=impl)[1],
            lambda x: kernels.total_variation(x, impl=impl),
        ]
        outside = [grad(lambda x, cost=cost: vmap(cost)(x).sum())(images) for cost in costs]
        plain = [
            value_and_gradients(lambda x, _, cost=cost: vmap(cost)(x[0]).sum(), [images], None)
            for cost in costs
        ]
        return outside, plain

    assert_same(run)


def test_no_gradient_flows_to_the_target(device):
    candidate, target = lists([(3,)], device)
    candidate[0].requires_grad_()
    target[0].requires_grad_()
    value = sum(kernels.gradient_statistics(candidate, target, impl="triton"))
    assert torch.autograd.grad(value, [*candidate, *target], allow_unused=True)[1] is None


@pytest.mark.parametrize("kernel", ["statistics", "difference"])
def test_gradcheck_of_lists(device, kernel):
    candidate, target = lists([(2, 3), (), (4,)], device, torch.float64)
    candidate = [tensor.requires_grad_() for tensor in candidate]
    cost = matching(kernel, [0.3, 1.7, 2.0], "triton")
    assert torch.autograd.gradcheck(lambda *c: cost(c, target), candidate, fast_mode=True)


def test_small_distances_do_not_cancel(device):
    target = torch.full((1000,), 1000.0, device=device)
    candidate = (target + 2**-10).requires_grad_()
    value = kernels.squared_difference([candidate], [target], impl="triton")
    assert value.item() == 1000 * 2.0**-20
    assert (torch.autograd.grad(value, candidate)[0] == 2.0**-9).all()


def test_equal_input_gives_equal_bits(device):
    candidate, target = lists(SHAPES, device, rows=(2,))
    cost = matching("statistics", WEIGHTS, "triton")
    first, second = (vmap(grad_and_value(cost), in_dims=(0, None))(candidate, target) for _ in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=0)


@settings(max_examples=10, deadline=None, derandomize=True)
@given(
    shapes=st.lists(st.lists(st.integers(1, 6), max_size=3).map(tuple), min_size=1, max_size=4),
    rows=st.integers(1, 3),
)
def test_lists_of_any_shape(device, shapes, rows):
    candidate, target = lists(shapes, device, rows=(rows,))
    assert_same(
        lambda impl: vmap(grad_and_value(matching("statistics", None, impl)), in_dims=(0, None))(
            candidate, target
        )
    )


# --- total variation


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("dtype", list(TOLERANCES), ids=str)
def test_total_variation(device, reduction, dtype):
    images = [numbers((2, 3, 9, 11), device, dtype)]  # 594 numbers: three programs in the interpreter

    def run(impl):
        return value_and_gradients(
            lambda x, _: kernels.total_variation(x[0], reduction=reduction, impl=impl), images, None
        )

    assert_same(run, dtype)


@settings(max_examples=10, deadline=None, derandomize=True)
@given(shape=st.tuples(*[st.integers(1, 4)] * 2, *[st.integers(1, 7)] * 2), rows=st.integers(1, 3))
def test_total_variation_of_any_shape(device, shape, rows):
    images = numbers((rows, *shape), device)
    images[images < -0.5] = -0.5  # some neighbours are equal, where the derivative of |.| is 0
    assert_same(lambda impl: vmap(grad_and_value(lambda x: kernels.total_variation(x, impl=impl)))(images))


def test_total_variation_of_restarts_takes_one_launch(device, launches):
    images = numbers((4, 1, 3, 5, 5), device)
    vmap(grad_and_value(lambda x: kernels.total_variation(x, impl="triton")))(images)
    assert launches == ["_variation_kernel", "_variation_gradient_kernel"]


def test_total_variation_of_strided_and_nested_restarts(device):
    images = numbers((3, 1, 2, 5, 2, 3), device)  # two dimensions of restarts, then (1, 2, 5, 3) for each

    def run(impl):
        step = grad_and_value(lambda x: kernels.total_variation(x, impl=impl))
        nested = vmap(vmap(step, in_dims=3), in_dims=0)(images)
        one = images[0, :, :, :, 0]
        scaled = vmap(lambda scale: grad(lambda x: scale * kernels.total_variation(x, impl=impl))(one))
        strided = kernels.total_variation(one.transpose(2, 3), impl=impl)
        return nested, scaled(torch.arange(3.0, device=device)), strided

    assert_same(run)


def test_gradcheck_of_total_variation(device):
    images = numbers((1, 2, 3, 4), device, torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: kernels.total_variation(x, impl="triton"), images, fast_mode=True
    )


def test_second_derivatives_are_refused(device):
    images, target = numbers((1, 1, 3, 3), device).requires_grad_(), numbers((1, 1, 3, 3), device, seed=1)
    for value in (
        kernels.total_variation(images, impl="triton"),
        kernels.squared_difference([images], [target], impl="triton"),
    ):
        (gradient,) = torch.autograd.grad(value, images, create_graph=True)
        with pytest.raises(DeviceError, match="differentiable once; use impl='reference'"):
            gradient.sum().backward()


# --- signed Adam


def take_steps(impl, x, bounds, *, signed=True, steps=10):
    """Take steps on given gradients; what must agree is x and both moments."""
    x = x.clone()
    m, v = torch.zeros_like(x), torch.zeros_like(x)
    for step in range(1, steps + 1):
        gradient = numbers(x.shape, x.device, x.dtype, seed=step)
        kernels.adam_step_(
            x, gradient, m, v, step=step, lr=0.1, signed=signed, low=bounds[0], high=bounds[1], impl=impl
        )
    return x, m, v


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("dtype", list(TOLERANCES), ids=str)
def test_adam_steps(device, signed, dtype):
    x = numbers((2, 1, 3, 7, 9), device, dtype)  # 378 numbers: three programs in the interpreter
    low = torch.tensor([-1.0, -0.5, -2.0], device=device).view(1, 3, 1, 1)
    high = torch.tensor([0.5, 1.0, 2.0], device=device).view(1, 3, 1, 1)
    # The interpreter narrows the factors to float32 and cuts bfloat16 off instead of rounding it.
    interpreted = torch.float32 if (device, dtype) == ("cpu", torch.float64) else dtype
    steps = 2 if dtype == torch.bfloat16 else 10
    assert_same(lambda impl: take_steps(impl, x, (low, high), signed=signed, steps=steps), interpreted)


@pytest.mark.parametrize("signed", [True, False])
def test_adam_equals_torch_adam(device, signed):
    x = numbers((1, 3, 5, 5), device)
    theirs = x.clone().requires_grad_()
    optimizer = torch.optim.Adam([theirs], lr=0.1)
    low, high = torch.full((1, 3, 1, 1), -1.0, device=device), torch.full((1, 3, 1, 1), 0.75, device=device)
    for step in range(1, 11):
        theirs.grad = numbers(x.shape, device, seed=step)
        if signed:
            theirs.grad.sign_()
        optimizer.step()
        theirs.data = torch.max(torch.min(theirs, high), low).detach()
    torch.testing.assert_close(
        take_steps("triton", x, (low, high), signed=signed)[0], theirs.detach(), rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize(
    "shape", [(), (1,), (4,), (3, 1), (3, 1, 1), (1, 3, 1, 1), (2, 3, 1, 4), (2, 1, 5, 1), (2, 3, 5, 4)]
)
def test_adam_box_broadcasts(device, shape):
    x = numbers((2, 3, 5, 4) if shape != (3, 1) else (2, 5, 3, 4), device)
    high = 0.3 * numbers(shape, device, seed=77).abs()
    assert_same(lambda impl: take_steps(impl, x, (-0.5 * high, high), steps=2))
    assert_same(lambda impl: take_steps(impl, x, (None, high), steps=1))
    assert_same(lambda impl: take_steps(impl, x, (high, None), steps=1))


def test_adam_moves_strided_leaves_in_place(device, launches):
    storage = torch.zeros(4, 6, device=device)
    x = storage[:, 1::2].requires_grad_()
    gradient = numbers((3, 4), device).t()
    m, v = torch.zeros(3, 4, device=device).t(), torch.zeros(4, 6, device=device)[:, ::2]
    kernels.adam_step_(x, gradient, m, v, step=1, lr=0.1, signed=False, low=None, high=None, impl="triton")
    torch.testing.assert_close(storage[:, 1::2], -0.1 * gradient.sign())
    assert (storage[:, ::2] == 0).all()
    torch.testing.assert_close(m, 0.1 * gradient)
    torch.testing.assert_close(v, 0.001 * gradient.square())
    assert launches == ["_adam_kernel"]


def test_adam_keeps_lost_numbers_visible(device):
    x = torch.tensor([torch.nan, 0.0], device=device)
    m, v, one = torch.zeros(2, device=device), torch.zeros(2, device=device), torch.ones(1, device=device)
    gradient = torch.tensor([1.0, torch.nan], device=device)
    for impl in ("triton", "reference"):
        kernels.adam_step_(x, gradient, m, v, step=1, lr=0.1, signed=True, low=-one, high=one, impl=impl)
        assert x.isnan().tolist() == [True, False]


# --- the choice, and the compiler


def test_automatic_choice(device, launches):
    x = torch.rand(1, 1, 3, 3, device=device)
    kernels.total_variation(x)
    kernels.squared_difference([x], [x])
    assert kernels.choose(None, x) == ("triton" if device == "cuda" else "reference")
    assert launches == (["_variation_kernel", "_sums_kernel"] if device == "cuda" else [])


def test_late_interpreter_is_named(device, monkeypatch):
    # Triton fixes its own functions as it is imported, ours later: one compiled, one not, and nothing runs.
    for name in [name for name in sys.modules if name.startswith("invlib.kernels.triton")]:
        monkeypatch.delitem(sys.modules, name)
    compiled, interpreted = create_autospec(triton.JITFunction, instance=True), triton.language.sum
    monkeypatch.setattr(triton.language, "sum", compiled if device == "cpu" else lambda: interpreted)
    dispatch._load.cache_clear()
    with pytest.raises(DeviceError, match="TRITON_INTERPRET was set after triton was imported"):
        kernels.choose("triton", torch.zeros(1, device=device))
    dispatch._load.cache_clear()


COMPILE = """
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from invlib.kernels.triton.common import INTERPRETED
from invlib.kernels.triton import adam
from invlib.kernels.triton import gradients
from invlib.kernels.triton import variation

assert not INTERPRETED
LISTS = "pointers:*i64 blocks:*i64 sizes:*i64 weights:*fp32 tensors:i32 tiles:i32"
IMAGES = "images:*bf16 size:i32 height:i32 width:i32 tiles:i32 across:fp64 down:fp64"
STEP = "x:*fp32 grad:*fp32 m:*fp32 v:*fp32 low:*fp32 high:*fp32 size:i32 low_repeat:i32 low_count:i32 "
STEP += "high_repeat:i32 high_count:i32 rate:fp64 pull1:fp64 beta2:fp64 pull2:fp64 root:fp64 eps:fp64"
pair = {"OURS": tl.bfloat16, "THEIRS": tl.float32, "SUM": tl.float32, "SHARED": False, "DIFFERENCE": False}
box = {"SIGNED": True, "LOW": True, "HIGH": True}
tile = {"CHUNK": 128, "BLOCK": 128}
for kernel, signature, constants in [
    (gradients._sums_kernel, LISTS + " partials:*fp32", pair | tile),
    (gradients._gradients_kernel, LISTS + " upstream:*fp32", pair | tile),
    (variation._variation_kernel, IMAGES + " partials:*fp32", {"SUM": tl.float32} | tile),
    (variation._variation_gradient_kernel, IMAGES + " upstream:*fp32 out:*bf16", {"SUM": tl.float32} | tile),
    (adam._adam_kernel, STEP, box | {"SUM": tl.float32, "OFFSET": tl.int32, "BLOCK": 128}),
]:
    types = dict(part.split(":") for part in signature.split()) | dict.fromkeys(constants, "constexpr")
    source = ASTSource(
        kernel,
        {name: types[name] for name in kernel.arg_names},
        constexprs={(kernel.arg_names.index(name),): value for name, value in constants.items()},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32))
    assert len(compiled.asm["cubin"]) > 0, kernel
    print(kernel.__name__)
"""


@pytest.mark.slow
def test_kernels_compile_for_a_gpu(device, tmp_path):
    # The interpreter accepts more than the compiler does, and the compiler needs no GPU.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) == 5
