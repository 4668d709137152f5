"""One gradient in the place of many local steps: where it is exact, and how its error falls."""

from dataclasses import replace

import pytest
import torch

import invlib as iv
from invlib.errors import ConfigError, DoubtWarning, ObservationError
from invlib.experiments.attacks import OnTheWay
from tests.conftest import build_tiny, random_batch


@pytest.fixture
def net():
    return build_tiny(torch.float64)


def see(net, client, n=2):
    x, y = random_batch(n, dtype=torch.float64)
    return iv.observe(net, x, y, client, normalization=iv.CIFAR10), x, y


def test_of_one_local_step_it_is_the_gradient_itself(net):
    seen, x, y = see(net, iv.FedAvg(lr=0.1, local_steps=1))
    moved, one = iv.as_one_gradient(net, seen)
    expected = iv.observe(net, x, y, iv.FedSGD(), normalization=iv.CIFAR10)
    torch.testing.assert_close(one.update, expected.update)
    torch.testing.assert_close(dict(moved.named_parameters()), dict(net.named_parameters()))
    assert one.protocol == iv.FedSGD()
    assert one.labels is seen.labels


def error(net, lr, at, steps=4):
    """How far the gradient that is read is from the one that the true images have there."""
    seen, x, y = see(net, iv.FedAvg(lr=lr, local_steps=steps))
    moved, one = iv.as_one_gradient(net, seen, at=at)
    true = iv.FedSGD()(moved, iv.CIFAR10.encode(x), y)
    return sum((true[name] - one.update[name]).square().sum().item() for name in true) ** 0.5


@pytest.mark.parametrize(("at", "order"), [(None, 2), (0.0, 1), (1.0, 1)])
def test_its_error_falls_with_the_square_of_the_rate_at_the_mean_of_the_way(net, at, order):
    small, large = (error(net, lr, at) for lr in (0.001, 0.002))
    assert large / small == pytest.approx(2**order, rel=0.05)


def test_the_mean_of_the_way_is_that_of_the_weights_passed(net):
    passed = []
    seen, x, y = see(net, iv.FedAvg(lr=0.001, local_steps=5))
    seen.protocol(
        net, iv.CIFAR10.encode(x), y, on_step=lambda params, _: passed.append(params["0.weight"].detach())
    )
    moved, _ = iv.as_one_gradient(net, seen)
    mean, start = torch.stack(passed).mean(0), net[0].weight.detach()
    assert (moved[0].weight - mean).norm() < 0.02 * (mean - start).norm()


def test_of_minibatches_it_is_the_mean_of_all_their_gradients(net):
    client = iv.FedAvg(lr=0.1, epochs=2, batch_size=1)
    seen, x, y = see(net, client, n=3)
    gradients, inputs = [], iv.CIFAR10.encode(x)

    def watch(params, image):
        k = len(gradients) % 3
        gradients.append(iv.FedSGD()(net, image, y[k : k + 1], params=params)["0.weight"].detach())

    client(net, inputs, y, on_step=watch)
    _, one = iv.as_one_gradient(net, seen)
    assert len(gradients) == 6
    torch.testing.assert_close(one.update["0.weight"], torch.stack(gradients).mean(0))


def test_the_model_stays_where_it_was(net):
    before = {name: value.clone() for name, value in net.state_dict().items()}
    seen, *_ = see(net, iv.FedAvg(lr=0.1, local_steps=3))
    iv.as_one_gradient(net, seen)
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())


def test_an_attack_on_it_finds_the_image(net):
    seen, x, y = see(net, iv.FedAvg(lr=0.01, local_steps=4), n=1)
    moved, one = iv.as_one_gradient(net, seen)
    found = iv.improved_deep_leakage(steps=3, objective=iv.objectives.cosine, init="zeros")(moved, one)
    assert float(iv.metrics.psnr(found.images, x)) > 25
    assert iv.GradientMatching().score(net, seen, found.images, y) < 1e-3


def test_what_does_not_fit_is_refused(net):
    seen, x, y = see(net, iv.FedAvg(lr=0.1, local_steps=3))
    with pytest.raises(ConfigError, match=r"at is 1.5; expected a number in \[0, 1\]"):
        iv.as_one_gradient(net, seen, at=1.5)
    with pytest.raises(ObservationError):
        iv.as_one_gradient(net, replace(seen, update={}))
    single = iv.observe(net, x, y, iv.FedSGD(), normalization=iv.CIFAR10)
    with pytest.raises(ConfigError, match="expected FedAvg"):
        iv.as_one_gradient(net, single)


