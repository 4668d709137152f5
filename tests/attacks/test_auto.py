"""The strongest attack: closed form where it applies, smoothed matching elsewhere, and what it says of it."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import invlib as iv
from invlib.attacks.shifts import moves, shifted
from invlib.autodiff.smoothing import rounded
from invlib.errors import ConfigError
from tests.conftest import random_batch


def chain():
    return iv.models.build("LeNetZhu", num_classes=5, image_size=8, seed=0)


def relu_net():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(128, 5)
        )


def see(model, n=1):
    x, y = random_batch(n, dtype=next(model.parameters()).dtype)
    return x, iv.observe(model, x, y, iv.FedSGD(), normalization=iv.CIFAR10)


def test_a_chain_is_computed_and_not_searched():
    x, seen = see(chain())
    found = iv.best(steps=1)(chain(), seen)
    assert found.status == "closed_form"
    assert float(iv.metrics.psnr(found.images, x)) > 60


def test_rounded_gradients_are_polished():
    # In double precision: the polish gains less of the score than single precision can tell.
    net = chain().double()
    x, seen = see(net)
    update = {name: value.bfloat16().double() for name, value in seen.update.items()}
    rough = replace(seen, update=update)
    closed = iv.recursive_inversion()(net, rough)
    found = iv.best(steps=200)(net, rough)
    assert "polished" in found.note
    assert found.score < closed.score
    assert float(iv.metrics.psnr(found.images, x)) > float(iv.metrics.psnr(closed.images, x))


def test_a_polish_is_told_like_any_search_and_can_be_interrupted():
    net = chain().double()
    _, seen = see(net)
    rough = replace(seen, update={name: value.bfloat16().double() for name, value in seen.update.items()})
    frames = iv.Frames(every=1)
    polished = iv.best(steps=60)(net, rough, callback=frames)
    assert frames.steps == [0, 1, 2, 3]
    assert polished.objective == "cosine"
    measured = iv.GradientMatching().score(net, rough, polished.images, polished.labels)
    assert polished.score == pytest.approx(measured, rel=1e-6)
    # An objective of the matching does not change by what the two are compared.
    assert iv.best(steps=60, objective=iv.objectives.l2)(net, rough).score == polished.score

    def interrupt(progress):
        raise KeyboardInterrupt

    stopped = iv.best(steps=60)(net, rough, callback=interrupt)
    assert stopped.status == "interrupted"
    closed = iv.recursive_inversion()(net, rough)
    # The start of the polish has passed through its coordinates.
    torch.testing.assert_close(stopped.images, closed.images)
    assert stopped.score == pytest.approx(closed.score, rel=1e-6)


def test_noise_that_breaks_the_closed_form_leaves_matching():
    _, seen = see(chain())
    generator = torch.Generator().manual_seed(0)
    update = {n: v + v.std() * torch.randn(v.shape, generator=generator) for n, v in seen.update.items()}
    found = iv.best(steps=3)(chain(), replace(seen, update=update))
    assert "matching" in found.note
    assert found.status == "max_steps"


def test_a_network_of_relus_is_matched_with_smoothing():
    x, seen = see(relu_net())
    found = iv.best(steps=150)(relu_net(), seen)
    assert "with smoothing" in found.note
    assert found.evaluations <= 175  # three stages, whose last line searches may go on
    grey = x.mean((2, 3), keepdim=True).expand_as(x)
    assert float(iv.metrics.psnr(found.images, x)) > float(iv.metrics.psnr(grey, x)) + 3
    again = iv.best(steps=150)(relu_net(), seen)
    assert torch.equal(found.images, again.images)
    # the score is that of the network as it is
    measured = iv.GradientMatching().score(relu_net(), seen, found.images, found.labels)
    assert found.score == pytest.approx(measured, abs=1e-6)


def test_smoothing_reaches_functions_and_modules_and_ends():
    x = torch.linspace(-8, 8, 33)
    expected = F.softplus(x, beta=3.0)
    with rounded(3.0):
        for relu in (F.relu, torch.relu, nn.ReLU(), nn.ReLU(inplace=True), torch.Tensor.relu):
            assert torch.equal(relu(x.clone()), expected)
        for clip in (F.relu6, nn.ReLU6()):
            assert torch.allclose(clip(x), expected - F.softplus(x - 6, beta=3.0))
        assert torch.allclose(
            F.hardtanh(x), F.softplus(x + 1, beta=3.0) - F.softplus(x - 1, beta=3.0) - 1, atol=1e-6
        )
    assert torch.equal(F.relu(x), x.clamp_min(0))
    with rounded(None):
        assert torch.equal(F.relu(x), x.clamp_min(0))


def test_sharpness_runs_from_start_to_end():
    smoothing = iv.Smoothing(start=2, end=50)
    assert smoothing.sharpness(0, 11) == pytest.approx(2)
    assert smoothing.sharpness(5, 11) == pytest.approx(10)
    assert smoothing.sharpness(10, 11) == pytest.approx(50)
    assert smoothing.sharpness(0, 1) == pytest.approx(2)


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_a_sharpness_that_is_none_is_refused(value):
    with pytest.raises(ConfigError, match=r"Smoothing end is .*; expected a positive number"):
        iv.Smoothing(end=value)


def test_unknown_settings_are_named():
    with pytest.raises(ConfigError, match="unknown setting 'restrts'"):
        iv.best(restrts=2)
    with pytest.raises(ConfigError, match="best evaluations is 0; expected a whole number of at least 1"):
        iv.best(evaluations=0)
    with pytest.raises(ConfigError, match="best evaluations is 3 and steps is 3; expected one of them"):
        iv.best(evaluations=3, steps=3)


def test_steps_are_another_name_of_evaluations():
    assert iv.best(evaluations=300) == iv.best(steps=300) != iv.best(steps=400)
    assert iv.best().evaluations == 1200
    # A setting that is given counts even at its default, where the attack would choose another one.
    for given in ({"init": "randn"}, {"smoothing": iv.Smoothing()}):
        assert iv.best(**given) != iv.best()
        assert iv.best(**given).matching == iv.best().matching


def test_restarts_and_smoothing_go_together():
    _, seen = see(relu_net(), n=2)
    found = iv.best(steps=4, restarts=3)(relu_net(), seen)
    assert found.trials.shape == (3, 2, 3, 8, 8)
    alone = iv.best(steps=4, restarts=3, chunk=1)(relu_net(), seen)
    assert torch.allclose(found.trial_scores, alone.trial_scores, atol=1e-5)


def test_total_variation_counts_in_units_of_a_noise_image():
    _, seen = see(relu_net())
    grain = [
        float(iv.priors.total_variation(iv.best(steps=50, tv=tv)(relu_net(), seen).images))
        for tv in (0.0, 1e4)
    ]
    assert grain[1] < 0.2 * grain[0]
    # With ten times the objective the unit is ten times as large, and the balance is as it was.
    noise = iv.best(steps=20)(relu_net(), seen)
    tenfold = iv.best(steps=20, objective=lambda *updates: 10 * iv.objectives.cosine(*updates))(
        relu_net(), seen
    )
    assert tenfold.score == pytest.approx(10 * noise.score, rel=0.2)
    with pytest.raises(ConfigError, match="best tv is -1; expected a number from 0 on"):
        iv.best(tv=-1)


@pytest.mark.parametrize("sigma", [1e-4, 1e-2, 1.0])
def test_against_noise_the_prior_falls_no_lower_than_a_log_probability(sigma):
    x, y = random_batch(1)
    client = iv.Defended(iv.FedSGD(), [iv.defenses.Clip(1.0), iv.defenses.GaussianNoise(sigma)])
    seen = iv.observe(relu_net(), x, y, client, normalization=iv.CIFAR10)
    weight, fading = iv.best()._weighed(seen, 0.5)
    # In units of the likelihood the prior of the 192 numbers weighs half the sum of their squares.
    one = 192 / 2 / client.likelihood.unit(list(seen.update.values()))
    assert weight == pytest.approx(max(0.5, one))
    assert weight * fading == pytest.approx(max(0.5 * 0.03, one), rel=1e-6)
    assert iv.best()._weighed(replace(seen, protocol=iv.FedSGD()), 0.5) == (0.5, 0.03)


def test_smoothing_is_sharp_enough_for_a_network_whose_activations_shrink():
    faint = iv.models.build("ConvNet8", num_classes=5, image_size=16, seed=0)
    x, y = random_batch(1, side=16)
    seen = iv.observe(faint, x, y, iv.FedSGD(), normalization=iv.CIFAR10)
    found = iv.best(steps=200)(faint, seen)
    blunt = iv.best(steps=200, smoothing=iv.Smoothing())(faint, seen)
    assert found.score < 0.5 * blunt.score


def test_the_note_says_whether_there_was_smoothing():
    _, seen = see(relu_net())
    assert "without smoothing" in iv.best(steps=2, smoothing=None)(relu_net(), seen).note
    # another objective has another unit, in which smoothing is measured too
    assert "with smoothing" in iv.best(steps=2, objective=iv.objectives.l2)(relu_net(), seen).note


def test_the_natural_prior_counts_and_its_weight_is_checked():
    natural = iv.NaturalImages()
    _, seen = see(relu_net())
    unlike = [
        float(natural.coordinates(iv.best(steps=50, tv=0, natural=weight)(relu_net(), seen).images).var())
        for weight in (0.0, 1e4)
    ]
    assert unlike[1] < 0.2 * unlike[0]
    with pytest.raises(ConfigError, match="best natural is -1; expected a number from 0 on"):
        iv.best(natural=-1)


def test_parts_can_be_left_out_one_by_one():
    _, seen = see(relu_net())
    whole = iv.best(steps=100)(relu_net(), seen)
    for part in ({"coordinates": None}, {"fading": 1.0}, {"init": "randn"}, {"natural": 0.0}):
        assert not torch.equal(iv.best(steps=100, **part)(relu_net(), seen).images, whole.images)
    # An optimiser that asks once a step gets as many steps as there are evaluations.
    adam = iv.best(steps=60, optimizer=iv.Adam(signed=True))(relu_net(), seen)
    assert 60 <= adam.evaluations <= 70


def test_the_search_starts_near_plain_grey():
    _, seen = see(relu_net())
    frames = iv.Frames(every=1)
    iv.best(steps=1)(relu_net(), seen, callback=frames)
    assert frames.steps[0] == 0
    noise = iv.NaturalImages().images(torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0)))
    assert 0 < float(frames.images[0].std()) < float(noise.std()) / 3
    assert float(frames.images[0].mean()) == pytest.approx(0.5, abs=0.1)


def test_images_of_one_label_do_not_start_alike():
    _, seen = see(relu_net(), n=2)
    alike = replace(seen, labels=torch.zeros(2, dtype=torch.int64))
    found = iv.best(steps=1)(relu_net(), alike)
    assert not torch.allclose(found.images[0], found.images[1], atol=1e-3)


def strided():
    """Two strides of two and the mean over all places: shifted by four pixels, all looks nearly the same."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, 6, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(6, 8, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(8, 5),
        ).eval()


