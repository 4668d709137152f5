"""The causes of a failure, on updates of which the cause is known."""

from dataclasses import dataclass, replace

import pytest
import torch
from torch import nn

import invlib as iv
from invlib.auditing.facts import foreign, noise_of, steps_of
from invlib.auditing.leaks import leaks
from invlib.auditing.truth import _assigned
from invlib.auditing.why import why
from invlib.auditing.words import Finding
from invlib.core.reconstruction import Reconstruction
from invlib.models.mlp import FullyConnected
from tests.auditing import updates
from tests.auditing.updates import ATTACKED, FAILED, lenet, observed, photos, seeded


@dataclass(frozen=True)
class Result:
    finding: Finding
    reconstruction: Reconstruction | None = None


def result(images, labels, score=0.5):
    return Reconstruction(
        images=images,
        labels=labels,
        score=score,
        objective="cosine",
        trial_scores=torch.tensor([score]),
        trials=images[None],
        status="max_steps",
        seconds=1.0,
    )


def said(found, name):
    return {f.verdict for f in found if f.name == name}


def proofs(found):
    return [f.name for f in found if f.verdict in ("does not fit", "explains the failure")]


def only(found, name):
    [one] = [f for f in found if f.name == name]
    return one


@pytest.mark.parametrize("make", FAILED, ids=lambda make: make.__name__)
@pytest.mark.parametrize("with_truth", [False, True])
def test_the_cause_is_found(make, with_truth):
    case = make()
    found = why(case.model, case.seen, [], case.truth if with_truth else None)
    assert case.says in said(found, case.reason)
    assert {f.name for f in found if f.verdict == "does not fit"} <= {case.reason}
    for finding in found:
        assert finding.text.endswith((".", ". "))


@pytest.mark.parametrize("make", ATTACKED, ids=lambda make: make.__name__)
def test_an_ordinary_update_has_no_cause(make):
    case = make()
    for truth in (None, case.truth):
        found = why(case.model, case.seen, [], truth)
        assert proofs(found) == []
        assert said(found, "Causes") == {"nothing found"}


@pytest.mark.parametrize("rows", [(0,), (0, 1, 2)])
@pytest.mark.parametrize("name", ["LeNetZhu", "ConvNet8", "ResNet20"])
@pytest.mark.parametrize("training", [False, True])
def test_networks_of_the_zoo_have_no_cause(name, rows, training):
    model = iv.models.build(name, seed=0)
    images, labels = iv.data.samples("patches32", [*rows])
    seen = iv.observe(
        model,
        images,
        labels,
        iv.FedSGD(),
        normalization=iv.CIFAR10,
        training_mode=training,
        reveal_labels=False,
    )
    assert proofs(why(model, seen, [], images)) == []


def test_a_success_needs_no_reason():
    case = updates.noisy()
    finding = Finding(name="x", kind="found by an attack", verdict="identified", text="x.")
    assert why(case.model, case.seen, [Result(finding)], case.truth) == []
    other = updates.other_model()
    assert proofs(why(other.model, other.seen, [Result(finding)])) == ["Model"]
    finding = replace(finding, verdict="partly")
    assert said(why(case.model, case.seen, [Result(finding)]), "Noise")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda n, v: torch.full_like(v, 0.1), "are the same"),
        (lambda n, v: torch.randn(v.shape, generator=torch.Generator().manual_seed(len(n))), "random"),
        (lambda n, v: v.flatten()[torch.randperm(v.numel())].view_as(v), "random"),
    ],
    ids=["constant", "random", "shuffled"],
)
def test_what_is_no_update(change, words):
    torch.manual_seed(0)
    model = lenet()
    seen, _ = observed(model)
    seen = replace(seen, update={n: change(n, v) for n, v in seen.update.items()})
    found = why(model, seen)
    assert proofs(found) == ["No update"]
    assert words in found[0].text


def test_weights_in_the_place_of_their_difference():
    model = lenet()
    seen, _ = observed(model, protocol=iv.FedAvg(lr=0.01, local_steps=2))
    sent = {n: p.detach() + seen.update[n] for n, p in model.named_parameters()}
    found = why(model, replace(seen, update=sent))
    assert proofs(found) == ["No update"]
    assert found[0].numbers["along"] > 0.99


