"""Train a network of the zoo, and keep it with a model card that says how it was made."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from invlib.core.files import check_writable
from invlib.core.network import in_mode
from invlib.core.normalization import Normalization
from invlib.errors import ConfigError, DeviceError, DoubtWarning
from invlib.models import cards, zoo
from invlib.models.cards import Trained, load, save
from invlib.models.decoder import TextDecoder
from invlib.optim.schedules import StepDecay
from invlib.settings import Count, Positive, Seed, checks

__all__ = ["Trained", "accuracy", "load", "next_word", "save", "train", "train_text"]

_WARM_UP = 0.05  # of all steps
_RATES = {"conservative": 0.1, "adam": 3e-3}


@checks
def train(
    model_name: str,
    images: Tensor,
    labels: Tensor,
    val_images: Tensor,
    val_labels: Tensor,
    *,
    normalization: Normalization,
    strategy: Literal["conservative", "adam"] = "conservative",
    epochs: Count,
    batch_size: Count = 128,
    lr: Positive | None = None,
    seed: Seed = 0,
    num_classes: Count | None = None,
    activation: str | None = None,
    batch_norm: bool = True,
    augment: bool = True,
    precision: Literal["float32", "bfloat16"] = "float32",
    half: bool = False,
    device: str | torch.device = "cpu",
    resume: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> Trained:
    r"""Train a network of the zoo for classification.

    ``"conservative"`` is stochastic gradient descent at :math:`\eta = 0.1` with Nesterov momentum 0.9 and
    weight decay :math:`5 \cdot 10^{-4}`; :math:`\eta` drops tenfold after 3/8, 5/8 and 7/8 of the epochs
    (the training recipe of Geiping et al., 2020, arXiv 2003.14053). ``"adam"`` is AdamW (Loshchilov and
    Hutter, 2019, arXiv 1711.05101) with a linear warm-up over the first 5 % of the steps and cosine decay
    from :math:`\eta = 3 \cdot 10^{-3}`. All chance comes from `seed`; global random state stays as it was.

    Args:
        model_name: a name that `invlib.models.build` knows.
        images: training images (N, C, H, W) in [0, 1].
        labels: int64 (N,).
        val_images: images (M, C, H, W) in [0, 1] that the accuracy is measured on.
        val_labels: int64 (M,).
        normalization: what the network's input is encoded with.
        strategy: ``"conservative"`` or ``"adam"``.
        epochs: passes over the training images.
        batch_size: images a step; an incomplete last batch is left out.
        lr: another initial learning rate than the strategy's.
        seed: for the initial weights, the order of the images and the augmentation.
        num_classes: outputs of the network; the largest label and one where None.
        activation: as for `invlib.models.build`.
        batch_norm: likewise.
        augment: shift each image by up to 4 pixels (black comes in) and mirror half of them.
        precision: ``"float32"``, or ``"bfloat16"`` for convolutions and products in half as many bits, which
            takes half the time on processors that have them; the weights stay in float32.
        half: round the trained weights to float16, in which `save` then keeps them, and measure the accuracy
            then.
        device: where to train; the returned model is on the CPU.
        resume: a checkpoint file, written after every epoch; where it exists, training goes on from it, and
            ends at the same weights as without the interruption.
        progress: show a progress bar.

    Returns:
        The network in evaluation mode and its card.

    Raises:
        ConfigError: where a setting is out of range, the checkpoint is of another training, or the loss or a
            weight became infinite or not a number.
        DataError: where the checkpoint is corrupt, or cannot be written, which is tried first of all.
        DeviceError: where `device` is a GPU and there is none.

    Warns where the accuracy at the end is one that the same answer for every image may have, too.

    Taught in: chapter 3
    """
    num_classes = _classes(num_classes, ("training", images, labels), ("validation", val_images, val_labels))
    _gpus(device)
    batch_size = min(batch_size, len(images))
    lr = _RATES[strategy] if lr is None else lr
    model = zoo.build(
        model_name,
        num_classes=num_classes,
        in_channels=images.shape[1],
        image_size=images.shape[2],
        seed=seed,
        activation=activation,
        batch_norm=batch_norm,
    ).to(device)
    # a quarter faster on a CPU than the default order of the numbers
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    card: dict[str, Any] = {
        "model": model_name,
        "num_classes": num_classes,
        "in_channels": images.shape[1],
        "image_size": images.shape[2],
        "activation": activation,
        "batch_norm": any(isinstance(module, nn.BatchNorm2d) for module in model.modules()),
        "normalization": {"mean": list(normalization.mean), "std": list(normalization.std)},
        "strategy": strategy,
        "lr": lr,
        "epochs": epochs,
        "batch_size": batch_size,
        "augment": augment,
        "precision": precision,
        "seed": seed,
        "train_images": len(images),
    }

    def loss(x: Tensor, y: Tensor) -> Tensor:
        inputs = normalization.encode(x).contiguous(memory_format=torch.channels_last)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=precision == "bfloat16"):
            logits = model(inputs)
        return F.cross_entropy(logits.float(), y)

    trained = _fit(
        model,
        card,
        steps=len(images) // batch_size,
        batches=lambda generator: _batches(images, labels, batch_size, augment, generator),
        loss=loss,
        measure=lambda: {"accuracy": accuracy(model, val_images, val_labels, normalization=normalization)},
        half=half,
        resume=resume,
        progress=progress,
    )
    _warn_of_chance(model_name, trained.card["accuracy"], val_labels)
    return Trained(model=trained.model, card=trained.card | {"test_images": len(val_images)})


@checks
def train_text(
    model_name: str,
    tokens: Tensor,
    sentences: Sequence[Tensor],
    *,
    num_classes: Count,
    strategy: Literal["conservative", "adam"] = "adam",
    epochs: Count,
    batch_size: Count = 32,
    lr: Positive | None = None,
    seed: Seed = 0,
    activation: str | None = None,
    half: bool = False,
    device: str | torch.device = "cpu",
    resume: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> Trained:
    """Train a TextDecoder to predict the next word after every word of a text.

    The text is cut into windows as long as the network has places, elsewhere in every epoch. Unknown words
    (number 1) are read, and never predicted.

    Args:
        model_name: ``"TextDecoder"``.
        tokens: the text, int64 (T,), as of `invlib.data.text.encode`.
        sentences: texts that are not in it, int64 (T,) each, which accuracy and perplexity are measured on.
        num_classes: words of the vocabulary.
        strategy: as for `train`.
        epochs: passes over the text.
        batch_size: windows a step.
        lr: as for `train`.
        seed: for the initial weights, the windows and dropout.
        activation: as for `train`.
        half: as for `train`.
        device: as for `train`.
        resume: as for `train`.
        progress: as for `train`.

    Returns:
        The network in evaluation mode and its card; ``accuracy`` is the share of words that the network puts
        first, ``perplexity`` the exponential of the mean loss.

    Raises:
        ConfigError: another network, a short text or one with words outside the vocabulary; as for `train`.
        DataError: as for `train`.
        DeviceError: as for `train`.
    """
    model = zoo.build(model_name, num_classes=num_classes, seed=seed, activation=activation)
    if not isinstance(model, TextDecoder):
        raise ConfigError(f"model is {model_name!r}; expected 'TextDecoder' to train on text")
    window = model.position_embedding.num_embeddings + 1
    for text in (tokens, *sentences):
        if text.dtype != torch.int64 or text.ndim != 1 or len(text) < 2:
            raise ConfigError(f"text is {text.dtype} {tuple(text.shape)}; expected int64 (T,) with T >= 2")
        if not 0 <= int(text.min()) <= int(text.max()) < num_classes:
            raise ConfigError(
                f"tokens run from {int(text.min())} to {int(text.max())}; expected 0 to {num_classes - 1}"
            )
    rows = len(tokens) // window - 1
    if rows < batch_size:
        raise ConfigError(
            f"the text has {len(tokens)} tokens; expected {(batch_size + 1) * window} or more for "
            f"batch_size={batch_size}"
        )
    _gpus(device)
    model.to(device)
    card: dict[str, Any] = {
        "model": model_name,
        "num_classes": num_classes,
        "activation": activation,
        "strategy": strategy,
        "lr": _RATES[strategy] if lr is None else lr,
        "epochs": epochs,
        "batch_size": batch_size,
        "seed": seed,
        "train_words": len(tokens),
    }

    def batches(generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        start = int(torch.randint(window, (), generator=generator))
        windows = tokens[start : start + rows * window].view(rows, window)
        order = torch.randperm(rows, generator=generator)[: rows // batch_size * batch_size]
        for chosen in order.split(batch_size):
            yield windows[chosen, :-1], windows[chosen, 1:]

    trained = _fit(
        model,
        card,
        steps=rows // batch_size,
        batches=batches,
        loss=lambda x, y: F.cross_entropy(
            model.head(model.features(x)).flatten(0, 1), y.masked_fill(y == 1, -100).flatten()
        ),
        measure=lambda: next_word(model, sentences),
        half=half,
        resume=resume,
        progress=progress,
    )
    return Trained(model=trained.model, card=trained.card | {"test_sentences": len(sentences)})


def _fit(
    model: nn.Module,
    card: dict[str, Any],
    *,
    steps: int,
    batches: Callable[[torch.Generator], Iterator[tuple[Tensor, Tensor]]],
    loss: Callable[[Tensor, Tensor], Tensor],
    measure: Callable[[], dict[str, float]],
    half: bool,
    resume: str | os.PathLike[str] | None,
    progress: bool,
) -> Trained:
    """Train a network as its card says; `steps` are those of an epoch, `measure` looks at it after each."""
    device = next(model.parameters()).device
    gpus = _gpus(device)
    commit = cards.commit()  # now: after hours the checkout may be another one
    name, strategy, lr, epochs, seed = (card[k] for k in ("model", "strategy", "lr", "epochs", "seed"))
    if resume is not None:
        check_writable(Path(resume))  # now, and not after the first epoch
    optimizer = _optimizer(strategy, model, lr)
    history: list[dict[str, float]] = []
    if resume is not None and Path(resume).exists():
        history = cards.read_checkpoint(Path(resume), card, model, optimizer)
    done, total = len(history) * steps, epochs * steps
    with tqdm(total=total, initial=done, disable=not progress, desc=name) as bar:
        for epoch in range(len(history), epochs):
            # one seed an epoch: a resumed training draws what the uninterrupted one would have drawn
            stream = (seed * 1_000_003 + epoch + 1) % 2**63
            losses = torch.zeros((), device=device)
            model.train()
            with torch.random.fork_rng(devices=gpus):
                # layers such as dropout draw from the global generators, which fork_rng puts back
                torch.default_generator.manual_seed(stream)
                if gpus:
                    torch.cuda.manual_seed(stream)
                for x, y in batches(torch.Generator().manual_seed(stream)):
                    for group in optimizer.param_groups:
                        group["lr"] = lr * _schedule(strategy, (done + 0.5) / total)
                    optimizer.zero_grad()
                    value = loss(x.to(device), y.to(device))
                    value.backward()
                    optimizer.step()
                    losses += value.detach()
                    done += 1
                    bar.update()
            mean_loss = float(losses) / steps
            bad = f"the loss became {mean_loss}" if not math.isfinite(mean_loss) else cards.not_finite(model)
            if bad:
                raise ConfigError(
                    f"{name}: {bad} {'' if ' ' in bad else 'became infinite or not a number '}in epoch "
                    f"{epoch + 1} with strategy={strategy!r}, lr={lr}; expected finite numbers, as from a "
                    "lower lr"
                )
            measured = measure()
            history.append({"epoch": epoch + 1, "loss": round(mean_loss, 6), **measured})
            bar.set_postfix(loss=f"{mean_loss:.3f}", accuracy=f"{measured['accuracy']:.4f}")
            if resume is not None:
                cards.write_checkpoint(Path(resume), card, model, optimizer, history)
    measured = {key: value for key, value in history[-1].items() if key not in ("epoch", "loss")}
    about = {"history": history, "device": device.type, "commit": commit, "torch": torch.__version__}
    if half:
        model.half().float()
        measured, about["stored"] = measure(), "float16"
    model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    return Trained(model=model.cpu().eval(), card=card | measured | about)


@torch.no_grad()
@checks
def accuracy(
    model: nn.Module, images: Tensor, labels: Tensor, *, normalization: Normalization, batch_size: Count = 500
) -> float:
    """Return the share of images that the network, in evaluation mode, puts into their class.

    Args:
        model: the network; its mode is as before afterwards.
        images: (N, C, H, W) in [0, 1].
        labels: int64 (N,).
        normalization: what the network's input is encoded with.
        batch_size: images at a time.

    Taught in: chapter 3
    """
    device = next(model.parameters()).device
    right = 0
    with in_mode(model, training=False):
        for x, y in zip(images.split(batch_size), labels.split(batch_size), strict=True):
            right += int((model(normalization.encode(x.to(device))).argmax(1) == y.to(device)).sum())
    return right / len(images)


@torch.no_grad()
def next_word(model: TextDecoder, sentences: Sequence[Tensor]) -> dict[str, float]:
    """Return how well a network predicts each word of a text from those before it, in evaluation mode.

    Args:
        model: the network; its mode is as before afterwards.
        sentences: int64 (T,) each, T at least 2.

    Returns:
        ``accuracy``, the share of words put first, and ``perplexity``.
    """
    device = next(model.parameters()).device
    right, loss, words = 0, 0.0, 0
    with in_mode(model, training=False):
        for length in sorted({len(sentence) for sentence in sentences}):
            rows = torch.stack([s for s in sentences if len(s) == length]).to(device)
            logits, target = model.head(model.features(rows[:, :-1])).flatten(0, 1), rows[:, 1:].flatten()
            right += int((logits.argmax(1) == target).sum())
            loss += float(F.cross_entropy(logits, target, reduction="sum"))
            words += len(target)
    return {"accuracy": round(right / words, 4), "perplexity": round(math.exp(loss / words), 2)}


def _warn_of_chance(model_name: str, accuracy: float, labels: Tensor) -> None:
    """Warn where the accuracy is one that the same answer for every image may have, too."""
    share = float(labels.bincount().max()) / len(labels)
    if share < 1 and accuracy <= share + 2 * math.sqrt(share * (1 - share) / len(labels)):
        warnings.warn(
            f"{model_name}: the accuracy is {accuracy:.1%} on {len(labels)} images, where the same answer to "
            f"all would have {share:.1%}: the network may have learnt nothing",
            DoubtWarning,
            stacklevel=3,
        )


def _classes(num_classes: int | None, *parts: tuple[str, Tensor, Tensor]) -> int:
    """Check the images and labels of both parts, and return how many classes there are."""
    for what, x, y in parts:
        if not (isinstance(x, Tensor) and isinstance(y, Tensor)):
            kinds = f"{type(x).__name__} and {type(y).__name__}"
            raise ConfigError(f"{what} images and labels are {kinds}; expected tensors")
        if x.ndim != 4 or y.shape != x.shape[:1] or not len(x):
            raise ConfigError(
                f"{what} images have shape {tuple(x.shape)} and labels {tuple(y.shape)}; "
                "expected (N, C, H, W) and (N,), N at least 1"
            )
        low, high = float(x.min()), float(x.max())
        if not x.is_floating_point() or not (low >= 0 and high <= 1):  # so written that NaN fails too
            raise ConfigError(
                f"{what} images are {x.dtype} and lie in [{low:.4g}, {high:.4g}]; expected floating point in "
                "[0, 1]"
            )
        if y.dtype != torch.int64:
            raise ConfigError(f"{what} labels are {y.dtype}; expected int64")
    if parts[0][1].shape[1:] != parts[1][1].shape[1:]:
        shapes = " and ".join(str(tuple(x.shape[1:])) for _, x, _ in parts)
        raise ConfigError(f"training and validation images have shapes {shapes}; expected the same")
    count = int(parts[0][2].max()) + 1 if num_classes is None else num_classes
    for _, _, y in parts:
        if int(y.min()) < 0 or int(y.max()) >= count:
            raise ConfigError(
                f"labels run from {int(y.min())} to {int(y.max())}; "
                f"expected 0 to {count - 1} (num_classes={count})"
            )
    return count


def _optimizer(strategy: str, model: nn.Module, lr: float) -> torch.optim.Optimizer:
    if strategy == "adam":
        return torch.optim.AdamW(model.parameters(), lr=lr)
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, nesterov=True, weight_decay=5e-4)


def _schedule(strategy: str, done: float) -> float:
    """Return the factor on the learning rate when the part `done` of all steps is over."""
    if strategy == "adam":
        return min(1.0, done / _WARM_UP) * 0.5 * (1 + math.cos(math.pi * done))
    decay = StepDecay()
    return decay.gamma ** sum(done >= part for part in decay.at)


def _batches(
    images: Tensor, labels: Tensor, batch_size: int, augment: bool, generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    order = torch.randperm(len(images), generator=generator)
    for chosen in order[: len(images) // batch_size * batch_size].split(batch_size):
        x = images[chosen]
        yield (_augmented(x, generator) if augment else x), labels[chosen]


def _augmented(x: Tensor, generator: torch.Generator, shift: int = 4) -> Tensor:
    """Shift every image on its own by up to `shift` pixels and mirror half of them."""
    count, channels, height, width = x.shape
    top, left = torch.randint(0, 2 * shift + 1, (2, count, 1), generator=generator)
    columns = torch.arange(width).expand(count, width)
    mirrored = torch.rand(count, 1, generator=generator) < 0.5
    columns = torch.where(mirrored, columns.flip(1), columns) + left
    rows = torch.arange(height) + top
    padded = F.pad(x, (shift,) * 4)
    return padded[
        torch.arange(count)[:, None, None, None],
        torch.arange(channels)[:, None, None],
        rows[:, None, :, None],
        columns[:, None, None, :],
    ]


def _gpus(device: str | torch.device) -> list[torch.device]:
    """Return the devices whose random state training touches, besides the CPU's."""
    if torch.device(device).type != "cuda":
        return []
    if not torch.cuda.is_available():
        raise DeviceError(f"device={str(device)!r} was asked for, but torch finds no GPU; expected 'cpu'")
    return [torch.device(device)]
