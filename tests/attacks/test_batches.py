"""Images of a batch are told apart by what each adds to the update, and chosen and sought by themselves."""

import itertools
from dataclasses import replace

import pytest
import torch
from torch import nn

import invlib as iv
from invlib.attacks import auto, batches
from invlib.attacks.batches import additive, agreed, choose, crossover, hidden_images, products, selected
from invlib.attacks.shifts import moves, shifted
from invlib.errors import ConfigError, RecoveryError


def net():
    """Two strides of two and a mean over all places, with batch norm."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, 6, 3, stride=2, padding=1),
            nn.BatchNorm2d(6),
            nn.ReLU(),
            nn.Conv2d(6, 8, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(8, 5),
        ).double()


def batch(n, *, seed=0):
    draw = torch.Generator().manual_seed(seed)
    rough = torch.rand(n, 3, 4, 4, generator=draw, dtype=torch.float64)
    return torch.nn.functional.interpolate(rough, size=16, mode="bicubic").clamp(0, 1)


def see(model, x, y, **settings):
    return iv.observe(model, x, torch.tensor(y), iv.FedSGD(), normalization=iv.CIFAR10, **settings)


def distance(gram, chosen):
    square = gram[chosen][:, chosen].sum()
    return float(1 - gram[-1, chosen].sum() / (square * gram[-1, -1]).sqrt())


def test_updates_of_single_images_are_those_of_clients_with_one():
    model, x, y = net(), batch(3), [0, 1, 1]
    seen = see(model, x, y)
    step = additive(model, seen, torch.tensor(y), iv.GradientMatching())
    assert step.share == pytest.approx(1 / 3)
    for row, image, label in zip(step.rows(x, torch.tensor(y)), x, y, strict=True):
        alone = see(model, image[None], [label])
        slow = torch.cat([alone.update[name].flatten() for name, _ in model.named_parameters()])
        torch.testing.assert_close(row, slow)


def test_of_few_candidates_the_choice_is_that_of_trying_all():
    draw = torch.Generator().manual_seed(0)
    for _ in range(20):
        rows = torch.randn(10, 6, generator=draw, dtype=torch.float64)
        gram = products(rows)
        slots = [[0, 3, 6], [1, 4, 7], [2, 5, 8]]
        least = min(distance(gram, list(some)) for some in itertools.product(*slots))
        chosen, found = choose(gram, slots, [[0, 1, 2]], draw)
        assert found == pytest.approx(least) == pytest.approx(distance(gram, chosen))


@pytest.mark.parametrize("y", [[0, 1, 2, 3], [1, 1, 2, 1]], ids=["distinct", "equal"])
def test_images_that_are_among_decoys_are_found(y):
    model, x = net(), batch(4)
    seen = see(model, x, y)
    # Each image is in another restart, and those of equal labels in each other's slot.
    batches = torch.stack([batch(4, seed=k) for k in range(1, 7)])
    batches[0, 0], batches[2, 2], batches[3, 1], batches[5, 3] = x[0], x[2], x[1], x[3]
    if y[1] == y[3]:
        batches[3, 3], batches[5, 1], batches[3, 1], batches[5, 3] = x[1], x[3], *batch(2, seed=9)
    found, score = crossover(model, seen, batches)
    assert score < 1e-6
    assert {image.sum().item() for image in found} == {image.sum().item() for image in x}


def test_the_order_of_candidates_changes_nothing():
    model, x, y = net(), batch(2), [3, 1]
    seen = see(model, x, y)
    batches = torch.stack([batch(2, seed=k) for k in range(1, 5)])
    found, score = crossover(model, seen, batches)
    other, again = crossover(model, seen, batches.flip(0))
    assert torch.equal(found, other)
    assert score == pytest.approx(again)
    assert score == pytest.approx(iv.GradientMatching().score(model, seen, found, torch.tensor(y)), abs=1e-6)


def test_an_image_stays_with_its_label():
    model, x = net(), batch(2)
    # Two images of one class, which would both be taken where labels did not count.
    batches = torch.stack([x, batch(2, seed=1)])
    batches[1, 0] = x[1]
    found, _ = crossover(model, see(model, x, [0, 0]), batches, torch.tensor([0, 1]))
    assert any(torch.equal(found[0], image) for image in batches[:, 0])
    assert any(torch.equal(found[1], image) for image in batches[:, 1])
    assert not torch.equal(found[0], found[1])


def test_images_that_are_shifted_by_the_stride_are_put_right_in_one_jump():
    model, x, y = net(), batch(3), torch.tensor([0, 1, 2])
    places = moves(model, see(model, x, y.tolist()))
    assert places
    # A spot in a corner, which the border tells from one elsewhere, in a frame of one colour.
    spots, x = x[..., :3, :3].clone(), torch.full_like(x, 0.5)
    astray = x.clone()
    x[..., :3, :3] = spots
    for k, (down, across) in enumerate([(0, 4), (0, 0), (4, 8)]):
        astray[k, :, down : down + 3, across : across + 3] = spots[k]
    seen = see(model, x, y.tolist())
    step = additive(model, seen, y, iv.GradientMatching())
    copies = torch.stack([astray, *(shifted(astray, place) for place in places)])
    found, _, score = selected(step, copies, y, whole=1)
    assert torch.equal(found, x)
    assert score < 1e-6


def test_images_that_change_each_others_part_are_refused():
    model, x = net(), batch(3)
    seen = see(model, x, [0, 1, 2], training_mode=True)
    with pytest.raises(RecoveryError, match=r"differs by .* alone, added up; expected at most 1e-03"):
        crossover(model, seen, x[None])
    # Without batch norm training mode changes nothing.
    plain = nn.Sequential(nn.Conv2d(3, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(392, 5)).double()
    crossover(plain, see(plain, x, [0, 1, 2], training_mode=True), x[None])
    local = iv.observe(
        plain, x, torch.tensor([0, 1, 2]), iv.FedAvg(lr=0.1, epochs=3), normalization=iv.CIFAR10
    )
    with pytest.raises(RecoveryError, match="added up"):
        crossover(plain, local, x[None])


def test_without_room_for_the_updates_of_single_images_there_is_none(monkeypatch):
    model, x = net(), batch(3)
    seen = see(model, x, [0, 1, 2])
    size = sum(part.nbytes for part in seen.update.values())
    monkeypatch.setattr("invlib.search.engines.memory.available", lambda device: 4 * 5 * size)
    with pytest.raises(RecoveryError, match="updates of 3 images alone, twice, take more than a quarter"):
        crossover(model, seen, x[None])


def test_batches_of_another_shape_are_refused():
    model, x = net(), batch(3)
    with pytest.raises(
        ConfigError, match=r"batches is \(3, 3, 16, 16\); expected a tensor \(R, 3, 3, 16, 16\)"
    ):
        crossover(model, see(model, x, [0, 1, 2]), x)


def test_what_restarts_agree_on_is_nearer_than_each_of_them():
    x, draw = batch(2), torch.Generator().manual_seed(0)
    places = [(0, 0), (4, 0), (0, 12), (8, 4), (0, 0)]
    noisy = [x + 0.1 * torch.randn(x.shape, generator=draw, dtype=x.dtype) for _ in places]
    pool = torch.stack([one.roll(place, (-2, -1)) for one, place in zip(noisy, places, strict=True)])
    far = (torch.stack(noisy) - x).square().mean((2, 3, 4)).amin(0)
    near = (agreed(pool) - x).square().mean((1, 2, 3))
    assert (near < 0.6 * far).all()
    assert torch.equal(agreed(x.expand(3, *x.shape)), x)


def test_images_that_hardly_show_in_the_update_are_named():
    model, x, y = net(), batch(2), [0, 3]
    with torch.no_grad():
        model[7].bias[3] += 12  # the network is sure of the second image's label
    seen = see(model, x, y)
    labels = torch.tensor(y)
    step = additive(model, seen, labels, iv.GradientMatching())
    found = iv.GradientMatching(steps=1)(model, replace(seen, labels=labels))
    assert hidden_images(step, replace(found, images=x)) == []
    near = torch.stack([x[0] + 0.1 * batch(1, seed=1)[0], x[1]])
    [doubt] = hidden_images(step, replace(found, images=near))
    assert "image 1 of the 2 would add to it" in doubt


def test_best_seeks_images_of_a_batch_by_themselves(monkeypatch):
    groups, whole = [], []
    monkeypatch.setattr(batches, "agreed", lambda pool: groups.append(len(pool)) or agreed(pool))
    monkeypatch.setattr(
        batches, "selected", lambda *args, **kw: whole.append(kw["whole"]) or selected(*args, **kw)
    )
    monkeypatch.setattr(auto, "hidden_images", lambda step, found: ["what is left hides an image"])
    model, x = net().float(), batch(2).float()
    seen = see(model, x, [0, 3])
    frames = iv.Frames(every=1)
    found = iv.best(evaluations=600, restarts=3)(model, seen, callback=frames)
    assert groups == [3]
    assert whole[0] == 4  # what three restarts agree on is a fourth
    assert "what is left hides an image" in found.warnings
    assert "of each image by itself too, and from shifted copies" in found.note
    assert frames.steps == sorted(set(frames.steps))
    assert {image.shape for image in frames.images} == {x.shape}
    assert found.score == pytest.approx(
        iv.GradientMatching().score(model, seen, found.images, found.labels), abs=1e-6
    )
    assert found.history.steps == sorted(found.history.steps)
    assert 600 <= found.evaluations <= 1000
    # Where images change each other's part there is nothing to seek by itself.
    assert iv.best()._additive(model, replace(seen, training_mode=True)) is None