def test_shifts_are_by_the_product_of_the_strides():
    _, seen = see(strided())
    assert sorted(moves(strided(), seen)) == sorted(
        (i, j) for i in (-4, 0, 4) for j in (-4, 0, 4) if (i, j) != (0, 0)
    )
    # Nothing is strided, or a network without convolutions: nothing to shift.
    assert moves(nn.Sequential(nn.Flatten(), nn.Linear(192, 5)), seen) == []
    assert moves(nn.Sequential(nn.Conv2d(3, 2, 3, padding=1), nn.Flatten(), nn.Linear(128, 5)), seen) == []


def test_asking_for_the_strides_leaves_the_network_as_it_was():
    net = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(36, 5))
    net.train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    x, y = random_batch(1)
    moves(net, iv.observe(net, x, y, iv.FedSGD(), normalization=iv.CIFAR10))
    assert net.training
    assert not any(m._forward_hooks for m in net.modules())
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())


def test_a_shifted_copy_goes_where_it_is_told():
    x = torch.arange(16.0).view(1, 1, 4, 4)
    down = shifted(x, (1, 0))
    assert torch.equal(down[..., 1:, :], x[..., :-1, :])
    assert torch.equal(down[..., 0, :], x[..., 0, :])
    left = shifted(x, (0, -2))
    assert torch.equal(left[..., :2], x[..., 2:])
    assert torch.equal(left[..., 2:], x[..., 3:].expand(1, 1, 4, 2))
    assert torch.equal(shifted(x, (0, 0)), x)