def test_the_experiment_scores_it_through_the_local_steps(net):
    attack = iv.inverting_gradients(steps=5)
    seen, _, y = see(net, iv.FedAvg(lr=0.1, local_steps=3), n=1)
    found = OnTheWay(attack=attack)(net, seen)
    assert found.score == pytest.approx(attack.score(net, seen, found.images, y))
    assert torch.equal(found.images, attack(*iv.as_one_gradient(net, seen)).images)


def quadratic(client):
    """A linear network with squared loss, whose curvature is the same in all directions."""
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 2, bias=False)).double()
    net[1].weight.data = torch.arange(8, dtype=torch.float64).view(2, 4) / 8 - 0.4
    # four images that are orthogonal, so that the mean of x x^T is a multiple of one
    x, y = (
        torch.eye(4, dtype=torch.float64).view(4, 1, 2, 2) / 2,
        torch.rand(4, 2, generator=torch.Generator().manual_seed(0)).double(),
    )
    loss = torch.nn.functional.mse_loss
    return net, iv.observe(net, x, y, client, normalization=iv.UNIT, loss=loss), x


@pytest.mark.parametrize(
    "more",
    [{}, {"momentum": 0.9}, {"momentum": 0.5, "nesterov": True}, {"lr": (1.0, 3.0, 2.0, 1.0)}],
    ids=str,
)
def test_on_a_quadratic_loss_the_fitted_place_is_exact(more):
    client = iv.FedAvg(**({"lr": 2.0, "local_steps": 4} | more))
    net, seen, x = quadratic(client)
    at = iv.fitted_place(net, seen, x)
    moved, one = iv.as_one_gradient(net, seen, at=at)
    true = iv.FedSGD()(moved, x, seen.labels, loss=seen.loss)
    assert 0 < at < 1
    torch.testing.assert_close(true["1.weight"].detach(), one.update["1.weight"], rtol=1e-5, atol=1e-9)
    halfway, _ = iv.as_one_gradient(net, seen)
    other = iv.FedSGD()(halfway, x, seen.labels, loss=seen.loss)
    assert (other["1.weight"] - one.update["1.weight"]).norm() > 1e-3 * one.update["1.weight"].norm()


@pytest.mark.parametrize("lr", [2.0, 24.0])  # the second steps over the least loss: a place beyond the middle
def test_of_plain_steps_on_a_quadratic_loss_the_place_is_the_one_that_follows(lr):
    steps = 4
    net, seen, x = quadratic(iv.FedAvg(lr=lr, local_steps=steps))
    curvature = 2 * x.flatten(1).square().sum(0)[0] / 8  # of a mean over eight outputs
    left = float(1 - lr * curvature)  # of the distance to the least loss, after a step
    passed = sum(1 - left**k for k in range(steps)) / steps
    assert iv.fitted_place(net, seen, x) == pytest.approx(passed / (1 - left**steps), abs=1e-5)


@pytest.mark.parametrize(
    "more",
    [{"momentum": 0.9}, {"lr": (1e-3, 4e-3, 0.0)}, {"weight_decay": 1.0}, {"proximal": 3.0, "momentum": 0.5}],
    ids=str,
)
def test_the_mean_of_the_way_is_right_for_other_steps_of_sgd(net, more):
    client = iv.FedAvg(**({"lr": 1e-3, "local_steps": 3} | more))
    small = replace(client, lr=tuple(r / 2 for r in client.lr) if "lr" in more else client.lr / 2)

    def error(client):
        seen, x, y = see(net, client)
        moved, one = iv.as_one_gradient(net, seen)
        true = iv.FedSGD()(moved, iv.CIFAR10.encode(x), y)
        return sum((true[name] - one.update[name]).square().sum().item() for name in true) ** 0.5

    assert error(client) / error(small) > 3.5 or "weight_decay" in more
    assert error(client) < 1e-4 + (1e-2 if "weight_decay" in more else 0)


def test_the_gradient_of_adam_is_doubted(net):
    seen, x, y = see(net, iv.FedAvg(lr=1e-3, local_steps=3, optimizer="adam"))
    with pytest.warns(DoubtWarning, match="roughly its signs"):
        _, one = iv.as_one_gradient(net, seen)
    signs = [
        torch.sign(one.update[n]) == torch.sign(g)
        for n, g in iv.FedSGD()(net, iv.CIFAR10.encode(x), y).items()
    ]
    assert torch.cat([s.flatten() for s in signs]).double().mean() > 0.95
    assert 0 <= iv.fitted_place(net, seen, x) <= 1


def test_a_place_needs_labels(net):
    seen, x, _ = see(net, iv.FedAvg(lr=0.1, local_steps=3))
    with pytest.raises(ObservationError, match="labels are hidden"):
        iv.fitted_place(net, replace(seen, labels=None), x)
