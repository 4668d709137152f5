"""Vision transformers: an image follows from what its patch embedding and its positions sent."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from invlib.attacks.base import Settings, closed_form, with_labels
from invlib.attacks.chain import outside, sent
from invlib.attacks.doubts import doubted, doubts_of
from invlib.core.calls import MOVES, PRODUCTS, SAME, Call, Trace, trace
from invlib.core.network import forward, in_mode, like
from invlib.core.observation import Observation
from invlib.core.reconstruction import Callback, Reconstruction
from invlib.errors import RecoveryError
from invlib.optim.coordinates import NaturalImages
from invlib.settings import NotNegative

_DETERMINED = 30.0  # dB that are expected of an image that counts as determined
_CHANCE = 0.95  # of the residual that chance leaves, from which on nothing is expected
_DRAWS = 2  # images that an expectation is the mean of
_CLOSE = 60.0  # dB at which errors are too small to leave [0, 1] by what counts as outside
# Operations that may lie between the embedding and the positions: they choose, join, shift and scale.
_BETWEEN = MOVES | SAME | {"cat", "add", "sub", "mul", "div", "index", "index_select"}


@dataclass(frozen=True, kw_only=True, eq=False)
class PatchStep:
    r"""A network's first step: :math:`z_t = W p_t + b + P_t` with patches :math:`p` and learned positions.

    Args:
        weight: the parameter's name that :math:`W` is of.
        positions: the parameter's name that :math:`P` is of.
        pixels: int64 ``(n, K)``, the input's numbers that the patches are made of.
        factor: float64 ``(n, K)``, by what they are multiplied first.
        offset: float64 ``(n, K)``, what is added to them then.
        weight_at: int64 ``(D, K)``, the parameter's numbers that :math:`W` is made of.
        positions_at: int64 ``(M,)``, the table's numbers that are added.
        added_to: int64 ``(M,)``, to which of the numbers of :math:`z`, ``(n, D)``, they are added.
        added_times: float64 ``(M,)``, by what those were multiplied before.
    """

    weight: str
    positions: str
    pixels: Tensor
    factor: Tensor
    offset: Tensor
    weight_at: Tensor
    positions_at: Tensor
    added_to: Tensor
    added_times: Tensor

    def of_weight(self, tensor: Tensor) -> Tensor:
        """Return a tensor of the weight's shape as ``(D, K)``, in double precision."""
        return tensor.flatten().double()[self.weight_at]

    def of_positions(self, tensor: Tensor) -> Tensor:
        r"""Return a tensor of the table's shape as ``(n, D)``: of its gradient the error signals."""
        n, d = len(self.pixels), len(self.weight_at)
        rows = tensor.new_zeros(n * d, dtype=torch.float64)
        rows.index_add_(0, self.added_to, self.added_times * tensor.flatten().double()[self.positions_at])
        return rows.view(n, d)

    def patches(self, inputs: Tensor) -> Tensor:
        """Return the patches ``(n, K)`` of normalised inputs ``(1, C, H, W)``, in double precision."""
        return self.factor * inputs.flatten().double()[self.pixels] + self.offset


