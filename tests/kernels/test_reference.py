"""The reference kernels against answers worked out by hand, and the choice between implementations."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.func import grad_and_value, vmap

from invlib import kernels
from invlib.errors import ConfigError, DeviceError
from invlib.kernels import dispatch

REFERENCE = Path(__file__).parents[1] / "reference"


def tensors(*rows, **options):
    return [torch.tensor(row, dtype=torch.float64, **options) for row in rows]


@pytest.fixture(scope="module")
def known():
    return json.loads((REFERENCE / "inversefed.json").read_text()), np.load(REFERENCE / "inversefed.npz")


# --- gradient statistics and squared difference


def test_statistics_by_hand():
    candidate, target = tensors([1, 2], [[3]]), tensors([4, -5], [[6]])
    dot, ours, theirs = kernels.gradient_statistics(candidate, target)
    assert (dot.item(), ours.item(), theirs.item()) == (4 - 10 + 18, 1 + 4 + 9, 16 + 25 + 36)
    assert dot.shape == ours.shape == theirs.shape == ()


def test_statistics_weigh_each_tensor():
    candidate, target = tensors([1, 2], [[3]]), tensors([4, -5], [[6]])
    sums = kernels.gradient_statistics(candidate, target, [0.5, 2])
    assert [s.item() for s in sums] == [0.5 * -6 + 2 * 18, 0.5 * 5 + 2 * 9, 0.5 * 41 + 2 * 36]


def test_squared_difference_by_hand():
    candidate, target = tensors([1, 2], [[3]]), tensors([4, -5], [[6]])
    assert kernels.squared_difference(candidate, target).item() == 9 + 49 + 9
    assert kernels.squared_difference(candidate, target, [0.5, 2]).item() == 0.5 * 58 + 2 * 9


def test_gradients_by_hand():
    candidate, target = tensors([1, 2], requires_grad=True), tensors([4, -5])
    dot, ours, _ = kernels.gradient_statistics(candidate, target, [3])
    (gradient,) = torch.autograd.grad(10 * dot + ours, candidate)
    assert gradient.tolist() == [30 * 4 + 6 * 1, 30 * -5 + 6 * 2]
    (gradient,) = torch.autograd.grad(kernels.squared_difference(candidate, target, [3]), candidate)
    assert gradient.tolist() == [6 * -3, 6 * 7]


@pytest.mark.parametrize("weights", [None, [0.3, 1.7, 2.0]])
def test_gradcheck(weights):
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 3), (), (4,)]
    target = [torch.randn(s, dtype=torch.float64, generator=generator) for s in shapes]
    candidate = [torch.randn(s, dtype=torch.float64, generator=generator).requires_grad_() for s in shapes]
    assert torch.autograd.gradcheck(lambda *c: kernels.gradient_statistics(c, target, weights), candidate)
    assert torch.autograd.gradcheck(lambda *c: kernels.squared_difference(c, target, weights), candidate)


def test_no_gradient_flows_to_the_target():
    candidate, target = tensors([1, 2], requires_grad=True), tensors([4, -5], requires_grad=True)
    total = sum(kernels.gradient_statistics(candidate, target)) + kernels.squared_difference(
        candidate, target
    )
    assert torch.autograd.grad(total, target, allow_unused=True) == (None,)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_gradients_are_summed_in_float32(dtype):
    # 4096 ones and one more: in these dtypes the sum would stop growing, and 256 squared overflow float16.
    candidate, target = [torch.ones(4097, dtype=dtype)], [torch.full((4097,), 256, dtype=dtype)]
    dot, ours, theirs = kernels.gradient_statistics(candidate, target)
    assert dot.dtype == torch.float32
    assert (dot.item(), ours.item(), theirs.item()) == (4097 * 256, 4097, 4097 * 65536)
    assert kernels.squared_difference(candidate, target).item() == pytest.approx(4097 * 255**2, rel=1e-6)


def test_long_sums_keep_their_digits():
    numbers = torch.rand(10**6, generator=torch.Generator().manual_seed(0))
    exact = numbers.double().square().sum()
    batch = numbers.expand(2, -1)
    sums = vmap(lambda c: kernels.gradient_statistics([c], [c])[1])(batch)
    torch.testing.assert_close(sums.double(), exact.expand(2), rtol=1e-6, atol=0)


def test_small_distances_do_not_cancel():
    target = torch.full((1000,), 1000.0)
    candidate = target + 2**-10
    assert kernels.squared_difference([candidate], [target]).item() == 1000 * 2.0**-20


def test_costs_of_the_2020_code(known):
    cases, arrays = known
    count = sum(name.startswith("costs/target/") for name in arrays.files)
    candidate = [torch.from_numpy(arrays[f"costs/candidate/{i}"]) for i in range(count)]
    target = [torch.from_numpy(arrays[f"costs/target/{i}"]) for i in range(count)]
    values = {
        case["cost_fn"]: case["value"]
        for case in cases["costs"]
        if (case["indices"], case["weights"]) == ("def", "equal")
    }
    dot, ours, theirs = kernels.gradient_statistics(candidate, target)
    assert (1 - dot / (ours * theirs).sqrt()).item() == pytest.approx(values["sim"], rel=1e-5)
    assert kernels.squared_difference(candidate, target).item() == pytest.approx(values["l2"], rel=1e-5)


def test_lists_that_do_not_fit_are_named():
    a, b = torch.zeros(2, 3), torch.zeros(4)
    for kernel in (kernels.gradient_statistics, kernels.squared_difference):
        with pytest.raises(ConfigError, match="candidate has 2 tensors, target has 1"):
            kernel([a, b], [a])
        with pytest.raises(ConfigError, match="empty; expected at least one"):
            kernel([], [])
        with pytest.raises(
            ConfigError, match=r"tensor 1: candidate has shape \(4,\), target has .* \(2, 3\)"
        ):
            kernel([a, b], [a, a])
        with pytest.raises(ConfigError, match=r"tensor 1: shape \(0, 5\) has zero size"):
            kernel([a, torch.zeros(0, 5)], [a, torch.zeros(0, 5)])
        with pytest.raises(ConfigError, match=r"tensor 0: candidate is torch.float32, target is torch.int64"):
            kernel([a], [a.long()])
        with pytest.raises(ConfigError, match="tensor 0: candidate is on cpu, target is on meta"):
            kernel([a], [a.to("meta")])
        with pytest.raises(ConfigError, match="weights has 1 numbers for 2 tensors"):
            kernel([a, b], [a, b], [1.0])


# --- total variation


def test_total_variation_by_hand():
    image = torch.tensor([[[[0.0, 1.0, 3.0], [0.0, 5.0, 5.0]]]], dtype=torch.float64)
    across, down = 1 + 2 + 5 + 0, 0 + 4 + 2
    assert kernels.total_variation(image, reduction="sum").item() == across + down
    assert kernels.total_variation(image).item() == pytest.approx(across / 4 + down / 3)


def test_total_variation_of_the_2020_code(known):
    cases, arrays = known
    images = torch.from_numpy(arrays["image/x"])
    value = kernels.total_variation(images if images.ndim == 4 else images[None])
    assert value.item() == pytest.approx(cases["image"]["total_variation"], rel=1e-6)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_total_variation_gradient(reduction):
    images = torch.rand(2, 3, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.autograd.gradcheck(
        lambda x: kernels.total_variation(x, reduction=reduction), images.requires_grad_()
    )


def test_flat_image_has_no_variation_and_no_gradient():
    images = torch.full((1, 1, 3, 3), 0.5, requires_grad=True)
    value = kernels.total_variation(images)
    (gradient,) = torch.autograd.grad(value, images)
    assert value == 0
    assert (gradient == 0).all()


@pytest.mark.parametrize(("shape", "expected"), [((1, 1, 1, 3), 1.5), ((1, 1, 3, 1), 1.5), ((1, 1, 1, 1), 0)])
def test_images_one_pixel_long(shape, expected):
    images = torch.tensor([0.0, 1.0, 3.0])[: np.prod(shape)].reshape(shape)
    assert kernels.total_variation(images).item() == expected


def test_bad_images_are_named():
    with pytest.raises(ConfigError, match=r"images has shape \(3, 4, 4\); expected \(N, C, H, W\)"):
        kernels.total_variation(torch.zeros(3, 4, 4))
    with pytest.raises(ConfigError, match=r"images has shape \(0, 3, 4, 4\)"):
        kernels.total_variation(torch.zeros(0, 3, 4, 4))
    with pytest.raises(ConfigError, match=r"images is torch.uint8; expected a floating-point"):
        kernels.total_variation(torch.zeros(1, 3, 4, 4, dtype=torch.uint8))
    with pytest.raises(ConfigError, match="reduction='max' is unknown; choose 'mean' or 'sum'"):
        kernels.total_variation(torch.zeros(1, 3, 4, 4), reduction="max")


# --- signed Adam


def test_first_step_by_hand():
    # After bias correction the first step is lr times g over |g| + eps, so lr times the sign.
    x, grad = torch.tensor([1.0, 1.0, 1.0, 1.0]), torch.tensor([3.0, -0.1, 0.0, 7.0])
    m, v = torch.zeros(4), torch.zeros(4)
    high = torch.tensor([2.0, 1.05, 2.0, 2.0])
    kernels.adam_step_(x, grad, m, v, step=1, lr=0.1, signed=True, low=torch.tensor(0.95), high=high)
    torch.testing.assert_close(x, torch.tensor([0.95, 1.05, 1.0, 0.95]))
    torch.testing.assert_close(m, 0.1 * grad.sign())
    torch.testing.assert_close(v, 0.001 * grad.sign().square())


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ten_steps_equal_torch_adam(signed, dtype):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 4, 5, dtype=dtype, generator=generator)
    low, high = torch.tensor([-1.0, -0.5, -2.0]), torch.tensor([0.5, 1.0, 2.0])
    low, high = low.to(dtype).view(1, 3, 1, 1), high.to(dtype).view(1, 3, 1, 1)
    m, v, theirs = torch.zeros_like(x), torch.zeros_like(x), x.clone().requires_grad_()
    optimizer = torch.optim.Adam([theirs], lr=0.1)
    for step in range(1, 11):
        theirs.grad = grad = torch.randn(x.shape, dtype=dtype, generator=generator)
        kernels.adam_step_(x, grad.clone(), m, v, step=step, lr=0.1, signed=signed, low=low, high=high)
        if signed:
            theirs.grad.sign_()
        optimizer.step()
        theirs.data = torch.max(torch.min(theirs, high), low).detach()
        torch.testing.assert_close(x, theirs.detach(), rtol=1e-6, atol=1e-6)
    assert ((x == low) | (x == high)).any()  # the box was felt


def test_steps_reach_a_leaf_and_a_strided_view():
    storage = torch.zeros(2, 6)
    view = storage[:, ::2].requires_grad_()
    m, v = torch.zeros(2, 3), torch.zeros(2, 3)
    kernels.adam_step_(view, torch.ones(2, 3), m, v, step=1, lr=0.1, signed=False, low=None, high=None)
    torch.testing.assert_close(storage, torch.tensor([[-0.1, 0.0] * 3] * 2))
    assert view.grad_fn is None


def test_lost_numbers_stay_visible():
    x, m, v = torch.tensor([torch.nan, 0.0]), torch.zeros(2), torch.zeros(2)
    one = torch.ones(1)
    kernels.adam_step_(x, torch.ones(2), m, v, step=1, lr=0.1, signed=True, low=-one, high=one)
    assert x.isnan().tolist() == [True, False]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(1, 3, 2, 2, dtype=torch.int64)}, r"x is torch.int64; expected a floating-point"),
        (
            {"grad": torch.zeros(3, 2, 2)},
            r"grad is \(3, 2, 2\) torch.float32 on cpu; expected \(1, 3, 2, 2\)",
        ),
        ({"m": torch.zeros(1, 3, 2, 2, device="meta")}, r"m is .* on meta; expected .* on cpu"),
        ({"v": torch.zeros(1, 3, 2, 2).long()}, r"v is .* torch.int64 .* expected .* floating-point"),
        (
            {"low": torch.zeros(2)[:, None, None, None]},
            r"low is \(2, 1, 1, 1\) .* broadcasts against \(1, 3,",
        ),
        ({"high": torch.zeros(1, 1, 1, 1, 1)}, r"high is \(1, 1, 1, 1, 1\)"),
        ({"step": 0}, "step=0; expected 1 for the first step"),
        ({"betas": (0.9, 1.0)}, r"betas=\(0.9, 1.0\); expected two numbers in"),
    ],
)
def test_bad_steps_are_named(change, message):
    arguments = {name: torch.zeros(1, 3, 2, 2) for name in ("x", "grad", "m", "v")}
    arguments |= {"step": 1, "lr": 0.1, "signed": True, "low": None, "high": None}
    with pytest.raises(ConfigError, match=message):
        kernels.adam_step_(**(arguments | change))


# --- choice of implementation


@pytest.fixture
def no_triton(monkeypatch):
    """Make `import triton` fail as it does where the package is not installed."""
    for name in list(sys.modules):
        if name == "invlib.kernels.triton" or name.startswith("invlib.kernels.triton."):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "triton", None)
    dispatch._load.cache_clear()
    yield
    dispatch._load.cache_clear()


@pytest.fixture
def compiled_triton(monkeypatch):
    """Let the Triton kernels look compiled, as on a machine with a GPU; nothing is launched."""
    monkeypatch.setattr(dispatch, "_load", lambda: module)
    module = type(kernels)("stand-in")
    module.INTERPRETED = False
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)


def on_gpu(dtype=torch.float32):
    return SimpleNamespace(is_cuda=True, dtype=dtype, device=torch.device("cuda:0"))


def test_a_cpu_gets_the_reference():
    assert kernels.choose(None, torch.zeros(1)) == "reference"
    assert kernels.choose("reference", torch.zeros(1)) == "reference"


def test_unknown_implementation_is_named():
    with pytest.raises(ConfigError, match="impl='cuda' is unknown; choose None, 'reference' or 'triton'"):
        kernels.choose("cuda", torch.zeros(1))


@pytest.mark.usefixtures("compiled_triton")
def test_a_gpu_gets_triton(monkeypatch):
    assert kernels.choose(None, on_gpu()) == "triton"
    assert kernels.choose("triton", on_gpu()) == "triton"
    assert kernels.choose(None, on_gpu(torch.float8_e5m2)) == "reference"
    for module, name in ((torch.cuda, "is_current_stream_capturing"), (torch.compiler, "is_compiling")):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, lambda: True)
            assert kernels.choose(None, on_gpu()) == "reference"


@pytest.mark.usefixtures("compiled_triton")
def test_triton_that_cannot_run_says_why():
    with pytest.raises(
        DeviceError, match=r"needs a CUDA tensor \(or TRITON_INTERPRET=1\), got cpu; use impl=None"
    ):
        kernels.choose("triton", torch.zeros(1))
    with pytest.raises(DeviceError, match=r"needs float16, .*, got torch.float8_e5m2; use impl=None"):
        kernels.choose("triton", torch.zeros(1, dtype=torch.float8_e5m2))
    with pytest.raises(DeviceError, match="got cpu; use impl=None"):
        kernels.total_variation(torch.zeros(1, 1, 2, 2), impl="triton")


@pytest.mark.usefixtures("no_triton")
def test_missing_triton_is_named_or_passed_over(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert kernels.choose(None, on_gpu()) == "reference"
    with pytest.raises(DeviceError, match="needs the triton package, which cannot be used here"):
        kernels.choose("triton", on_gpu())


def test_the_reference_compiles_in_one_graph():
    generator = torch.Generator().manual_seed(0)
    target = [torch.randn(4, 3, generator=generator), torch.randn(4, generator=generator)]
    images = torch.rand(2, 1, 1, 2, 3, generator=generator)

    def cost(x):
        candidate = [x.flatten()[:3] * target[0], x.sum() * target[1]]
        dot, ours, theirs = kernels.gradient_statistics(candidate, target)
        return 1 - dot / (ours * theirs).sqrt() + 0.1 * kernels.total_variation(x)

    step = vmap(grad_and_value(cost))
    compiled = torch.compile(step, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(images), step(images))
