"""Vision transformers: an image follows from what its patch embedding and its positions sent."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from invlib.attacks.base import Settings, closed_form, with_labels
from invlib.attacks.chain import outside, sent
from invlib.attacks.doubts import doubted, doubts_of
from invlib.attacks.layout import PatchStep, patch_step
from invlib.core.network import like
from invlib.core.observation import Observation
from invlib.core.reconstruction import Callback, Reconstruction
from invlib.errors import RecoveryError
from invlib.optim.coordinates import NaturalImages
from invlib.settings import NotNegative

_DETERMINED = 30.0  # dB that are expected of an image that counts as determined
_CHANCE = 0.95  # of the residual that chance leaves, from which on nothing is expected
_DRAWS = 2  # images that an expectation is the mean of
_CLOSE = 60.0  # dB at which errors are too small to leave [0, 1] by what counts as outside


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

        doubts = doubts_of(model, observation, closed=True)
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