def patch_step(
    model: nn.Module,
    image_shape: tuple[int, ...],
    *,
    weight: str | None = None,
    positions: str | None = None,
) -> PatchStep:
    """Find a network's patch embedding and the learned positions that are added to it.

    The network is run with other numbers in the place of its parameters, and what it does is read off what
    enters its operations, however it is spelled: a convolution, a product, any order of the patches, with a
    class token or without. A gradient of the network's own then has to obey the identity.

    Args:
        model: the network; it is not changed.
        image_shape: ``(C, H, W)``.
        weight: name of the embedding's weight; None takes the first product with the image.
        positions: name of the table of positions; None takes the first that is added.

    Raises:
        RecoveryError: there is no such step; the message says what is in the way.
    """
    if like(model).itemsize < 4:  # numbers of entries are to be exact
        model = copy.deepcopy(model).float()
    own = {name: p.detach() for name, p in model.named_parameters()}
    for name in (weight, positions):
        if name is not None and name not in own:
            raise RecoveryError(
                f"{name!r} is no parameter of {type(model).__name__}; expected one of {[*own]}"
            )
    generator = torch.Generator().manual_seed(0)
    probe = torch.rand(1, *image_shape, generator=generator).to(like(model))
    # Zero heads and tables tell nothing apart; in training they do not stay so.
    moved = {n: p + 0.05 * torch.randn(p.shape, generator=generator).to(p) for n, p in own.items()}
    ran = trace(model, probe, params=moved)
    start, weight = _product(model, ran, weight)
    path, added, positions = _sum(model, ran, start, positions)
    ramps = {n: torch.arange(own[n].numel(), device=own[n].device).to(own[n]) for n in (weight, positions)}
    again = trace(model, probe, params=moved | {n: ramp.view(own[n].shape) for n, ramp in ramps.items()})
    twins = [again.calls[ran.calls.index(call)] for call in (start, added)]

    before = _path_to(start)
    pixels, factor, offset = _affine(before, start, probe.shape, lambda x: _rows(start, x))
    places, times, _ = _affine(path, added, start.output.shape, lambda z: z)
    table = _constant(twins[1])
    assert table is not None
    table = table.expand(added.output.shape).long()
    used = times != 0
    numbers = torch.arange(start.output.numel(), device=probe.device).view(start.output.shape)
    rows = _tokens(start, numbers)
    order = rows.flatten().argsort()
    step = PatchStep(
        weight=weight,
        positions=positions,
        pixels=pixels.cpu(),
        factor=factor.cpu(),
        offset=offset.cpu(),
        weight_at=_weight(twins[0]).long().cpu(),
        positions_at=table[used].cpu(),
        added_to=order[places[used]].cpu(),
        added_times=times[used].cpu(),
    )
    _check(model, moved, probe, step)
    return step


def patch_embedding(
    *, tolerance: float = 1e-4, decay: bool = True, weight: str | None = None, positions: str | None = None
) -> PatchEmbedding:
    r"""Return the closed-form attack on vision transformers whose positions are learned.

    The first step is :math:`z_t = W p_t + b + P_t` with patches :math:`p_t` and positions :math:`P`.
    Whatever comes after it, :math:`\partial L/\partial P_t = \delta_t` is the error signal of place
    :math:`t`, and :math:`\partial L/\partial W = \sum_t \delta_t p_t^\top`, so that the patches are one
    least squares:

    .. math:: \hat Y = \arg\min_Y \left\| \Delta^\top Y - \partial L/\partial W \right\|^2.

    Both sides are sums over local steps, with the same factors under momentum and weight decay, so that it
    holds for every client that is linear in its gradients, with dropout too, and for clipped and scaled
    updates. It does not hold for Adam. Noise, which the residual shows, and rounding are weighed against the
    power spectrum of photographs (`invlib.NaturalImages`).

    One image alone can be told: of a batch the positions give only sums. Labels are found as by
    `invlib.fully_connected`.

    Args:
        tolerance: the residual up to which it counts as rounding; more where the update was rounded to half
            precision.
        decay: subtract the weight decay that leaves least unexplained.
        weight: name of the embedding's weight; None takes the first product with the image.
        positions: name of the table of positions; None takes the first that is added.

    Returns:
        An attack. Its score is the residual, the share of the embedding's update that no image explains;
        each pixel of a patch has as many equations as a token has numbers, and as many unknowns as there
        are patches. ``certified`` says that the residual is rounding and that the equations determine the
        image (30 dB and more, ``expected_psnr``): only the update of one image obeys them. It does not
        speak of the label. ``expected_psnr`` is NaN where a residual may be of a step that is not linear, and
        where it is what chance leaves.

    Source: this project's; compare Lu et al. 2022 (APRIL), arXiv 2112.14087, who solve for the input of
    attention.

    Taught in: chapter 6
    """
    return PatchEmbedding(tolerance=tolerance, decay=decay, weight=weight, positions=positions)