def test_what_is_not_finite_or_of_other_shapes_does_not_fit():
    model = lenet()
    seen, _ = observed(model)
    for change in (
        {"fc.bias": torch.full((10,), float("nan"))},
        {"fc.bias": torch.zeros(11)},
        {"extra": torch.zeros(1)},
    ):
        [found] = why(model, replace(seen, update={**seen.update, **change}))
        assert (found.name, found.verdict) == ("Observation", "does not fit")
        assert next(iter(change)) in found.text


def test_noise_of_which_nothing_was_said_is_told_from_noise_that_was_stated():
    model = lenet()
    stated = iv.Defended(iv.FedSGD(), [iv.defenses.GaussianNoise(0.05)])
    seen, truth = observed(model, protocol=stated)
    noise = only(why(model, seen, [], truth), "Noise")
    assert noise.numbers["sigma"] == pytest.approx(0.05, rel=4 * noise.numbers["error"])
    assert noise.numbers["stated"] == 0.05
    # Under noise that was stated, random numbers are what is to be expected.
    drowned, _ = observed(model, protocol=iv.Defended(iv.FedSGD(), [iv.defenses.GaussianNoise(50.0)]))
    assert "does not fit" not in {f.verdict for f in why(model, drowned)}


def test_sign_that_is_turned_round():
    model = lenet()
    seen, truth = observed(model, (0, 1))
    turned = replace(seen, update={n: -v for n, v in seen.update.items()}, labels=None)
    assert proofs(why(model, turned)) == ["Sign"]
    known = replace(turned, labels=seen.labels)
    found = why(model, known, [], truth)
    assert "does not fit" in said(found, "Sign")
    assert any(f.kind == "local diagnostic" and f.numbers["truth"] > 1 for f in found if f.name == "Sign")


def test_more_images_than_were_stated():
    model = seeded(lambda: FullyConnected(hidden=(40,), image_size=16))
    seen, _ = observed(model, (0, 1, 2))
    assert set(proofs(why(model, replace(seen, num_images=2, labels=None)))) == {"Batch size"}


def test_a_sum_over_images_in_the_place_of_their_mean():
    model = lenet()
    seen, _ = observed(model, (0, 1, 2), reveal_labels=False)
    summed = replace(seen, update={n: 3 * v for n, v in seen.update.items()})
    assert proofs(why(model, summed)) == ["Scale"]


def test_labels_that_contradict_the_update():
    model = lenet()
    seen, _ = observed(model, (0, 1))
    assert "Labels" in proofs(why(model, replace(seen, labels=torch.tensor([7, 8]))))


def test_local_steps_that_were_counted():
    model = seeded(updates.normalised)
    seen, _ = observed(model, (0, 1), protocol=iv.FedAvg(lr=0.01, local_steps=3), training_mode=True)
    other = replace(seen, protocol=iv.FedAvg(lr=0.01, local_steps=1))
    assert "Local steps" in proofs(why(model, other))


@pytest.mark.parametrize("truly", [False, True])
def test_the_mode_is_found_either_way(truly):
    model = seeded(updates.normalised)
    seen, truth = observed(model, (0, 1), training_mode=truly)
    wrong = replace(seen, training_mode=not truly, buffers={})
    for given in (None, truth):
        assert set(proofs(why(model, wrong, [], given))) == {"Mode"}


def test_stale_weights_are_another_model():
    model, stale = lenet(), lenet()
    seen, _ = observed(model)
    with torch.no_grad():  # one round earlier
        for name, p in stale.named_parameters():
            p += 0.1 * seen.update[name]
    found = only(why(stale, seen), "Model")
    assert found.verdict == "does not fit"


def test_the_protocol_by_the_true_image():
    model = lenet()
    seen, truth = observed(model, (0, 1), protocol=iv.FedAvg(lr=0.2, local_steps=4))
    other, _ = observed(lenet(1), (0, 1))
    found = only(why(model, other, [], truth), "Client")
    assert found.kind == "local diagnostic"
    assert found.verdict == "does not fit"
    near = replace(seen, protocol=iv.FedAvg(lr=0.2, local_steps=2))
    found = only(why(model, near, [], truth), "Protocol")
    assert found.verdict == "explains the failure"
    assert "4 local step(s)" in found.advice


def test_a_search_that_did_not_come_to_the_true_image():
    case = updates.searched()
    grey = result(torch.full_like(case.truth, 0.5), case.seen.labels)
    found = only(why(case.model, case.seen, [grey], case.truth), "Search")
    assert found.verdict == "explains the failure"
    assert found.numbers["truth"] < 1e-9 < found.numbers["found"]
    there = result(case.truth, case.seen.labels)
    assert "Search" not in proofs(why(case.model, case.seen, [there], case.truth))


