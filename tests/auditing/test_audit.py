"""The whole audit: each kind of update gets its verdict, and no audit loses its findings."""

import json
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

import invlib as iv
from invlib.auditing import KINDS, VERDICTS, protections, run, tried
from invlib.auditing.facts import distorted
from invlib.auditing.leaks import leaks
from invlib.auditing.protections import bounds, stated
from invlib.auditing.tried import (
    Subject,
    Tried,
    candidates_like,
    counted,
    nearer_than_wrong,
    wrong_pictures,
)
from invlib.auditing.why import why
from invlib.auditing.words import NOT_FOUND, Finding, worst
from invlib.core.reconstruction import Reconstruction
from invlib.errors import ConfigError, ObservationError
from tests.auditing import updates
from tests.auditing.updates import ATTACKED, FAILED, lenet, observed, photos

pytestmark = pytest.mark.filterwarnings("ignore::invlib.errors.DoubtWarning")

RIGHT = Reconstruction(
    images=torch.zeros(1, 3, 16, 16),
    labels=torch.zeros(1, dtype=torch.int64),
    score=0.0,
    trial_scores=torch.zeros(1),
    trials=torch.zeros(1, 1, 3, 16, 16),
    status="max_steps",
    seconds=0.0,
)
LONG = 3600.0  # seconds: no test ends because its time does


def audited(case, truth=True, evaluations=12, **more):
    known = case.truth if truth else None
    return iv.audit(case.model, case.seen, known, budget=LONG, evaluations=evaluations, **more)


@pytest.fixture
def no_trials(monkeypatch):
    """Leave out what a recovered update would have been with defences, which has tests of its own."""
    monkeypatch.setattr(run, "helps", lambda *_: iter(()))


def words_of(report):
    return {
        *(f.verdict for f in (*report.leaks, *report.attacks, *report.reasons, *report.defences)),
        report.verdict,
    }


@pytest.mark.parametrize("make", ATTACKED + FAILED, ids=lambda make: make.__name__)
@pytest.mark.usefixtures("no_trials")
def test_each_kind_of_update_gets_its_verdict(make):
    case = make()
    report = audited(case, evaluations=120 if make is updates.searched else 12)
    assert report.verdict in case.verdicts
    if case.reason:
        named = {f.name: f.verdict for f in (*report.reasons, *report.leaks) if f.verdict == case.says}
        assert case.reason in named
    assert report.complete
    assert words_of(report) <= {*VERDICTS}
    assert all(f.kind in KINDS for f in (*report.leaks, *report.attacks, *report.reasons, *report.defences))
    again = json.loads(report.to_json())
    assert again["verdict"] == report.verdict
    assert "pictures" not in again


@pytest.mark.usefixtures("no_trials")
def test_without_the_truth_a_right_picture_is_named_and_a_wrong_one_is_not():
    case = updates.searched()
    assert audited(case, truth=False, evaluations=120).verdict in (
        "probably recovered",
        "recovered and certified",
    )
    assert audited(case, truth=False, evaluations=1).verdict == NOT_FOUND


def test_defences_are_tried_on_the_update_and_compared_with_what_was_there():
    case = updates.exact_batch()
    report = audited(case, evaluations=2)
    answers = {finding.name: finding.verdict for finding in report.defences}
    assert answers["Clipping alone"] == "would not help"
    assert answers["The noise for 5%"] == "would help"
    assert not [f.name for f in report.defences if f.verdict == "bounded"]  # nothing is there that bounds
    assert report.summary[2].count("5%") == 1
    needed = next(f for f in report.defences if f.name.startswith("Noise for a bound")).numbers
    mu = iv.defenses.gaussian_mu(needed["noise multiplier"], neighbours="replace one")
    assert iv.defenses.reconstruction_bound(needed["kappa"], mu) == pytest.approx(needed["gamma"])