@dataclass(frozen=True, kw_only=True, repr=False)
class PatchEmbedding(Settings):
    """The attack that `patch_embedding` returns."""

    tolerance: NotNegative = 1e-4
    decay: bool = True
    weight: str | None = None
    positions: str | None = None

    @torch.inference_mode(mode=False)
    def __call__(
        self,
        model: nn.Module,
        observation: Observation,
        *,
        generator: torch.Generator | None = None,
        callback: Callback | None = None,
        progress: bool = False,
    ) -> Reconstruction:
        """Attack an observation. Nothing is drawn and there are no steps: the three options do nothing.

        Raises:
            ObservationError: the observation does not fit the model.
            RecoveryError: the network has no such first step, a part of it was not sent or is zero, there
                are several images, or more patches than a token has numbers.
        """
        began = time.perf_counter()
        model = observation.validate(model)
        step = patch_step(model, observation.image_shape, weight=self.weight, positions=self.positions)
        update = {name: sent(observation, name).cpu() for name in (step.weight, step.positions)}
        count, (width, size) = len(step.pixels), step.weight_at.shape
        if observation.num_images > 1:
            raise RecoveryError(_of_a_batch(step.of_weight(update[step.weight]), observation.num_images))
        if count > width:
            raise RecoveryError(
                f"{count} patches and tokens of {width} numbers: {width} equations for each pixel of a patch "
                f"have {count} unknowns; expected at most {width} patches"
            )
        least = max(max(_rounding(part), torch.finfo(part.dtype).eps) for part in update.values())
        system = _without_decay(step, model, update, self.decay, least)
        inputs = _solve(step, observation, system)
        images = observation.normalization.decode(inputs).to(like(model))
        rounding = max(self.tolerance, *(_rounding(part) for part in update.values()))
        fits, checked = system.residual <= rounding, count < width
        linear = fits or hasattr(observation.protocol, "mean_gradient")
        # What any signals leave of numbers that have nothing to do with them.
        chance = system.residual > _CHANCE * math.sqrt(1 - count / width)
        expected = (
            _expected(step, observation, system, inputs, least)
            if linear and (fits or not chance)
            else math.nan
        )

        doubts = doubts_of(model, observation)
        # What dropout drew does not matter here.
        doubts = [doubt for doubt in doubts if not doubt.startswith("the model is random")]
        if expected >= _CLOSE and (cut := outside(images, fits=fits)):
            doubts.append(cut)
        if not checked:
            doubts.append(
                f"{count} unknowns and as many equations leave none to check: what is expected counts on an "
                "update that has no noise and is of one image"
            )
        if not fits:
            doubts.append(
                f"{system.residual:.1%} of the update of {step.weight!r} is of no image: it has noise, the "
                "client's step is not linear in its gradients (Adam), or there was more than one image"
                + (", and no fewer would be by chance, so that no PSNR can be expected" if chance else "")
            )
        note = (
            f"one least squares from {step.weight!r} and {step.positions!r}: {count} patches of {size} "
            f"numbers, {width} equations for {count} unknowns; unexplained {system.residual:.1e}"
        )
        if not math.isnan(expected):
            note += f"; expected PSNR {expected:.0f} dB"
        if any(system.decay):
            note += f"; {system.decay[1]:.3g} times the weights was subtracted as weight decay"
        labels: Tensor | None = None
        try:
            told = with_labels(model, observation)
            labels, doubts = told.labels, [*doubts, *told.notes]
        except RecoveryError as error:
            note += f"; the labels are unknown: {error}"
        result = closed_form(
            images.clamp(0, 1),
            labels,
            system.residual,
            objective="unexplained share of the patch embedding's update",
            note=note,
            began=began,
            residuals=torch.tensor([system.residual], dtype=torch.float64),
            certified=torch.tensor([fits and checked and expected >= _DETERMINED]),
            expected_psnr=torch.tensor([expected]),
        )
        return doubted(result, doubts)


