"""Batches: one update is the mean of its images' own, so each is chosen, and sought, by itself."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from invlib.attacks.base import known_labels, with_loss
from invlib.attacks.matching import GradientMatching
from invlib.attacks.parts import Parts
from invlib.attacks.shifts import FOUND, REST, SHIFTED, Move, joined, moved, part_of, shifted
from invlib.core.convert import as_labels
from invlib.core.network import in_mode, like, trainable_parameters
from invlib.core.observation import Observation
from invlib.core.reconstruction import Reconstruction
from invlib.errors import ConfigError, RecoveryError
from invlib.search.engines import memory
from invlib.search.problem import Problem
from invlib.settings import Checked, Count, FromZero

_EXACT = 1e-3  # of its length: what may separate the update of a batch from the sum of its images'
_TOGETHER = 32  # images whose gradients are taken at a time, and no more than are in the batch
_COLUMNS = 1 << 16  # of the gradients, in double precision at a time
_STARTS = 8  # random ones of a choice
_GROUP = 3  # restarts, from which on what they agree on is a candidate too
# Parts of the budget for all images together: before the rounds of turns, after each, and at the end.
_SEARCH, _BETWEEN, _LAST = 1 / 6, 1 / 10, 1 / 4


@dataclass(frozen=True, kw_only=True, eq=False)
class Additive:
    """A client's step of which it is known that the updates of single images add up to that of a batch.

    Args:
        model: the model that the client received.
        problem: the step on a batch, and the observed update.
        training: whether the client ran the model in training mode.
        share: the number by which the sum of the updates of each image is the update of the batch: 1/N for
            a loss that is a mean.
    """

    model: nn.Module
    problem: Problem
    training: bool
    share: float = 1.0

    @property
    def target(self) -> Tensor:
        """The sum of the updates of each image, as it was observed, ``(D,)``."""
        return torch.cat([part.flatten() for part in self.problem.target]) / self.share

    def room(self) -> int:
        """Return how many updates fit in a quarter of the memory that is free."""
        size = sum(part.nbytes for part in self.problem.target)
        return memory.available(self.problem.like.device) // (4 * max(size, 1))

    def rows(self, images: Tensor, labels: Tensor) -> Tensor:
        """Return the update of each image alone, as rows ``(M, D)``.

        Args:
            images: ``(M, C, H, W)`` in [0, 1].
            labels: of the images.
        """

        def alone(inputs: Tensor, label: Tensor) -> list[Tensor]:
            return self.problem.update(inputs[None], label[None])

        size, rows = min(_TOGETHER, self.problem.shape[0]), []
        with in_mode(self.model, training=self.training, seed=0):
            for some, of in zip(images.split(size), labels.split(size), strict=True):
                parts = torch.func.vmap(alone, randomness="different")(self.problem.encode(some), of)
                rows.append(torch.cat([part.detach().flatten(1) for part in parts], 1))
        return torch.cat(rows)


def additive(
    model: nn.Module, observation: Observation, labels: Tensor, matching: GradientMatching
) -> Additive:
    """Return the step of a client whose images do not change each other's part of its update.

    That is tried on images of noise, and takes two evaluations.

    Args:
        model: the model that the client received.
        observation: what the server saw, known to fit the model.
        labels: of the images, int64 ``(N,)``.
        matching: says what is compared.

    Raises:
        RecoveryError: they do, as by batch norm in training mode, or with local steps of a size that counts.
    """
    # Log-odds lack the factors with which single images' updates add up.
    problem = replace(matching, log_odds=False).problem(model, observation, labels)
    if not problem.stackable or labels.ndim != 1:
        raise RecoveryError(
            f"the updates of single images are taken of a client that treats each by itself and of classes; "
            f"got {observation.protocol!r} and labels {tuple(labels.shape)}"
        )
    step = Additive(model=model, problem=problem, training=observation.training_mode)
    if step.room() < 2 * len(labels):
        raise RecoveryError(
            f"the updates of {len(labels)} images alone, twice, take more than a quarter of the free memory, "
            f"{memory.words(memory.available(problem.like.device))}"
        )
    noise = torch.rand(problem.shape, generator=torch.Generator().manual_seed(0)).to(problem.like)
    with in_mode(model, training=observation.training_mode, seed=0):
        sent = problem.update(problem.encode(noise), problem.targets(noise, None))
    whole = torch.cat([part.detach().flatten() for part in sent])
    try:
        total = step.rows(noise, labels).sum(0)
    except (ValueError, RuntimeError) as error:  # batch norm of a single image, in-place statistics
        raise RecoveryError(f"the step cannot be taken with one image at a time: {error}") from error
    share = float(whole @ total / (total @ total))
    rest = float((whole - share * total).norm() / whole.norm())
    if not rest <= _EXACT:
        raise RecoveryError(
            f"the update of {len(noise)} images differs by {rest:.1e} of its length from what they send "
            f"alone, added up; expected at most {_EXACT:.0e}: images of a batch are told apart by it"
        )
    return replace(step, share=share)


def products(rows: Tensor) -> Tensor:
    """Return the Gram matrix of rows ``(M, D)`` in double precision."""
    parts = (part.double() for part in rows.split(_COLUMNS, 1))
    return torch.stack([part @ part.T for part in parts]).sum(0)


def choose(
    gram: Tensor, slots: Sequence[Sequence[int]], begun: Sequence[Sequence[int]], generator: torch.Generator
) -> tuple[list[int], float]:
    r"""Choose a candidate for each slot, so that their sum points where the target does.

    .. math:: \min_{c_1 \in S_1, \dots, c_N \in S_N}\; 1 - \cos\big(\textstyle\sum_k g_{c_k},\, g^\ast\big)

    By exchanging one candidate at a time, then two, until nothing helps, from several starts: all in the
    matrix of scalar products.

    Args:
        gram: of the target, which comes last, and the candidates' gradients.
        slots: for each slot the candidates that may stand in it.
        begun: selections to begin with.
        generator: draws others.

    Returns:
        The selection, and its distance of directions.
    """
    gram = gram.cpu()
    along, length = gram[-1, :-1], gram[-1, -1]
    pools = [torch.tensor(list(slot)) for slot in slots]

    def distances(chosen: list[int], places: tuple[int, ...]) -> Tensor:
        """Of all ways to fill one or two slots, the others as they are."""
        rest = [c for k, c in enumerate(chosen) if k not in places]
        beside = gram[rest][:, :-1].sum(0)  # with each candidate, of the rest
        dot, square = along[rest].sum(), beside[rest].sum()
        first, second = pools[places[0]], pools[places[-1]]
        if len(places) == 1:
            dots = dot + along[first]
            squares = square + 2 * beside[first] + gram[first, first]
        else:
            one = 2 * beside + gram.diagonal()[:-1]
            dots = dot + along[first][:, None] + along[second]
            squares = square + one[first][:, None] + one[second] + 2 * gram[first][:, second]
        least = torch.finfo(gram.dtype).tiny
        return 1 - dots / (squares.clamp_min(least) * length.clamp_min(least)).sqrt()

    def improved(chosen: list[int]) -> tuple[list[int], float]:
        best = float(distances(chosen, (0,))[slots[0].index(chosen[0])])
        singles = [(k,) for k in range(len(slots))]
        moves: list[tuple[int, ...]] = [*singles, *itertools.combinations(range(len(slots)), 2)]
        place, since = 0, 0
        while since < len(moves):
            places = moves[place]
            table = distances(chosen, places)
            least = int(table.argmin())
            if float(table.flatten()[least]) < best - 1e-12:
                best, since = float(table.flatten()[least]), 0
                where = divmod(least, table.shape[1]) if len(places) == 2 else (least,)
                for k, index in zip(places, where, strict=True):
                    chosen[k] = int(pools[k][index])
                place = -1
            place, since = (place + 1) % len(moves), since + 1
        return chosen, best

    drawn = [
        [int(pool[torch.randint(len(pool), (), generator=generator)]) for pool in pools]
        for _ in range(_STARTS)
    ]
    found = [improved(list(start)) for start in (*begun, *drawn)]
    return min(found, key=lambda one: one[1])


@dataclass(frozen=True, kw_only=True)
class Batching(Checked):
    """A search for the images of a batch: together, then in rounds by turns, alone in what the others leave.

    The update of N images is a multiple of the sum of their own. What is left when the updates of all
    images but one are taken away is therefore a single image's, and a search for that does not have to wait
    for images with larger gradients. Among all copies of it, shifted or from other restarts, the batch is
    chosen whose update is nearest.

    Args:
        search: the whole search, of all images together.
        places: where shifted copies lie, as `invlib.attacks.shifts.moves` gives them.
        copies: how many of them are compared with the picture where it is, at a time.
        stage: steps of a stage.
        per_step: evaluations in a step.
    """

    search: GradientMatching
    places: tuple[Move, ...]
    copies: FromZero
    stage: Count
    per_step: Count

    def run(self, step: Additive, observation: Observation, parts: Parts) -> Reconstruction:
        """Attack an observation; errors as for `invlib.GradientMatching`.

        Args:
            step: the client's.
            observation: what the server saw.
            parts: runs the searches.
        """
        search, result = self.search, None
        first = max(2 * self.stage, round(_SEARCH * search.steps))
        again = max(1, round(_BETWEEN * search.steps))
        # A stage for each copy and another for the best, and an evaluation for each candidate.
        turns = (self.copies + 2) * self.stage + (2 * len(self.places) + 4) / self.per_step
        rounds = max(0, int(((1 - _LAST) * search.steps - first) / (turns + again)))
        spent = 0.0

        def together(low: float, high: float, steps: int, **settings: object) -> Reconstruction:
            part = replace(part_of(search, low, high), steps=steps, **settings)  # type: ignore[arg-type]
            return parts.run(
                part, observation, spent=round(spent), steps=search.steps, name="gradient matching"
            )

        try:
            result = together(0, FOUND, first)
            spent += first
            assert result.labels is not None
            known = replace(observation, labels=result.labels)
            score_of = search.scorer(step.model, known, result.labels)
            for turn in range(rounds):
                if result.status != "max_steps":
                    break
                low, high = (FOUND + (SHIFTED - FOUND) * (turn + k) / rounds for k in (0, 1))
                pool = result.trials if turn == 0 else result.images[None]
                images, asked = self._by_turns(step, known, parts, pool, (low, high), spent)
                result = moved(result, images, score_of(images))
                result = replace(result, evaluations=result.evaluations + asked + 1)
                spent += turns
                after = together(low, high, again, init=images, restarts=1)
                result = joined(result, after, round(spent), 0)
                spent += again
            if result.status == "max_steps":
                left, low = max(1, int(search.steps - spent)), REST if rounds else FOUND
                after = together(low, 1, left, init=result.images, restarts=1)
                result = joined(result, after, round(spent), 0)
        except KeyboardInterrupt:
            if result is None:
                raise
            result = replace(result, status="interrupted")
        return result

    def _by_turns(
        self,
        step: Additive,
        known: Observation,
        parts: Parts,
        pool: Tensor,
        sharpness: tuple[float, float],
        spent: float,
    ) -> tuple[Tensor, int]:
        """Choose among restarts and shifted copies, then search for one image after another.

        Args:
            step: the client's.
            known: what the server saw, with labels.
            parts: runs the searches.
            pool: batches to choose from ``(R, N, C, H, W)``.
            sharpness: the part of the whole search, from 0 to 1, whose sharpness is taken.
            spent: steps before.

        Returns:
            The images, and how many evaluations that took.
        """
        labels, count = known.labels, known.num_images
        assert labels is not None
        if len(pool) >= _GROUP:
            pool = torch.cat([pool, agreed(pool)[None]])
        copies = [shifted(pool.flatten(0, 1), place).view_as(pool) for place in self.places]
        before, old, _ = selected(step, torch.cat([pool, *copies]), labels, whole=len(pool))
        images, new, asked = before.clone(), old.clone(), len(pool) * (1 + len(copies))
        turn, singles = (self.copies + 2) * self.stage, 0
        for done, k in enumerate(new.norm(dim=1).argsort(descending=True).tolist()):
            rest = step.target - (new.sum(0) - new[k])
            starts, label = images[k : k + 1], labels[k : k + 1]
            if self.copies and self.places:
                others = torch.cat([shifted(starts, place) for place in self.places])
                near = F.cosine_similarity(step.rows(others, label.expand(len(others))), rest[None])
                starts = torch.cat([starts, others[near.topk(min(self.copies, len(others))).indices]])
                singles += len(others)
            part = replace(
                part_of(self.search, *sharpness),
                steps=2 * self.stage,
                init=starts[:, None],
                restarts=len(starts),
                prune=len(starts) > 1,
            )

            def together(image: Tensor, k: int = k) -> Tensor:
                return torch.cat([images[:k], image, images[k + 1 :]])

            found = parts.run(
                part,
                replace(known, update=_named(step.model, rest), num_images=1, labels=label),
                spent=round(spent + turn * done / count),
                steps=self.search.steps,
                name="one image",
                within=(together, count),
            )
            singles += found.evaluations + 1
            if found.status == "interrupted":
                raise KeyboardInterrupt
            images[k] = found.images[0]
            new[k] = step.rows(images[k : k + 1], label)[0]
        chosen = selected(step, torch.stack([before, images]), labels, whole=2, rows=torch.cat([old, new]))
        return chosen[0], asked + math.ceil(singles / count)


def selected(
    step: Additive, batches: Tensor, labels: Tensor, *, whole: int, rows: Tensor | None = None
) -> tuple[Tensor, Tensor, float]:
    """Choose for each slot one image out of many batches, as `choose` does.

    Args:
        step: the client's.
        batches: ``(B, N, C, H, W)`` in [0, 1].
        labels: of the images of each batch, int64 ``(N,)``; an image may stand in any slot of its label.
        whole: how many of the batches, from the first on, a choice begins with.
        rows: the update of each image, where it is known.

    Returns:
        The images ``(N, C, H, W)``, the update of each, and their distance of directions.
    """
    count, images = len(labels), batches.flatten(0, 1)
    owners = labels.repeat(len(batches))
    rows = step.rows(images, owners) if rows is None else rows
    slots = [(owners == label).nonzero().flatten().tolist() for label in labels]
    begun = [list(range(first, first + count)) for first in range(0, whole * count, count)]
    gram = products(torch.cat([rows, step.target[None]]))
    chosen, distance = choose(gram, slots, begun, torch.Generator().manual_seed(0))
    return images[chosen], rows[chosen], distance


def agreed(pool: Tensor) -> Tensor:
    """Return what restarts agree on: of each slot the median of their images, moved to lie on the first's.

    By how much an image is moved is read off its circular correlation with the first one.

    Args:
        pool: batches ``(R, N, C, H, W)``.

    Returns:
        Images ``(N, C, H, W)``.

    Source: group consistency, Yin et al. 2021, arXiv 2104.07586, here as a candidate and not as a prior.
    """
    spectrum = torch.fft.rfft2((pool - pool.mean((-1, -2), keepdim=True)).sum(2))
    likeness = torch.fft.irfft2(spectrum[:1] * spectrum.conj(), s=pool.shape[-2:]).flatten(2)
    places = likeness.argmax(2)
    moved = torch.empty_like(pool)
    for r, k in itertools.product(*map(range, pool.shape[:2])):
        place = divmod(int(places[r, k]), pool.shape[-1])
        moved[r, k] = pool[r, k].roll(place, (-2, -1))
    return moved.median(0).values


def hidden_images(step: Additive, found: Reconstruction) -> list[str]:
    """Return the doubt about images whose own updates are shorter than what the whole batch leaves over.

    Args:
        step: the client's.
        found: images of the batch, and their labels.
    """
    assert found.labels is not None
    rows, target = step.rows(found.images, found.labels).double(), step.target.double()
    total = rows.sum(0)
    factor = total @ target / (total @ total)
    rest, sizes = float((target - factor * total).norm()), factor * rows.norm(dim=1)
    hidden = [str(k) for k, size in enumerate(sizes.tolist()) if size < rest]
    if not hidden:
        return []
    return [
        f"of the update's length {rest / float(target.norm()):.0%} is unexplained, which is more than all "
        f"that image{'s' * (len(hidden) > 1)} {', '.join(hidden)} of the {len(sizes)} would add to it: "
        "nothing shows that their pictures are right"
    ]


@torch.inference_mode(mode=False)
def crossover(
    model: nn.Module, observation: Observation, batches: Tensor, labels: Tensor | None = None
) -> tuple[Tensor, float]:
    r"""Put a batch together from the best images of several, by what each adds to the update.

    The update of N images is a multiple of the sum of their own, so that all :math:`(R N)^N` batches that
    the images of R restarts make up are compared in one matrix of scalar products, for the price of R
    evaluations. An image may go to any slot of its label.

    Args:
        model: the model that the client received; it is not changed.
        observation: what the server saw.
        batches: ``(R, N, C, H, W)`` in [0, 1], such as `Reconstruction.trials`, and shifted copies of them.
        labels: of the images of each batch, int64 ``(N,)``; None takes those of the observation, or infers
            them.

    Returns:
        The images ``(N, C, H, W)``, and one minus the cosine of their update and the observed one. The
        search exchanges one or two images at a time, from the batches and some random ones; it never
        returns a batch that is worse than all that were given.

    Raises:
        ObservationError: the observation does not fit the model.
        ConfigError: batches or labels are of another shape.
        RecoveryError: images of a batch change each other's part of the update, as by batch norm in training
            mode; labels are hidden and cannot be inferred.

    Taught in: chapter 5
    """
    model = observation.validate(model)
    shape = (observation.num_images, *observation.image_shape)
    if not isinstance(batches, Tensor) or batches.ndim != 5 or batches.shape[1:] != shape or not len(batches):
        got = tuple(batches.shape) if isinstance(batches, Tensor) else type(batches).__name__
        raise ConfigError(f"batches is {got}; expected a tensor (R, {', '.join(map(str, shape))})")
    observation = with_loss(F.cross_entropy, observation)
    labels = (
        known_labels(model, observation)
        if labels is None
        else as_labels(labels, classes_only=True).to(like(model).device)
    )
    step = additive(model, observation, labels, GradientMatching())
    images, _, distance = selected(step, batches.to(like(model)), labels, whole=len(batches))
    return images, distance


def _named(model: nn.Module, flat: Tensor) -> dict[str, Tensor]:
    own = trainable_parameters(model)
    parts = flat.split([p.numel() for p in own.values()])
    return {name: part.view_as(p) for (name, p), part in zip(own.items(), parts, strict=True)}
