"""Two images that a noisy update does not tell apart: a search for them, and what they prove."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from invlib.core.network import in_mode, unwrapped
from invlib.core.normalization import Normalization
from invlib.core.observation import ClientStep, Loss
from invlib.defenses.bounds import two_point_bound
from invlib.errors import ConfigError
from invlib.federated import FedSGD
from invlib.settings import FromZero, Positive, checks


@dataclass(frozen=True, kw_only=True, eq=False)
class WitnessPair:
    """An image and another one whose update is near its own.

    Args:
        image: ``(1, C, H, W)`` in [0, 1].
        other: likewise.
        distance: between the two updates, over all of their numbers.
        relative: the distance, as a share of the image's own update.
        apart: how far the two images are apart, the root of their mean squared difference in [0, 1].
    """

    image: Tensor
    other: Tensor
    distance: float
    relative: float
    apart: float

    def bound(self, noise: float) -> float:
        """Return how often any attacker is right who has to choose between the two, at such noise.

        Args:
            noise: the standard deviation of the noise on each number of the update.
        """
        return two_point_bound(self.distance, noise)


@checks
def witness_pair(
    model: nn.Module,
    image: Tensor,
    label: Tensor,
    *,
    normalization: Normalization,
    others: Tensor | None = None,
    client: ClientStep | None = None,
    apart: Positive = 0.1,
    steps: FromZero = 200,
    loss: Loss = F.cross_entropy,
) -> WitnessPair:
    r"""Search for another image whose update is as near as can be, and which is not the same to the eye.

    .. math:: \min_{x'} \lVert g(x') - g(x) \rVert \quad \text{where} \quad
        \lVert x' - x \rVert / \sqrt{d} \ge r

    It starts from shifted, flipped and turned copies and from other images, and refines the best of them. A
    pair is a proof: where its `two_point_bound` is near one half, nobody tells which of the two the client
    had. That none is found proves nothing.

    Args:
        model: the network, in evaluation mode here.
        image: ``(1, C, H, W)`` in [0, 1].
        label: int64 ``(1,)``, of both images.
        normalization: how the client encodes images.
        others: images ``(n, C, H, W)`` in [0, 1] to start from as well.
        client: the client's step, which has to be one that can be differentiated; None takes `invlib.FedSGD`.
        apart: :math:`r`, the least root of the mean squared difference of the two; 0.1 is a PSNR of 20 dB.
        steps: how many steps refine the best start.
        loss: the client's loss ``(logits, labels) -> scalar``.

    Raises:
        ConfigError: a setting is out of range, or no start is so far from the image.

    Taught in: chapter 8
    """
    model, client = unwrapped(model), client or FedSGD()
    image = image.detach()

    def update_of(x: Tensor) -> Tensor:
        sent = client(model, normalization.encode(x), label, loss=loss)
        return torch.cat([part.flatten() for part in sent.values()])

    def difference(x: Tensor) -> Tensor:
        return (x - image).square().mean().sqrt()

    starts = [x[None] for x in _copies(image[0]) + ([] if others is None else list(others.to(image)))]
    starts = [x for x in starts if difference(x) >= apart]
    if not starts:
        raise ConfigError(f"apart is {apart}, and no start is so far away; expected less, or others")
    with in_mode(model, training=False):
        own = update_of(image).detach()
        distances = [float((update_of(x).detach() - own).norm()) for x in starts]
        best = min(distances)
        found = starts[distances.index(best)]
        now = found.clone().requires_grad_()
        optimizer = torch.optim.Adam([now], lr=0.01)
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = 0.01 * (1 - step / steps)
            gap = (update_of(now) - own).norm()
            if gap.item() < best and difference(now) >= apart:
                best, found = gap.item(), now.detach().clone()
            if not gap:
                break
            (now.grad,) = torch.autograd.grad(gap, now)
            optimizer.step()
            with torch.no_grad():  # out of the ball about the image, into the box of images
                away = now - image
                now.copy_((image + away * (1.001 * apart / difference(now)).clamp_min(1)).clamp(0, 1))
    return WitnessPair(
        image=image,
        other=found,
        distance=best,
        relative=best / float(own.norm().clamp_min(torch.finfo(own.dtype).tiny)),
        apart=float(difference(found)),
    )


def _copies(image: Tensor) -> list[Tensor]:
    """Return shifted (round the edge), flipped, turned and inverted copies of an image ``(C, H, W)``."""
    height, width = image.shape[-2:]
    shifts = [2**k for k in range(1, 12) if 2**k <= max(height, width) // 2]
    moved = [image.roll(by, axis) for axis in (-2, -1) for s in shifts for by in (s, -s)]
    return [*moved, image.flip(-1), image.flip(-2), image.flip(-1, -2), 1 - image]