def _of_a_batch(seen: Tensor, count: int) -> str:
    """Say what the embedding's update ``(D, K)`` tells of several images."""
    sizes = torch.linalg.svdvals(seen)
    rank, size = int((sizes > 1e-5 * sizes[0]).sum()), seen.shape[1]
    told = (
        f"they confine every patch to {rank} of {size} dimensions, and say no more"
        if rank < size
        else f"they are of full rank {rank}, and confine no patch"
    )
    return (
        f"the positions' update sums the error signals of {count} images at each place, so that patches "
        f"cannot be told apart; the rows of the embedding's update are mixtures of all patches: {told}; "
        "expected num_images=1"
    )


def _rounding(tensor: Tensor) -> float:
    """Return the relative rounding of a tensor whose numbers were all in half precision once, else 0."""
    for dtype in (torch.bfloat16, torch.float16):
        if torch.equal(tensor.to(dtype).to(tensor.dtype), tensor):
            return torch.finfo(dtype).eps
    return 0.0


def _no(model: nn.Module, why: str) -> RecoveryError:
    return RecoveryError(
        f"{type(model).__name__}: {why}; expected a linear patch embedding of the image to which a trained "
        "table of positions is added"
    )


def _product(model: nn.Module, ran: Trace, weight: str | None) -> tuple[Call, str]:
    """Return the embedding and the name of its weight."""
    for call in ran.calls:
        if call.op not in PRODUCTS | {"convolution"} or len(call.before) != 1:
            continue
        name = _owner(ran, _weight(call))
        if weight is None or name == weight:
            if name is None or not dict(model.named_parameters())[name].requires_grad:
                said = "computed" if name is None else f"{name!r}, which is frozen"
                raise _no(model, f"the weight of its first product ({call.op}) is {said}")
            return call, name
    raise _no(model, "no product of the image" + (f" with {weight!r}" if weight else ""))


def _sum(model: nn.Module, ran: Trace, start: Call, positions: str | None) -> tuple[list[Call], Call, str]:
    """Return the calls after the embedding, the sum with positions, and the name of their table."""
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    reached: dict[Call, list[Call]] = {start: []}
    blocked, width = [], _weight(start).shape[0]
    for call in ran.calls:
        path = reached.get(call.before[0]) if call.before and call.before[0] is not None else None
        if path is None:
            continue
        if len(call.before) > 1 or call.op not in _BETWEEN:
            blocked.append(call.op)
            continue
        reached[call] = [*path, call]
        other = _constant(call) if call.op == "add" else None
        if other is None or other.numel() <= width:
            continue
        name = _owner(ran, other)
        if name in trained and positions in (None, name):
            return path, call, name
        if name is None:
            blocked.insert(0, "add of fixed or computed positions (sinusoidal, say)")
        elif name not in trained:
            blocked.insert(0, f"add of {name!r}, which is frozen")
    end = f"before {blocked[0]!r}" if blocked else "at all"
    why = f"no trained positions are added to what {start.op!r} makes of the image, {end}"
    if any(call.op == "convolution" and call is not start for call in ran.calls):
        why = f"it begins with a convolutional stem: {why}"
    raise _no(model, why)


def _constant(call: Call) -> Tensor | None:
    return next((a for a in call.constants() if isinstance(a, Tensor)), None)