def test_a_bound_is_that_of_the_stated_defences():
    model = lenet()
    client = iv.Defended(iv.FedSGD(), [iv.defenses.Clip(1.0), iv.defenses.GaussianNoise(2.0)])
    seen, truth = observed(model, protocol=client)
    subject = Subject(model=model, observation=seen, truth=truth, candidates=candidates_like(seen))
    [found] = bounds(subject, None)
    mu = iv.defenses.gaussian_mu(2.0, neighbours="replace one", rounds=10)
    assert found.numbers["most successes at kappa 0.001, 10 rounds"] == pytest.approx(
        iv.defenses.reconstruction_bound(0.001, mu)
    )
    assert found.numbers["unit"] == "one client"
    unclipped = iv.Defended(iv.FedSGD(), [iv.defenses.GaussianNoise(2.0)])
    [none] = bounds(replace(subject, observation=replace(seen, protocol=unclipped)), None)
    assert none.verdict == "nothing found"
    summed = replace(seen, protocol=iv.defenses.SecureAggregation(clients=1))
    said = {f.name: f.verdict for f in bounds(replace(subject, observation=summed), None)}
    assert said == {"Secure aggregation": "nothing found", "Defences in place": "nothing found"}


def test_a_stated_privacy_is_bounded_with_its_rate():
    model = lenet()
    seen, _ = observed(model)
    subject = Subject(model=model, observation=seen, truth=None, candidates=candidates_like(seen))
    [found] = bounds(subject, stated({"noise_multiplier": 1.0, "rate": 0.01, "steps": 10}))
    expected = iv.defenses.subsampled_bound(0.01, 1.0, rate=0.01, rounds=10, neighbours="add or remove one")
    assert found.numbers["most successes at kappa 0.01"] == pytest.approx(expected)
    assert found.numbers["unit"] == "one example"
    assert run._helped([found]).count("..") == 0


@pytest.mark.parametrize(
    ("privacy", "named"),
    [({}, "noise_multiplier"), ({"noise_multiplier": 0}, "noise_multiplier"), ({"noise": 1}, "noise")],
)
def test_a_privacy_that_says_nothing_is_refused(privacy, named):
    with pytest.raises(ConfigError, match=named):
        stated(privacy)


def test_wrong_pictures_are_far_and_the_right_one_is_not():
    model = lenet()
    seen, truth = observed(model, (5,))
    subject = Subject(model=model, observation=seen, truth=None, candidates=candidates_like(seen))
    right = replace(RIGHT, images=truth, labels=seen.labels, trials=truth[None])
    distance, wrong = wrong_pictures(subject, right)
    assert distance < 1e-9
    assert min(wrong.values()) > 1e-4
    # The same with the seed, other pictures with another one.
    assert wrong_pictures(subject, right)[1] == wrong
    assert wrong_pictures(replace(subject, seed=1), right)[1]["noise"] != wrong["noise"]
    other = replace(right, images=photos(9)[0])
    assert wrong_pictures(subject, other)[0] > min(wrong.values())


def test_under_noise_a_distance_counts_above_what_the_true_image_has():
    model = lenet()
    seen, _ = observed(model)
    noisy = iv.defenses.defend(seen, [iv.defenses.Clip(1.0), iv.defenses.GaussianNoise(0.1)])
    own = sum(value.numel() for value in seen.update.values()) / 2
    assert nearer_than_wrong(seen, 0.05, 1.0)
    assert not nearer_than_wrong(seen, 0.2, 1.0)
    assert nearer_than_wrong(noisy, own + 10, own + 1000)
    assert not nearer_than_wrong(noisy, own + 200, own + 1000)
    assert not nearer_than_wrong(noisy, own - 1, own + math.sqrt(own))  # within what noise alone does


@pytest.mark.usefixtures("no_trials")
def test_ctrl_c_leaves_a_report_that_says_so(monkeypatch, tmp_path):
    def interrupted(*_):
        yield from ()
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "attempts", interrupted)
    case = updates.fully_connected()
    report = audited(case)
    assert not report.complete
    assert report.leaks
    assert report.verdict == "not tried"
    assert "not complete" in str(report)
    assert '"complete": false' in report.to_json()
    page, data = report.save(tmp_path / "out")
    assert page.read_text(encoding="utf-8").startswith("<!")
    assert json.loads(data.read_text(encoding="utf-8"))["format"] == "invlib-audit-1"