def test_a_search_that_ended_in_a_shifted_copy_finds_its_way():
    net = strided()
    # A spot in the corner, which the border tells from one elsewhere, and a start with the spot elsewhere.
    spot = torch.rand(3, 3, 3, generator=torch.Generator().manual_seed(0))
    x, astray = torch.full((2, 1, 3, 16, 16), 0.5)
    x[..., :3, :3] = spot
    astray[..., 4:7, 8:11] = spot
    seen = iv.observe(net, x, torch.tensor([1]), iv.FedSGD(), normalization=iv.CIFAR10)
    frames = iv.Frames(every=1)
    start = {"init": astray, "steps": 600}
    found = iv.best(**start)(net, seen, callback=frames)
    assert (astray - x)[..., 4:7, 8:11].abs().mean() > 0.2
    assert (found.images - x)[..., 4:7, 8:11].abs().mean() < 0.02
    alone = iv.best(**start, shifts=0)(net, seen)
    assert found.score < alone.score
    assert found.evaluations <= 700
    assert "shifted" in found.note
    assert "shifted" not in alone.note
    # It is told as one search: steps go up, and the history goes on.
    assert frames.steps == sorted(set(frames.steps))
    assert found.history.steps == sorted(found.history.steps)
    assert found.history.cost.shape == (len(found.history.steps), 1)
    again = iv.best(**start)(net, seen)
    assert torch.equal(found.images, again.images)
    measured = iv.GradientMatching().score(net, seen, found.images, found.labels)
    assert found.score == pytest.approx(measured, abs=1e-6)


def test_of_all_restarts_the_best_is_shifted():
    _, seen = see(strided())
    found = iv.best(steps=500, restarts=3)(strided(), seen)
    assert found.trials.shape == (3, 1, 3, 8, 8)
    assert found.score == pytest.approx(float(found.trial_scores.min()))
    assert torch.equal(found.images, found.trials[int(found.trial_scores.argmin())])
    one = iv.best(steps=500)(strided(), seen)
    assert found.evaluations < 2 * one.evaluations


def test_shifting_can_be_stopped():
    _, seen = see(strided())
    found = iv.best(steps=500)(strided(), seen, callback=lambda progress: progress.step >= 3)
    assert found.status == "interrupted"
    with pytest.raises(ConfigError, match="best shifts is -1; expected a whole number of at least 0"):
        iv.best(shifts=-1)
