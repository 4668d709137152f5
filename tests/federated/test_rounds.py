"""Several rounds of one client as one observation."""

from dataclasses import replace

import pytest
import torch

import invlib as iv
from invlib.errors import ObservationError
from tests.conftest import build_tiny, random_batch

CLIENT = iv.FedAvg(lr=0.1, local_steps=2, momentum=0.9)


def rounds(n=1, *, client=CLIENT, count=2, **settings):
    """Return models, of which each is the one before after the client's update, and what was seen of it."""
    models, seen = [build_tiny(torch.float64)], []
    x, y = random_batch(n, dtype=torch.float64)
    for _ in range(count):
        seen.append(iv.observe(models[-1], x, y, client, normalization=iv.CIFAR10, **settings))
        after = build_tiny(torch.float64)
        with torch.no_grad():
            for name, p in after.named_parameters():
                p.copy_(dict(models[-1].named_parameters())[name] + seen[-1].update[name] + 0.01)
        models.append(after)
    return models[:-1], seen, x, y


def test_the_squared_distance_is_the_sum_of_those_of_the_rounds():
    models, seen, x, y = rounds()
    model, both = iv.several_rounds(models, seen)
    other = random_batch(seed=3, dtype=torch.float64)[0]
    attack = iv.GradientMatching(objective=iv.objectives.l2)
    assert attack.score(model, both, x, y) < 1e-24
    expected = sum(
        attack.score(net, one, other, y) / sum(u.square().sum() for u in one.update.values())
        for net, one in zip(models, seen, strict=True)
    )
    assert attack.score(model, both, other, y) == pytest.approx(float(expected))


@pytest.mark.parametrize("engine", ["eager", "batched"])
def test_attacks_of_several_rounds_start_at_hidden_labels(engine):
    models, seen, _, y = rounds(reveal_labels=False)
    model, both = iv.several_rounds(models, seen)
    found = iv.inverting_gradients(steps=4, restarts=2, engine=engine)(model, both)
    assert torch.equal(found.labels, y)
    first = iv.inverting_gradients(steps=4, restarts=2, engine="eager")(model, both)
    torch.testing.assert_close(found.trial_scores, first.trial_scores)


def test_rounds_that_each_hold_too_few_numbers_determine_an_image_together():
    nets, seen = [], []
    x, y = random_batch(side=4, dtype=torch.float64)[0], torch.ones(1, 1, dtype=torch.float64)
    for k in range(2):  # each round sends another half of its gradient's numbers
        net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 1, bias=False)).double()
        net[1].weight.data = torch.full((1, 48), 0.01 * (k + 1), dtype=torch.float64)
        one = iv.observe(net, x, y, iv.FedSGD(), normalization=iv.CIFAR10, loss=torch.nn.functional.mse_loss)
        mask = torch.arange(48).view(1, 48) % 2 == k
        seen.append(replace(one, update={"1.weight": one.update["1.weight"] * mask}, sent={"1.weight": mask}))
        nets.append(net)
    attack = iv.GradientMatching(
        objective=iv.objectives.l2,
        optimizer=iv.LBFGS(tolerance_change=0.0),
        steps=5,
        init="zeros",
        decay=None,
    )
    alone = [float(iv.metrics.psnr(attack(*pair).images, x)) for pair in zip(nets, seen, strict=True)]
    together = float(iv.metrics.psnr(attack(*iv.several_rounds(nets, seen)).images, x))
    assert together > max(alone) + 20


def test_rounds_of_other_images_are_refused():
    models, seen, *_ = rounds(2)
    with pytest.raises(ObservationError, match="2 models and 1 observations"):
        iv.several_rounds(models, seen[:1])
    with pytest.raises(ObservationError, match="round 1 has training_mode True; expected False"):
        iv.several_rounds(models, [seen[0], replace(seen[1], training_mode=True)])
    with pytest.raises(ObservationError, match="other labels"):
        iv.several_rounds(models, [seen[0], replace(seen[1], labels=seen[1].labels.flip(0) + 1)])
    silent = {name: 0 * u for name, u in seen[1].update.items()}
    with pytest.raises(ObservationError, match="update of round 1 is all zero"):
        iv.several_rounds(models, [seen[0], replace(seen[1], update=silent)])


def test_rounds_of_adam_have_no_mean_gradient():
    models, seen, *_ = rounds(client=iv.FedAvg(lr=0.01, local_steps=2, optimizer="adam"))
    assert not hasattr(iv.several_rounds(models, seen)[1].protocol, "mean_gradient")
    models, seen, *_ = rounds(client=iv.FedSGD())
    both = iv.several_rounds(models, seen)[1]
    torch.testing.assert_close(both.mean_gradient("rounds.0.0.bias"), seen[0].update["0.bias"])