@pytest.mark.usefixtures("no_trials")
def test_an_audit_draws_from_its_seed_alone_and_changes_nothing():
    case = updates.fully_connected()
    state, weights = torch.get_rng_state(), {n: p.clone() for n, p in case.model.named_parameters()}
    mode = case.model.training
    first, second = audited(case), audited(case)
    assert torch.equal(torch.get_rng_state(), state)
    assert case.model.training == mode
    assert all(torch.equal(p, weights[n]) for n, p in case.model.named_parameters())

    def told(report):
        return [(f.name, f.verdict, {**f.numbers, "seconds": 0}) for f in (*report.leaks, *report.attacks)]

    assert repr(told(first)) == repr(told(second))


def test_of_several_verdicts_the_worst_is_the_reports():
    def finding(verdict):
        return Finding(name="a", kind="found by an attack", verdict=verdict, text="b.")

    assert worst([finding(NOT_FOUND), finding("partly"), finding("would help")]) == "partly"
    assert worst([]) == "not tried"
    with pytest.raises(ConfigError, match="verdict is 'safe'"):
        finding("safe")


def test_bad_input_is_named_before_any_work(monkeypatch):
    case = updates.fully_connected()

    def never(*_):
        raise AssertionError("an attack began")

    for name in ("leaks", "attempts"):
        monkeypatch.setattr(run, name, never)
    for bad, error, named in [
        ({"truth": torch.rand(2, 3, 16, 16)}, ConfigError, "truth"),
        ({"truth": case.truth * 300}, ConfigError, "truth"),
        ({"candidates": torch.rand(4, 3, 8, 8)}, ConfigError, "candidates"),
        ({"budget": 0}, ConfigError, "budget"),
        ({"evaluations": 0}, ConfigError, "evaluations"),
        ({"privacy": {"epsilon": 8}}, ConfigError, "epsilon"),
    ]:
        with pytest.raises(error, match=named):
            iv.audit(case.model, case.seen, **bad)
    with pytest.raises(ConfigError, match="observation"):
        iv.audit(case.model, {"weight": torch.zeros(2)})
    with pytest.raises(ObservationError):
        iv.audit(lenet(), case.seen)


@pytest.mark.usefixtures("no_trials")
def test_the_private_image_among_the_candidates_is_not_taken_for_a_wrong_one():
    case = updates.searched()
    report = audited(case, truth=False, evaluations=120, candidates=torch.cat([case.truth, photos(9)[0]]))
    assert report.verdict == "probably recovered"


@pytest.mark.usefixtures("no_trials")
def test_of_several_seeds_the_truth_does_not_choose():
    def search(verdict, distance):
        text = Finding(name="a", kind="found by an attack", verdict=verdict, text="b.")
        found = replace(RIGHT, status="max_steps")
        return Tried(finding=text, attack=iv.best(evaluations=9), reconstruction=found, distance=distance)

    nearest, lucky = search(NOT_FOUND, 0.1), search("identified", 0.2)
    form = replace(search("partly", 0.3), attack=iv.exact_batch())
    assert counted([form, lucky, nearest]) == [form, nearest]
    assert run._leading([lucky, nearest]) is nearest


def test_ctrl_c_while_defences_are_tried_ends_the_audit(monkeypatch):
    case, ran = updates.exact_batch(), tried._ran

    def stopped(subject, name, *more):
        one = ran(subject, name, *more)
        return replace(one, stopped=hasattr(subject.observation.protocol, "transforms"))

    monkeypatch.setattr(tried, "_ran", stopped)
    report = audited(case, evaluations=2)
    assert not report.complete
    assert report.verdict == "recovered and certified"
    assert not any(finding.name == "Clipping alone" for finding in report.defences)


