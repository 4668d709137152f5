"""Gradient matching: restarts, best iterates, scores, stopping, interruption, checkpoints."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn

import invlib as iv
from invlib.errors import ConfigError, ObservationError
from invlib.optim import objectives, priors
from tests.conftest import build_tiny, random_batch

TV = ((1e-3, priors.total_variation),)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def see(net, n=1, protocol=None, **facts):
    x, y = random_batch(n, dtype=next(net.parameters()).dtype)
    return iv.observe(net, x, y, protocol or iv.FedSGD(), normalization=iv.CIFAR10, **facts)


@pytest.mark.parametrize(
    "objective",
    [objectives.cosine, objectives.l2, objectives.l1, objectives.maximum, objectives.layerwise_cosine],
)
@pytest.mark.parametrize(
    "optimizer", [iv.Adam(signed=True), iv.SGD(lr=0.5), iv.LBFGS(max_iter=5)], ids=lambda o: type(o).__name__
)
def test_every_objective_falls_with_every_optimizer(tiny, seen, objective, optimizer):
    attack = iv.GradientMatching(objective=objective, optimizer=optimizer, steps=15, record_every=1)
    rec = attack(tiny, seen)
    assert rec.score < rec.history.objective[0, 0]
    assert rec.images.min() >= 0
    assert rec.images.max() <= 1


@pytest.mark.parametrize("protocol", [iv.FedSGD(), iv.FedAvg(lr=0.1, local_steps=3)], ids=str)
@pytest.mark.parametrize("n", [1, 3])
def test_restarts_together_equal_restarts_one_by_one(protocol, n):
    net = build_tiny(torch.float64)
    seen = see(net, n, protocol)
    attack = iv.GradientMatching(steps=8, restarts=3, priors=TV)
    together = attack(net, seen, generator=seeded())
    one_by_one = replace(attack, chunk=1)(net, seen, generator=seeded())
    torch.testing.assert_close(together.trials, one_by_one.trials)
    torch.testing.assert_close(together.trial_scores, one_by_one.trial_scores)
    torch.testing.assert_close(together.history.cost, one_by_one.history.cost)
    pairs = replace(attack, chunk=2)(net, seen, generator=seeded())
    torch.testing.assert_close(together.trials, pairs.trials)


def test_the_score_is_the_objective_of_the_images_given_back(tiny, seen):
    for box in (True, False):
        attack = iv.GradientMatching(steps=10, restarts=2, box=box, priors=TV)
        rec = attack(tiny, seen)
        update = iv.FedSGD()(tiny, iv.CIFAR10.encode(rec.images), rec.labels)
        anew = objectives.cosine(list(update.values()), list(seen.update.values()))
        assert rec.score == pytest.approx(float(anew), rel=1e-5)
        assert rec.score == pytest.approx(attack.score(tiny, seen, rec.images, rec.labels), rel=1e-5)
        assert rec.score == float(rec.trial_scores.min())
        assert torch.equal(rec.images, rec.trials[rec.trial_scores.argmin()])


def test_the_score_respects_the_layers(tiny, seen):
    attack = iv.GradientMatching(steps=3, layers=iv.Layers(which="last", count=2, weights="linear"))
    rec = attack(tiny, seen)
    update = list(iv.FedSGD()(tiny, iv.CIFAR10.encode(rec.images), rec.labels).values())
    target = list(seen.update.values())
    anew = objectives.cosine(update[2:], target[2:], [0.5, 0.25])
    assert rec.score == pytest.approx(float(anew), rel=1e-5)


def test_the_same_generator_gives_the_same_result(tiny, seen):
    attack = iv.GradientMatching(steps=10, restarts=2)
    first, second = (attack(tiny, seen, generator=seeded(3)) for _ in range(2))
    assert torch.equal(first.trials, second.trials)
    assert not torch.equal(first.trials, attack(tiny, seen, generator=seeded(4)).trials)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    unseeded = attack(tiny, seen)
    assert torch.equal(unseeded.trials, attack(tiny, seen, generator=seeded(0)).trials)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_best_iterate_is_kept_not_the_last(tiny, seen):
    # A step far too long: the cost goes up and down, so that the last iterate is not the best.
    attack = iv.GradientMatching(optimizer=iv.SGD(lr=3000.0, momentum=0), steps=9, decay=None, record_every=1)
    best = attack(tiny, seen)
    last = replace(attack, keep="last")(tiny, seen)
    costs = best.history.cost[:, 0]
    assert costs[-1] > costs.min()
    assert best.score == pytest.approx(float(costs.min()), rel=1e-4)
    assert last.score == pytest.approx(float(costs[-1]), rel=1e-4)


def test_a_restart_that_is_not_finite_is_never_chosen(tiny, seen):
    init = torch.rand(3, 1, 3, 8, 8, generator=seeded())
    init[0] = torch.nan
    rec = iv.GradientMatching(steps=5, restarts=3, init=init)(tiny, seen)
    assert not torch.isfinite(rec.trial_scores[0])
    assert torch.isfinite(rec.trial_scores[1:]).all()
    assert rec.score == float(rec.trial_scores[1:].min())
    assert torch.isfinite(rec.images).all()
    assert rec.status == "max_steps"


def test_no_finite_restart_is_said_so(tiny, seen):
    rec = iv.GradientMatching(steps=2, init=torch.full((1, 3, 8, 8), torch.nan))(tiny, seen)
    assert rec.status == "non_finite"
    assert rec.score != rec.score


@pytest.mark.parametrize("optimizer", [iv.Adam(), iv.LBFGS()], ids=lambda o: type(o).__name__)
def test_tolerance_stops_and_no_restart_that_never_ran_is_chosen(tiny, seen, optimizer):
    attack = iv.GradientMatching(optimizer=optimizer, steps=50, restarts=3, chunk=1, tolerance=10.0)
    rec = attack(tiny, seen)
    assert rec.status == "converged"
    assert rec.history.cost.shape[1] == 3
    assert torch.isfinite(rec.trial_scores).tolist() == [True, False, False]
    assert rec.score == float(rec.trial_scores[0])


def test_patience_stops_where_nothing_improves(tiny, seen):
    still = iv.GradientMatching(optimizer=iv.Adam(lr=1e-30), steps=500, patience=30)
    rec = still(tiny, seen)
    assert rec.status == "converged"
    assert rec.evaluations < 100


def test_a_callback_sees_each_step_and_may_stop(tiny, seen):
    steps = []

    def stop_at_four(progress):
        assert progress.steps == 20
        assert progress.images().shape == (1, 3, 8, 8)
        steps.append((progress.step, progress.cost()))
        return progress.step == 4

    rec = iv.GradientMatching(steps=20)(tiny, seen, callback=stop_at_four)
    assert [s for s, _ in steps] == [0, 1, 2, 3, 4]
    costs = [c for _, c in steps]
    assert costs == sorted(costs, reverse=True)
    assert rec.status == "interrupted"


def test_frames_are_recorded_from_start_to_end(tiny, seen):
    frames = iv.Frames(every=4)
    rec = iv.GradientMatching(steps=10, restarts=2)(tiny, seen, callback=frames)
    assert frames.steps == [0, 4, 8, 10]
    assert all(f.shape == (1, 3, 8, 8) for f in frames.images)
    assert any(torch.allclose(frames.images[-1], t, atol=1e-6) for t in rec.trials)


def test_ctrl_c_returns_the_best_so_far(tiny, seen):
    def interrupt(progress):
        if progress.step == 6:
            raise KeyboardInterrupt

    attack = iv.GradientMatching(steps=1000, restarts=2, record_every=1)
    rec = attack(tiny, seen, callback=interrupt)
    assert rec.status == "interrupted"
    assert len(rec.history.steps) == 6
    assert rec.score < rec.history.objective[0].min()


def test_a_run_goes_on_from_its_checkpoint(tiny, seen, tmp_path):
    path = tmp_path / "run.pt"
    for optimizer in (iv.Adam(), iv.SGD(), iv.LBFGS(max_iter=2)):
        attack = iv.GradientMatching(optimizer=optimizer, steps=12, restarts=2, priors=TV)
        whole = attack(tiny, seen)
        cut = attack(tiny, seen, checkpoint=path, callback=lambda p: p.step == 5)
        assert cut.status == "interrupted"
        assert path.exists()
        resumed = attack(tiny, seen, checkpoint=path)
        assert torch.equal(resumed.trials, whole.trials)
        assert resumed.evaluations == whole.evaluations
        torch.testing.assert_close(resumed.history.cost, whole.history.cost, rtol=0, atol=0)
        assert list(tmp_path.iterdir()) == []


def halved(logits, labels):
    return nn.functional.cross_entropy(logits, labels) / 2


def distance_with(power):
    def distance(candidate, target):
        return sum((a - b).abs().pow(power).sum() for a, b in zip(candidate, target, strict=True))

    return distance


def image_start():
    return torch.linspace(0, 1, 3 * 64).view(1, 3, 8, 8)


OTHER = {
    "attack.steps": {"steps": 13},
    "attack.priors": {"priors": ((1e-3, iv.NaturalImages(falloff=0.0).prior(iv.CIFAR10)),)},
    "attack.loss": {"loss": halved},
    "attack.objective": {"objective": distance_with(1)},
    "attack.init": {"init": image_start().flip(-1)},
    "attack.optimizer.lr": {"optimizer": iv.Adam(lr=0.2)},
}


@pytest.mark.parametrize("name", OTHER)
def test_a_checkpoint_of_other_settings_is_refused_by_name(tiny, seen, tmp_path, name):
    path = tmp_path / "run.pt"
    attack = iv.GradientMatching(
        steps=12,
        init=image_start(),
        objective=distance_with(2),
        priors=((1e-3, iv.NaturalImages(falloff=1.0).prior(iv.CIFAR10)),),
    )
    attack(tiny, seen, checkpoint=path, callback=lambda p: p.step == 5)
    with pytest.raises(ConfigError, match=rf"run.pt is of another run, with .*{name}"):
        replace(attack, **OTHER[name])(tiny, seen, checkpoint=path)
    assert attack(tiny, seen, checkpoint=path).status == "max_steps"


def test_a_checkpoint_of_another_model_client_or_start_is_refused_by_name(tiny, seen, tmp_path):
    path = tmp_path / "run.pt"
    attack = iv.GradientMatching(steps=12)
    attack(tiny, seen, checkpoint=path, callback=lambda p: p.step == 5)
    weights = build_tiny()
    with torch.no_grad():
        weights[3].bias[0] += 1e-4
    layers = nn.Sequential(tiny[0], nn.Tanh(), *tiny[2:])
    update = {n: u + 1e-6 for n, u in seen.update.items()}
    for net, other, name, generator in [
        (weights, seen, "model.numbers.3.bias", seeded()),
        (layers, seen, "model.layers", seeded()),
        (tiny, replace(seen, update=update), "observation.update.0.weight", seeded()),
        (tiny, replace(seen, labels=(seen.labels + 1) % 5), "observation.labels", seeded()),
        (tiny, replace(seen, protocol=iv.FedAvg(lr=1.0, epochs=1)), "observation.protocol", seeded()),
        (tiny, seen, "starts", seeded(9)),
    ]:
        with pytest.raises(ConfigError, match=rf"is of another run, with .*{name}"):
            attack(net, other, checkpoint=path, generator=generator)
    path.write_bytes(b"garbage")
    with pytest.raises(ConfigError, match="cannot be read"):
        attack(tiny, seen, checkpoint=path)


def test_a_checkpoint_of_a_network_or_client_that_computes_something_else_is_refused(tiny, tmp_path):
    path = tmp_path / "run.pt"

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = build_tiny()

        def forward(self, x):
            return self.body(x)

    class Other(Net):
        def forward(self, x):
            return self.body(x) * 2

    Other.__qualname__ = Net.__qualname__
    Other.__name__ = Net.__name__
    net, other = Net(), Other()
    attack = iv.GradientMatching(steps=12)
    attack(net, see(net), checkpoint=path, callback=lambda p: p.step == 5)
    with pytest.raises(ConfigError, match=r"is of another run, with model.code"):
        attack(other, see(net), checkpoint=path)
    path.unlink()

    class Client(iv.FedSGD):
        def __call__(self, *args, **kwargs):
            return super().__call__(*args, **kwargs)

    class Doubling(iv.FedSGD):
        def __call__(self, *args, **kwargs):
            return {name: 2 * g for name, g in super().__call__(*args, **kwargs).items()}

    Doubling.__name__ = Client.__name__
    attack(net, see(net, 1, Client()), checkpoint=path, callback=lambda p: p.step == 5)
    seen = replace(see(net, 1, Client()), protocol=Doubling())
    with pytest.raises(ConfigError, match=r"is of another run, with observation.protocol.code"):
        attack(net, seen, checkpoint=path)


def test_a_checkpoint_takes_partial_functions_and_refuses_what_it_cannot_tell_apart(tiny, seen, tmp_path):
    path = tmp_path / "run.pt"
    smooth = partial(nn.functional.cross_entropy, label_smoothing=0.1)
    attack = iv.GradientMatching(steps=12, loss=smooth)
    attack(tiny, seen, checkpoint=path, callback=lambda p: p.step == 5)
    other = partial(nn.functional.cross_entropy, label_smoothing=0.2)
    with pytest.raises(ConfigError, match=r"attack.loss.label_smoothing=0.1, now 0.2"):
        replace(attack, loss=other)(tiny, seen, checkpoint=path)
    again = partial(nn.functional.cross_entropy, label_smoothing=0.1)
    assert replace(attack, loss=again)(tiny, seen, checkpoint=path).status == "max_steps"

    class Unnamed:
        def __call__(self, inputs):
            return inputs.square().mean()

    for priors_, word in [
        (((1.0, lambda x: x.sum()),), "lambda"),
        (((1.0, Unnamed()),), "prints its address"),
    ]:
        with pytest.raises(ConfigError, match=f"cannot tell this run from others: .*{word}"):
            replace(attack, priors=priors_)(tiny, seen, checkpoint=path)
        replace(attack, priors=priors_)(tiny, seen)  # without a checkpoint nothing has to be told apart
        assert not path.exists()


def test_scoring_runs_the_network_no_more_than_it_has_to(tiny, seen):
    calls = []
    handle = tiny.register_forward_hook(lambda *_: calls.append(1))
    images, labels = random_batch()
    score = iv.GradientMatching(labels="optimize").score(tiny, seen, images, labels)
    handle.remove()
    assert len(calls) == 1  # the labels' range is known since the client's step
    assert score == pytest.approx(0.0, abs=1e-6)
    bare = nn.Sequential(nn.Conv2d(3, 5, 8), nn.Flatten())  # no layer to infer labels from
    hidden = see(bare, reveal_labels=False)
    assert iv.GradientMatching().score(bare, hidden, images, labels) == pytest.approx(0.0, abs=1e-6)


def test_a_checkpoint_is_written_now_and_then(tiny, seen, tmp_path, monkeypatch):
    monkeypatch.setattr("invlib.search.checkpoint.EVERY", 0.0)
    path = tmp_path / "run.pt"
    sizes = []
    iv.GradientMatching(steps=4)(
        tiny, seen, checkpoint=path, callback=lambda p: sizes.append(path.exists() and p.step)
    )
    assert sizes == [False, 1, 2, 3, 4]
    assert not path.exists()


def test_hidden_labels_are_inferred(tiny):
    _x, y = random_batch()
    seen = see(tiny, reveal_labels=False)
    rec = iv.GradientMatching(steps=3)(tiny, seen)
    assert rec.labels.tolist() == y.tolist()


@pytest.mark.parametrize(("labels", "rows"), [("optimize", 2), ("optimize_shared", 1)])
def test_soft_labels_are_optimised(tiny, labels, rows):
    x, _ = random_batch(2)
    y = torch.tensor([3, 3])
    seen = iv.observe(tiny, x, y, iv.FedSGD(), normalization=iv.CIFAR10)
    attack = iv.GradientMatching(
        objective=objectives.l2, optimizer=iv.Adam(lr=0.1), steps=60, restarts=2, labels=labels
    )
    rec = attack(tiny, seen)
    assert rec.labels.tolist() == [3, 3]
    assert rec.score < 0.1 * rec.history.objective[0].min()


@pytest.mark.parametrize(
    ("init", "check"),
    [
        ("zeros", lambda t: torch.equal(t, torch.zeros_like(t))),
        ("rand", lambda t: bool((t.abs() <= 1).all()) and t.std() > 0.4),
        ("randn", lambda t: bool((t.abs() > 1).any()) and t.std() > 0.8),
    ],
)
def test_starting_points(tiny, seen, init, check):
    firsts = []

    def remember(inputs):
        firsts.append(inputs.detach().clone())
        return inputs.sum() * 0

    attack = iv.GradientMatching(init=init, steps=1, priors=((1.0, remember),))
    attack(tiny, seen)
    assert check(firsts[0])


def test_a_given_start_at_the_truth_scores_zero(tiny, seen):
    x, _ = random_batch()
    rec = iv.GradientMatching(init=x, steps=1, optimizer=iv.Adam(lr=1e-6))(tiny, seen)
    assert rec.score == pytest.approx(0, abs=1e-5)
    torch.testing.assert_close(rec.images, x, rtol=0, atol=1e-5)


def test_the_median_filter_is_applied(tiny, seen):
    attack = iv.GradientMatching(steps=3, median_every=2, keep="last", optimizer=iv.SGD(lr=1e-9), box=False)
    rec = attack(tiny, seen, generator=seeded())
    noise = torch.randn((1, 3, 8, 8), generator=seeded())
    expected = iv.CIFAR10.decode(priors.median_filter(noise)).clamp(0, 1)
    torch.testing.assert_close(rec.images, expected, rtol=0, atol=1e-4)


def test_the_model_and_its_random_state_are_left_alone():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(), nn.Flatten(), nn.Linear(144, 5))
    seen = see(net.eval(), 2)
    net.train()
    net[1].eval()
    state = {n: t.clone() for n, t in net.state_dict().items()}
    modes = [m.training for m in net.modules()]
    iv.inverting_gradients(steps=3, restarts=2)(net, seen)
    iv.deep_leakage(steps=1)(net, seen)
    assert [m.training for m in net.modules()] == modes
    assert all(p.grad is None for p in net.parameters())
    assert all(torch.equal(t, state[n]) for n, t in net.state_dict().items())


@pytest.mark.parametrize("restarts", [1, 2])
def test_training_mode_uses_the_statistics_of_the_batch(restarts):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 5))
    x, _ = random_batch(2)
    seen = see(net, 2, training_mode=True)
    attack = iv.GradientMatching(steps=2, restarts=restarts, init=x, optimizer=iv.Adam(lr=1e-7))
    assert attack(net, seen).score == pytest.approx(0, abs=1e-5)
    as_if_eval = replace(seen, training_mode=False)
    assert attack(net, as_if_eval).score > 1e-3


def test_presets_are_what_their_papers_say():
    geiping, dlg, idlg = iv.inverting_gradients(tv=0.1), iv.deep_leakage(), iv.improved_deep_leakage()
    assert geiping.objective is objectives.cosine
    assert geiping.optimizer == iv.Adam(lr=0.1, signed=True)
    assert geiping.priors == ((0.1, priors.total_variation),)
    assert iv.inverting_gradients(tv=0).priors == ()
    assert dlg.objective is objectives.l2
    assert isinstance(dlg.optimizer, iv.LBFGS)
    assert (dlg.labels, idlg.labels) == ("optimize", "auto")
    assert iv.inverting_gradients(chunk=3).chunk == 3


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: iv.GradientMatching(steps=0), "steps is 0; expected a whole number of at least 1"),
        (lambda: iv.GradientMatching(restarts=-1), "restarts is -1"),
        (lambda: iv.GradientMatching(chunk=0), "chunk is 0"),
        (lambda: iv.GradientMatching(labels="guess"), "labels is 'guess'; expected 'auto', 'optimize' or"),
        (lambda: iv.GradientMatching(keep="first"), "keep is 'first'"),
        (lambda: iv.GradientMatching(init="ones"), "init is 'ones'; expected 'randn'"),
        (lambda: iv.inverting_gradients(stepz=3), "unknown setting 'stepz'; expected some of objective"),
        (lambda: iv.Frames(every=0), "Frames every is 0"),
    ],
)
def test_bad_settings_are_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_a_start_of_the_wrong_shape_is_refused(tiny, seen):
    with pytest.raises(ConfigError, match=r"init has shape \(2, 3, 8, 8\); expected \(1, 3, 8, 8\) or"):
        iv.GradientMatching(init=torch.zeros(2, 3, 8, 8))(tiny, seen)


def test_an_observation_that_does_not_fit_is_refused(tiny, seen):
    with pytest.raises(ObservationError, match=r"update lacks '0\.bias'"):
        iv.GradientMatching(steps=1)(
            tiny, replace(seen, update={n: t for n, t in seen.update.items() if n != "0.bias"})
        )


def test_a_progress_bar_is_shown_when_asked_for(tiny, seen, capsys):
    iv.GradientMatching(steps=30)(tiny, seen)
    assert capsys.readouterr().err == ""
    iv.GradientMatching(steps=30)(tiny, seen, progress=True)
    assert "gradient matching: 100%" in capsys.readouterr().err


def test_a_reconstruction_says_what_it_is(tiny, seen):
    text = repr(iv.GradientMatching(steps=1, restarts=2)(tiny, seen))
    assert "images 1×3×8×8" in text
    assert "2 restart(s)" in text
    assert " (cosine), status 'max_steps'" in text


def constant(inputs):
    return 1 + 0 * inputs.sum()


def test_priors_fade_geometrically(tiny, seen):
    attack = iv.GradientMatching(steps=5, priors=((2.0, constant),), fading=1e-4, record_every=1)
    history = attack(tiny, seen).history
    weights = (history.cost - history.objective)[:5, 0]
    torch.testing.assert_close(weights, torch.tensor([2.0, 0.2, 2e-2, 2e-3, 2e-4]), rtol=1e-3, atol=1e-6)
    kept = replace(attack, fading=1.0)(tiny, seen).history
    torch.testing.assert_close(kept.cost - kept.objective, torch.full((6, 1), 2.0))
    with pytest.raises(ConfigError, match=r"GradientMatching fading is 0.0; expected a number in \(0, 1\]"):
        iv.GradientMatching(fading=0.0)


def test_coordinates_of_natural_images(tiny, seen):
    natural = iv.NaturalImages(mean=0.3)
    first = []

    def watch(progress):
        first.append(progress.images())

    plain = iv.GradientMatching(steps=6, init="zeros", coordinates=natural)
    rec = plain(tiny, seen, callback=watch)
    torch.testing.assert_close(first[0], torch.full_like(first[0], 0.3))
    assert rec.score < plain.score(tiny, seen, first[0], seen.labels)
    assert rec.images.min() >= 0
    assert rec.images.max() <= 1
    # A start is handed over as an image, whatever the coordinates.
    start = torch.rand(rec.images.shape, generator=seeded())
    first.clear()
    replace(plain, init=start)(tiny, seen, callback=watch)
    torch.testing.assert_close(first[0], start, atol=1e-5, rtol=0)
    # Without falloff, correlation and contrast they are a rotation: squared Euclidean steps do not see it.
    rotation = iv.NaturalImages(falloff=0.0, correlation=0.0, mean=0.5, contrast=1.0)
    unit = replace(seen, normalization=iv.UNIT)
    walk = iv.GradientMatching(
        steps=4, optimizer=iv.SGD(lr=0.1, momentum=0.0), decay=None, box=False, init=start, keep="last"
    )
    torch.testing.assert_close(
        replace(walk, coordinates=rotation)(tiny, unit).images, walk(tiny, unit).images, atol=1e-5, rtol=0
    )
    with pytest.raises(ConfigError, match="median_every is 2; expected None where coordinates are given"):
        iv.GradientMatching(coordinates=natural, median_every=2)


def test_restarts_together_in_coordinates():
    net = build_tiny(torch.float64)
    seen = see(net, 2)
    attack = iv.GradientMatching(steps=5, restarts=3, priors=TV, coordinates=iv.NaturalImages(), fading=0.1)
    together = attack(net, seen, generator=seeded())
    torch.testing.assert_close(
        together.trials, replace(attack, chunk=1)(net, seen, generator=seeded()).trials
    )
