"""The layer that makes the logits: its gradient, and what the network makes of other images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from invlib.attacks.demixing import Demixed, demix
from invlib.attacks.losses import binary_labels, kind_of
from invlib.core.calls import logits_layer, logits_layer_inputs
from invlib.core.network import blank, forward, in_mode, like, placed, trainable_parameters
from invlib.core.observation import ClientStep, Loss, Observation, words_of
from invlib.data import samples
from invlib.errors import RecoveryError
from invlib.federated import FedAvg, FedSGD

MOST = 64  # label multisets that are ranked, and begun with
_TRIED = 8  # labels or exchanges that are tried by simulating a client


@dataclass(frozen=True, kw_only=True)
class Head:
    """The parameter that labels are read off: the bias of the layer that makes the logits, or its weight."""

    name: str
    bias: bool
    transposed: bool
    names: tuple[str | None, str]  # the bias's and the weight's

    @staticmethod
    def of(model: nn.Module, observation: Observation) -> Head:
        """Find it: a bias or weight that was sent whole before one of which a part was."""
        layer = logits_layer(model, observation.image_shape)
        names = [n for n in (layer.bias, layer.weight) if n in observation.update]
        if not names:
            raise RecoveryError(f"the update lacks {layer.weight!r}, the layer that makes the logits")
        name = next((n for n in names if n not in observation.sent), names[0])
        assert name is not None
        return Head(
            name=name, bias=name == layer.bias, transposed=layer.transposed, names=(layer.bias, layer.weight)
        )

    def read(self, value: Tensor) -> Tensor:
        """Return the bias ``(classes,)`` or the weight ``(classes, D)``, float64 on the CPU."""
        value = value.detach().double().cpu()
        if self.bias:
            return value.flatten()
        return self.rows(value)

    def rows(self, value: Tensor) -> Tensor:
        """Return the layer's weight ``(classes, D)``, float64 on the CPU."""
        value = value.detach().double().cpu()
        return value.mT if self.transposed else value.flatten(1)

    def weight_of(self, observation: Observation, model: nn.Module) -> Tensor | None:
        """Return the mean gradient of its weight ``(classes, D)``; None where it was not sent whole."""
        name = self.names[1]
        if (
            name not in observation.update
            or name in observation.sent
            or not hasattr(observation.protocol, "mean_gradient")
        ):
            return None
        return self.rows(observation.mean_gradient(name, model))

    def mean(self, observation: Observation, model: nn.Module | None = None) -> Tensor:
        """Return its mean gradient; with the model, weight decay is taken off."""
        if self.bias and observation.num_images == 1 and self.name in observation.sent:
            # Of one image the label's entry alone is negative, so that a part of the bias may do.
            return self.read(observation.protocol.mean_gradient(observation.update[self.name], 1))
        return self.read(observation.mean_gradient(self.name, model))

    def nudged(self, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return parameters with 1 added to all that makes the first logit."""
        value = params[self.name].clone()
        rows = value.view(-1)[:1] if self.bias else (value[:, :1] if self.transposed else value[:1])
        rows += 1
        return {**params, self.name: value}


class Typical:
    """What the network makes of other images: its predictions, and the inputs of its last layer.

    The images are noise at several scales, since predictions depend on how smooth an image is, and
    photographs. A client that trains for some steps predicts with weights that move, from the ones sent to it
    to the ones it sends back; the server knows both ends and takes the mean. Nothing is run until it is
    asked for.
    """

    def __init__(
        self, model: nn.Module, observation: Observation, head: Head, samples: int, *, trains: bool
    ) -> None:
        self.model, self.observation, self.head = model, observation, head
        self._seen: tuple[Tensor, Tensor] | None = None
        self.inputs = self.encoded(_noise_images(samples, observation.image_shape))
        params = trainable_parameters(model)
        self.ends = [params]
        if trains or isinstance(observation.protocol, FedAvg):
            self.ends.append({name: p + observation.update[name].to(p) for name, p in params.items()})

    def encoded(self, images: Tensor) -> Tensor:
        """Return images ``(N, C, H, W)`` in [0, 1] as the network is given them; tokens as they are."""
        images = placed(images, self.model)
        return images if self.observation.is_text else self.observation.normalization.encode(images)

    def run(self, params: Mapping[str, Tensor], inputs: Tensor) -> Tensor:
        """Return the logits in the client's mode."""
        with torch.no_grad(), in_mode(self.model, training=self.observation.training_mode, seed=0):
            return forward(self.model, params, None, inputs)

    def seen(self) -> tuple[Tensor, Tensor]:
        """Return logits ``(J, classes)`` and features ``(J, D)`` of photographs and, fewer, of noise."""
        if self._seen is not None:
            return self._seen
        photos = self.encoded(_photographs(len(self.inputs), self.observation.image_shape))
        training, parts = self.observation.training_mode, []
        for inputs in (photos, self.inputs):  # apart, since batch norm sees a batch
            for end in self.ends:
                made = logits_layer_inputs(self.model, inputs, params=end, training=training)
                parts.append([part[:: 1 if inputs is photos else 3].double().cpu() for part in made])
        logits, features = (torch.cat(some) for some in zip(*parts, strict=True))
        self._seen = logits, features
        return self._seen

    def logits(self) -> Tensor:
        """Return the logits of noise, at both ends of the client's training."""
        return torch.cat([self.run(end, self.inputs) for end in self.ends])

    def scale(self) -> float:
        """Return by how much the mean gradient that is read is larger than that of a logit."""
        # Every image has the same one for a bias; two are few, and enough for batch norm.
        inputs = self.inputs[:2] if self.head.bias else self.inputs
        steps = [self.run(self.head.nudged(end), inputs) - self.run(end, inputs) for end in self.ends]
        first = torch.cat(steps).double()
        # The difference of two logits stays where log_softmax shifts them all.
        return float((first[:, 0] - (first[:, 1] if first.shape[1] > 1 else 0)).mean())

    def features(self) -> Tensor:
        """Return the mean features ``(D,)`` of noise."""
        training = self.observation.training_mode
        parts = [
            logits_layer_inputs(self.model, self.inputs, params=end, training=training)[1]
            for end in self.ends
        ]
        return torch.cat(parts).double().cpu().mean(0)


def _photographs(count: int, shape: tuple[int, ...]) -> Tensor:
    """Return parts of the embedded photographs ``(N, C, H, W)``; noise where it is not 1 or 3 channels."""
    if len(shape) != 3 or shape[0] not in (1, 3):
        return _noise_images(count, shape)
    channels, height, width = shape
    whole, generator = samples("photos224")[0], torch.Generator().manual_seed(0)
    parts = []
    for k in range(count):
        side = int(torch.randint(32, 225, (1,), generator=generator))
        top, left = torch.randint(225 - side, (2,), generator=generator).tolist()
        part = whole[k % len(whole), None, :, top : top + side, left : left + side]
        parts.append(F.interpolate(part, (height, width), mode="bilinear", antialias=True))
    photos = torch.cat(parts)
    return photos if channels == 3 else photos.mean(1, keepdim=True)


def _noise_images(samples: int, shape: tuple[int, ...]) -> Tensor:
    if len(shape) == 1:
        return blank(shape, samples)
    channels, height, width = shape
    generator = torch.Generator().manual_seed(0)
    parts = []
    for coarse in (1, 4, 8):
        count = -(-samples // 3)
        size = (max(1, min(coarse, height)), max(1, min(coarse, width)))
        noise = torch.rand(count, channels, *size, generator=generator)
        parts.append(F.interpolate(noise, (height, width), mode="bilinear"))
    return torch.cat(parts)


def demixed(
    typical: Typical,
    observation: Observation,
    guesses: Tensor,
    generator: torch.Generator,
    smoothing: float = 0.0,
) -> Demixed | None:
    """Fit the last layer; None where its weight or bias is not there, or the logits are not what it makes."""
    head, gradient = typical.head, typical.head.weight_of(observation, typical.model)
    if not head.bias or gradient is None:
        return None
    (logits, features), params = typical.seen(), typical.ends[0]
    bias, weight = params[head.name].double().cpu().flatten(), head.rows(params[head.names[1]])
    if gradient.shape[1] != features.shape[1] or not torch.allclose(
        features @ weight.T + bias, logits, rtol=1e-3, atol=1e-3 * float(logits.abs().max())
    ):
        return None
    whole = torch.cat([gradient, head.mean(observation, typical.model)[:, None]], 1)
    starts = guesses[torch.arange(MOST) % len(guesses)]
    return demix(weight, bias, whole, features, starts, smoothing=smoothing, generator=generator)


class Simulated:
    """A client's step that cannot turn its update into a gradient, run on random images of chosen labels.

    Attributes:
        factor: from the mean gradient to what the step makes of it; negative where it trains.
        linear: whether the two are as good as parallel.
    """

    def __init__(self, model: nn.Module, observation: Observation, loss: Loss, head: Head) -> None:
        self.model, self.observation, self.loss, self.head = model, observation, loss, head
        images = _noise_images(3 * observation.num_images, observation.image_shape)
        images = images.view(3, observation.num_images, *images.shape[1:]).mean(0)
        self.inputs = observation.normalization.encode(images.to(like(model)))
        self.sent = head.read(observation.update[head.name])
        classes = len(self.sent)
        labels = torch.arange(observation.num_images) % classes
        made, plain = self.run(labels), self.run(labels, FedSGD())
        along = float((made * plain).sum())
        self.factor = along / max(float(plain.square().sum()), 1e-300)
        share = abs(along) / max(float(made.norm() * plain.norm()), 1e-300)
        self.linear = share > 0.95
        if not share > 0.1:
            raise RecoveryError(
                f"what the client's step {words_of(observation.protocol)} makes of random images has nothing "
                "in common with their gradient, and it has no method mean_gradient"
            )

    def run(self, labels: Tensor, client: ClientStep | None = None) -> Tensor:
        """Return what the client sends of the parameter that labels are read off."""
        client = client or self.observation.protocol
        some = self.inputs
        if kind_of(self.loss, len(some), len(self.sent), some) == "signs":
            labels = binary_labels(self.loss, torch.zeros(len(some), len(self.sent)), some).to(some.device)
        with torch.enable_grad(), in_mode(self.model, training=self.observation.training_mode, seed=0):
            update = client(
                self.model,
                some,
                labels.to(some.device),
                params={n: p.clone().requires_grad_() for n, p in trainable_parameters(self.model).items()},
                buffers={n: b.detach().clone() for n, b in self.model.named_buffers()},
                loss=self.loss,
            )
        return self.head.read(update[self.head.name])

    def distance(self, labels: Tensor) -> float:
        """Return one minus the cosine of what these labels make and what was observed."""
        return 1 - float(F.cosine_similarity(self.run(labels).flatten(), self.sent.flatten(), dim=0))

    def tried(self, gradient: Tensor) -> tuple[Tensor, float]:
        """Return the label of one image whose simulated update has the observed direction, and the doubt."""
        rows = gradient if gradient.ndim == 1 else gradient @ gradient[gradient.norm(dim=1).argmax()]
        either = [rows] if gradient.ndim == 1 else [rows, -rows]
        likely = torch.cat([some.argsort()[:_TRIED] for some in either]).unique().tolist()
        far = sorted((self.distance(torch.tensor([label])), label) for label in likely)
        doubt = 0.0 if len(far) == 1 else far[0][0] / max(far[1][0], 1e-300)
        return torch.tensor([far[0][1]]), doubt

    def exchanged(self, labels: Tensor) -> tuple[Tensor, float]:
        """Exchange one label after another while the update comes nearer; return them and the doubt."""
        classes, per_class = len(self.sent), self.sent / self.factor
        per_class = per_class if per_class.ndim == 1 else per_class.sum(1)
        best, counts, rival = self.distance(labels), torch.bincount(labels, minlength=classes), torch.inf
        for _ in range(len(labels)):
            away = [c for c in per_class.argsort(descending=True).tolist() if counts[c] > 0]
            likely = [(a, b) for b in per_class.argsort().tolist() for a in away if a != b][:_TRIED]
            tried = []
            for a, b in likely:
                other = counts.clone()
                other[a] -= 1
                other[b] += 1
                tried.append((self.distance(torch.repeat_interleave(torch.arange(classes), other)), other))
            nearest, other = min(tried, key=lambda one: one[0])
            if nearest >= best:
                rival = nearest
                break
            best, counts, rival = nearest, other, best
        labels = torch.repeat_interleave(torch.arange(classes), counts)
        return labels, max(best / rival if rival > 0 else 1.0, 1e-6)