def test_a_larger_batch_has_each_image_with_its_own_label(monkeypatch):
    case, seen = updates.exact_batch(), []
    found = replace(
        RIGHT,
        images=case.truth.flip(0),
        labels=case.seen.labels.flip(0),
        trials=case.truth.flip(0)[None],
    )
    finding = Finding(name="a", kind="found by an attack", verdict="identified", text="b.")
    before = Tried(finding=finding, attack=None, reconstruction=found)
    observation = replace(case.seen, labels=None)
    subject = Subject(
        model=case.model, observation=observation, truth=case.truth, candidates=candidates_like(case.seen)
    )

    def observe(model, images, labels, *_, **__):
        seen.append(labels)
        raise ConfigError("enough")

    monkeypatch.setattr(protections, "observe", observe)
    protections._larger(subject, before, math.inf)
    assert torch.equal(seen[0][: len(case.truth)], case.seen.labels)


CLIENTS = {
    "noise": ([iv.defenses.Clip(1.0), iv.defenses.GaussianNoise(1e-3)], True),
    "clip": ([iv.defenses.Clip(0.05)], True),
    "top-k": ([iv.defenses.TopK(0.1)], True),
    "signs": ([iv.defenses.Sign()], True),
    "signs, not told": ([iv.defenses.Sign()], False),
    "noise, not told": ([iv.defenses.GaussianNoise(1e-3)], False),
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("client", CLIENTS)
def test_an_update_of_the_stated_client_is_never_said_not_to_fit(client, training):
    transforms, public = CLIENTS[client]
    model = updates.seeded(updates.normalised)
    defended = iv.Defended(iv.FedSGD(), transforms, public=public)
    seen, truth = observed(model, (0, 1, 2, 4), protocol=defended, training_mode=training)
    hidden = replace(seen, labels=None)
    for known in (None, truth):
        found = [*leaks(model, hidden), *why(model, hidden, [], known)]
        assert not [finding for finding in found if finding.verdict == "does not fit"]


def test_true_images_without_labels_prove_nothing_of_a_clipped_update():
    model = lenet()
    with torch.no_grad():
        model.fc.bias[5] = 20.0  # a network that says one class of everything
    seen, truth = observed(model, (0, 1, 2, 4), protocol=iv.Defended(iv.FedSGD(), [iv.defenses.Clip(0.05)]))
    found = why(model, replace(seen, labels=None), [], truth)
    assert not [finding for finding in found if finding.verdict == "does not fit"]


def test_noise_beside_a_narrow_last_layer_is_no_garbage():
    model = updates.seeded(
        lambda: nn.Sequential(
            *(nn.Conv2d(3, 16, 3, 2), nn.Sigmoid(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))
        )
    )
    seen, _ = observed(
        model, (0, 1, 2, 4), protocol=iv.Defended(iv.FedSGD(), [iv.defenses.GaussianNoise(1e-4)])
    )
    hidden = replace(seen, protocol=iv.FedSGD(), labels=None)
    assert "does not fit" not in {finding.verdict for finding in why(model, hidden)}


def test_a_stated_defence_other_than_a_clip_distorts():
    model = lenet()
    for transforms, expected in [
        ([iv.defenses.Clip(1.0)], False),
        ([iv.defenses.Clip(1.0), iv.defenses.GaussianNoise(1e-9)], True),
        ([iv.defenses.MaskLayer("fc")], True),
        ([iv.defenses.Quantize(16)], True),
    ]:
        seen, _ = observed(model, protocol=iv.Defended(iv.FedSGD(), transforms))
        assert distorted(seen) == expected
    assert not distorted(observed(model)[0])


@pytest.mark.parametrize("client", CLIENTS)
def test_no_distorted_update_of_adam_is_said_not_to_fit(client):
    transforms, public = CLIENTS[client]
    model = lenet()
    adam = iv.FedAvg(lr=0.001, local_steps=2, optimizer="adam")
    seen, truth = observed(model, (0,), protocol=iv.Defended(adam, transforms, public=public))
    assert not [finding for finding in why(model, seen, [], truth) if finding.verdict == "does not fit"]


def test_the_true_image_tells_noise_over_an_update_from_no_update():
    model = lenet()
    client = iv.Defended(iv.FedSGD(), [iv.defenses.GaussianNoise(1.0)], public=False)
    seen, truth = observed(model, (0,), protocol=client)
    alone, beside = ({f.name for f in why(model, seen, [], known)} for known in (None, truth))
    assert "No update" in alone
    assert "No update" not in beside
    assert "Noise" in beside