def _owner(ran: Trace, tensor: Tensor) -> str | None:
    """Return the parameter that a tensor's numbers are of, by some of them: no two parameters share many."""
    some = tensor.flatten()[:: max(1, tensor.numel() // 16)]
    for name, p in ran.params.items():
        if p.numel() >= tensor.numel() and all((p == number).any() for number in some):
            return name
    return None


def _path_to(call: Call) -> list[Call]:
    path: list[Call] = []
    while (before := call.before[0]) is not None:
        if len(before.before) != 1:
            raise RecoveryError(f"{before.op!r} joins two values of the image before the embedding")
        path.append(before)
        call = before
    return path[::-1]


def _weight(call: Call) -> Tensor:
    """Return the weight of a product as ``(D, K)``."""
    if call.op == "convolution":
        if call.args[6] or call.args[8] != 1 or call.given.ndim != 4:
            raise RecoveryError("the first product is a transposed, grouped or 1-d convolution")
        weight: Tensor = call.args[1].flatten(1)
        return weight
    other: Tensor = call.args[-1].mT if call.args[-2] is call.given else call.args[-2]
    return other.reshape(-1, *other.shape[-2:])[0]  # the same for all places where it is expanded


def _rows(call: Call, given: Tensor) -> Tensor:
    """Return the patches ``(n, K)`` that an embedding multiplies."""
    if call.op == "convolution":
        return F.unfold(given, call.args[1].shape[2:], call.args[5], call.args[4], call.args[3])[0].T
    given = given if call.args[-2] is call.given else given.mT
    return given.reshape(-1, given.shape[-1])


def _tokens(call: Call, output: Tensor) -> Tensor:
    """Return the output ``(n, D)`` of an embedding."""
    if call.op == "convolution":
        return output[0].flatten(1).T
    output = output if call.args[-2] is call.given else output.mT
    return output.reshape(-1, output.shape[-1])


def _affine(
    path: Sequence[Call], end: Call, shape: Sequence[int], then: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return which number each number behind some calls is, times what and plus what."""

    def run(x: Tensor) -> Tensor:
        return then(reduce(lambda value, call: call.on(value), path, x.clone()))

    zeros = torch.zeros(tuple(shape), dtype=torch.float64, device=end.output.device)
    ramp = torch.arange(zeros.numel(), device=zeros.device).view(zeros.shape).to(zeros)
    offset = run(zeros)
    factor = run(zeros + 1) - offset
    index = torch.where(factor != 0, (run(ramp) - offset) / factor, 0).round().long()
    index = index.clamp(0, zeros.numel() - 1)
    noise = torch.rand(zeros.shape, generator=torch.Generator().manual_seed(0)).to(zeros)
    gap = run(noise) - (factor * noise.flatten()[index] + offset)
    if not gap.abs().max() < 1e-4 * (1 + factor.abs().max()):
        raise RecoveryError(
            f"{[call.op for call in path]} lie before {end.op!r}; expected operations that choose, shift and "
            "scale numbers, and no others"
        )
    return index, factor, offset


def _check(model: nn.Module, params: dict[str, Tensor], probe: Tensor, step: PatchStep) -> None:
    """Hold a gradient of the network's own against the identity."""
    leaves = {name: params[name].clone().requires_grad_() for name in (step.weight, step.positions)}
    with torch.enable_grad(), in_mode(model, training=False):
        logits = forward(model, params | leaves, None, probe)
        weight, table = torch.autograd.grad(logits.flatten()[0], [*leaves.values()])
    signals, seen = step.of_positions(table.cpu()), step.of_weight(weight.cpu())
    gap = (signals.T @ step.patches(probe.cpu()) - seen).norm() / seen.norm()
    if not gap < 1e-3:
        raise _no(
            model,
            f"{step.positions!r} or {step.weight!r} is used for more: a gradient of its own disobeys "
            f"dW = signals × patches by {float(gap):.1g}",
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class _System:
    r"""The equations :math:`\Delta^\top Y = G` of the patches :math:`Y`, each row as exact as the others.

    Args:
        signals: float64 ``(n, D)``.
        seen: float64 ``(D, K)``.
        noise: the standard deviation of what is added to a number of ``seen``, from the residual.
        residual: the share of ``seen`` that no patches explain.
        decay: what times the weights was subtracted from the update first, of the table and the embedding.
    """

    signals: Tensor
    seen: Tensor
    noise: float
    residual: float
    decay: tuple[float, float] = (0.0, 0.0)


def _system(
    signals: Tensor, seen: Tensor, rounding: float, decay: tuple[float, float] = (0.0, 0.0)
) -> _System:
    """Weigh the equations: rounding goes with a row's size and noise does not, whichever is likelier.

    Where no equation is left over to show noise it is taken to be ``rounding``, relative to a number.
    """
    n, rows = signals.shape
    spare = rows - n
    basis, _ = torch.linalg.qr(signals.T)
    residual = float((seen - basis @ (basis.T @ seen)).norm() / seen.norm())
    size = seen.square().mean(1).add(seen.square().mean() * 1e-12).log() / 2
    tried = []
    for weights in (torch.ones_like(size), (size.mean() - size).exp()):  # of geometric mean 1
        scaled, right = signals * weights, seen * weights[:, None]
        basis, triangle = torch.linalg.qr(scaled.T)
        left = (right - basis @ (basis.T @ right)).square().sum() / (max(spare, 1) * seen.shape[1])
        least = torch.finfo(right.dtype).eps if spare else rounding
        noise = max(left.sqrt(), least * right.square().mean().sqrt())
        # The restricted likelihood, of what the equations leave when all patches are possible.
        cost = spare * noise.log() + triangle.diagonal().abs().log().sum()
        told = _System(signals=scaled, seen=right, noise=float(noise), residual=residual, decay=decay)
        tried.append((float(cost), told))
    return min(tried if spare else tried[:1], key=lambda pair: pair[0])[1]


def _without_decay(
    step: PatchStep, model: nn.Module, update: dict[str, Tensor], fit: bool, rounding: float
) -> _System:
    r"""Subtract weight decay, which adds the same multiple of every decayed weight to the update.

    Local steps with decay and momentum are linear in the weights that they began with and in the gradients,
    with the same numbers for all tensors. So :math:`G - c W = (\Delta - c P)^\top Y`, or without
    :math:`c P` where positions are not decayed, and the right :math:`c` leaves the least residual.
    """
    own = {name: p.detach().cpu() for name, p in model.named_parameters()}
    signals, table = (step.of_positions(t[step.positions]) for t in (update, own))
    seen, weight = (step.of_weight(t[step.weight]) for t in (update, own))
    if not signals.any() or not seen.any():
        which = step.positions if seen.any() else step.weight
        raise RecoveryError(
            f"the update of {which!r} is all zero; expected error signals (a head of zeros, as torchvision's "
            "fresh ones, lets none through at the first step)"
        )

    def left(c: float, tied: float) -> tuple[float, float]:
        """Return the residual at a decay, and the Gauss-Newton step from there."""
        at = signals - c * tied * table
        basis, triangle = torch.linalg.qr(at.T)
        target = seen - c * weight
        along = basis.T @ target
        slope = weight - (tied * table.T @ torch.linalg.pinv(triangle) @ along if tied else 0)
        gap, slope = target - basis @ along, slope - basis @ (basis.T @ slope)
        return float(gap.norm()), float((gap * slope).sum() / slope.square().sum().clamp_min(1e-300))

    plain = left(0.0, 0.0)[0]
    best = (plain, 0.0, 0.0)
    if fit and plain > 1e-6 * float(seen.norm()):
        for tied in (0.0, 1.0):
            c = 0.0
            for _ in range(20):
                gap, change = left(c, tied)
                best = min(best, (gap, c, tied))
                c += change
    gap, c, tied = best
    # One number more explains this much by chance only in updates of pure noise.
    if gap**2 > (1 - 100 / seen.numel()) * plain**2:
        c = 0.0
    return _system(signals - c * tied * table, seen - c * weight, rounding, (c * tied, c))


def _solve(step: PatchStep, observation: Observation, system: _System) -> Tensor:
    """Return the likeliest input ``(1, C, H, W)``: of Gaussian noise, and of images as photographs vary.

    Conjugate gradients, with the inverse of the patches' own equations before them.
    """
    shape = (1, *observation.image_shape)
    numbers = math.prod(shape)
    prior = NaturalImages().prior(observation.normalization)

    def slope(inputs: Tensor) -> Tensor:
        with torch.enable_grad():
            leaf = inputs.detach().requires_grad_()
            return torch.autograd.grad(prior(leaf) * numbers / 2, leaf)[0]

    def back(patches: Tensor) -> Tensor:
        flat = patches.new_zeros(numbers)
        return flat.index_add_(0, step.pixels.flatten(), (step.factor * patches).flatten()).view(shape)

    def spread(inputs: Tensor) -> Tensor:
        return step.factor * inputs.flatten()[step.pixels]

    own = system.signals @ system.signals.T / system.noise**2
    zeros = own.new_zeros(shape)
    at_zero = slope(zeros)
    inverse = torch.linalg.inv(own + torch.eye(len(own)).to(own))
    often = back(step.factor)
    scale = torch.where(often > 0, often, 1).rsqrt()

    def times(inputs: Tensor) -> Tensor:
        return back(own @ spread(inputs)) + slope(inputs) - at_zero

    def before(inputs: Tensor) -> Tensor:
        return torch.where(often > 0, scale * back(inverse @ spread(scale * inputs)), inputs)

    found = zeros
    rest = back(system.signals @ system.seen / system.noise**2 - own @ step.offset) - at_zero
    ahead = direction = before(rest)
    size = first = (rest * ahead).sum()
    for _ in range(1000):
        if size <= 1e-24 * first:
            break
        image = times(direction)
        length = size / (direction * image).sum()
        found, rest = found + length * direction, rest - length * image
        ahead = before(rest)
        size, old = (rest * ahead).sum(), size
        direction = ahead + size / old * direction
    return found


def _expected(
    step: PatchStep, observation: Observation, system: _System, found: Tensor, rounding: float
) -> float:
    """Return the PSNR with which images that fit what was seen come back through such equations.

    The noise that the residual shows is shared out among both sides. Noise makes the signals that were sent
    look easier to invert than the client's own, so that its singular values are subtracted from theirs. An
    image is what was ``found`` and the error with which one that is drawn as photographs vary comes back.
    """
    generator = torch.Generator().manual_seed(0)

    def draw(shape: Sequence[int]) -> Tensor:
        return torch.randn(tuple(shape), generator=generator, dtype=torch.float64)

    left, sizes, right = torch.linalg.svd(system.signals, full_matrices=False)
    own = torch.linalg.svdvals(draw(system.signals.shape))
    size = float(step.patches(found).square().sum(0).mean())
    # Noise leaves no singular value much smaller than its own smallest.
    inside = min(system.noise / math.sqrt(1 + size), 1.5 * float(sizes[-1] / own[-1]))
    noise = math.sqrt(system.noise**2 - size * inside**2)
    signals = (left * (sizes.square() - (inside * own).square()).clamp_min(0).sqrt()) @ right

    def error(inputs: Tensor) -> Tensor:
        seen = signals.T @ step.patches(inputs) + noise * draw(system.seen.shape)
        told = _system(signals + inside * draw(signals.shape), seen, rounding)
        return _solve(step, observation, told) - inputs

    decode, encode = observation.normalization.decode, observation.normalization.encode
    psnrs = []
    for _ in range(_DRAWS):
        inputs = encode(NaturalImages().images(draw(found.shape)))
        inputs = found - error(inputs)
        gap = decode(error(inputs) + inputs) - decode(inputs)
        psnrs.append(-10 * math.log10(max(float(gap.square().mean()), 1e-30)))
    return sum(psnrs) / len(psnrs)