def test_labels_of_true_images_by_their_features():
    model = lenet()
    with torch.no_grad():
        model.fc.bias[0] += 6  # its predictions are of another class
    seen, truth = observed(model, (7, 3, 9))
    assert _assigned(model, seen, truth).tolist() == [7, 3, 9]
    found = why(model, replace(seen, labels=None), [], truth)
    assert only(found, "True image").numbers["truth"] < 1e-9


def test_a_batch_of_more_pixels_than_the_update_has_numbers():
    model = seeded(lambda: nn.Sequential(nn.AdaptiveAvgPool2d(4), FullyConnected(hidden=(), image_size=4)))
    seen, truth = observed(model, (0, 1))
    found = only(why(model, seen, [], truth), "Batch")
    assert found.verdict == "explains the failure"
    assert found.numbers["unknowns"] == 2 * 3 * 16 * 16


def test_signs_alone_explain_a_failure():
    model = lenet()
    seen, _ = observed(model, protocol=iv.Defended(iv.FedSGD(), [iv.defenses.Sign()], public=False))
    assert "Quantisation" in proofs(why(model, seen))


def test_a_nearly_saturated_image():
    model = lenet()
    with torch.no_grad():
        model.fc.bias[0] += 40
    seen, truth = observed(model)
    found = only(why(model, seen, [], truth), "Saturation")
    assert 0 < found.numbers["unsure"] < 1e-4
    assert photos(0)[0].equal(truth)


def test_a_soft_label_is_no_other_model():
    model = lenet()
    images, _ = photos(2)
    smooth = torch.full((1, 10), 0.02)
    smooth[0, 4] = 0.82
    seen = iv.observe(model, images, smooth, iv.FedSGD(), normalization=iv.CIFAR10, reveal_labels=False)
    assert proofs(why(model, seen)) == []
    assert "Model" in proofs(why(lenet(1), seen))


def test_true_tokens_say_whether_the_stated_client_is_the_right_one():
    case = updates.noisy_text()
    clean = iv.observe(case.model, case.truth, torch.tensor([7]), iv.FedSGD())
    [right] = [f for f in why(case.model, clean, [], case.truth) if f.name == "True text"]
    assert right.numbers["truth"] < 1e-10
    assert "token sequence(s)" in right.text
    [noisy] = [f for f in why(case.model, case.seen, [], case.truth) if f.name == "True text"]
    assert 1e-6 < noisy.numbers["truth"] < 2 * noisy.numbers["expected"]
    trained = replace(clean, protocol=iv.FedAvg(lr=0.1, local_steps=5))
    assert "explains the failure" in said(why(case.model, trained, [], case.truth), "Protocol")
    assert "does not fit" in said(why(case.model, clean, [], (case.truth, torch.tensor([8]))), "Client")


def test_a_sum_of_trainings_has_the_rank_of_all_their_steps():
    model = seeded(
        lambda: torch.nn.Sequential(
            *(torch.nn.Conv2d(3, 4, 3, stride=2), torch.nn.Tanh(), torch.nn.Flatten()),
            *(torch.nn.Linear(196, 60), torch.nn.Tanh(), torch.nn.Linear(60, 40)),
        )
    )
    client = iv.defenses.SecureAggregation(clients=2, client=iv.FedAvg(lr=1.0, local_steps=3))
    seen, truth = observed(model, (0, 1), protocol=client)
    assert steps_of(seen) == 3
    for known in (None, truth):
        assert not [f for f in why(model, seen, [], known) if f.verdict == "does not fit"]
    assert not [f for f in leaks(model, seen) if f.verdict == "does not fit"]


def test_noise_over_many_products_is_within_its_stated_error():
    model = seeded(lambda: FullyConnected(hidden=(80, 60), image_size=8))
    images = torch.rand(30, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    client = iv.Defended(iv.FedSGD(), [iv.defenses.GaussianNoise(0.5)], public=False)
    seen = iv.observe(model, images, torch.arange(30) % 10, client, normalization=iv.CIFAR10)
    for one in foreign(model, seen, 1e-7):
        assert abs(one.sigma / 0.5 - 1) < 4 * one.error
    assert abs(noise_of(foreign(model, seen, 1e-7)).sigma / 0.5 - 1) < 0.1
