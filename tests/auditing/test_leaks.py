"""What an update tells by itself, on updates of which it is known."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import invlib as iv
from invlib.auditing.facts import foreign, numbers_of, precision, ranks, scale_free, softmax
from invlib.auditing.leaks import leaks
from invlib.auditing.words import VERDICTS
from invlib.models.mlp import FullyConnected
from tests.attacks.text_nets import Net, drawn
from tests.auditing import updates
from tests.auditing.updates import UPDATES, lenet, observed, photos, seeded


def by_name(model, seen):
    found = leaks(model, seen)
    assert len({f.name for f in found}) == len(found)
    return {f.name: f for f in found}


def normalised(**more):
    model = seeded(updates.normalised)
    return model, observed(model, (0, 1, 2), **more)[0]


@pytest.mark.parametrize("make", UPDATES, ids=lambda make: make.__name__)
def test_every_update_has_its_findings(make):
    case = make()
    before = {name: value.clone() for name, value in case.model.state_dict().items()}
    for finding in leaks(case.model, case.seen):
        assert finding.verdict in VERDICTS
        assert finding.text.endswith(".")
        assert finding.kind == "read off the update"
    assert all(torch.equal(value, before[name]) for name, value in case.model.state_dict().items())


def test_labels_are_read_off_whether_they_were_told_or_not():
    model = lenet()
    seen, _ = observed(model, (4,))
    told = by_name(model, seen)["Labels"]
    hidden = by_name(model, replace(seen, labels=None))["Labels"]
    assert told.numbers["labels"] == hidden.numbers["labels"] == [4]
    assert told.numbers["agrees"] is True
    assert hidden.numbers["agrees"] is None
    assert not told.numbers["guess"]
    assert told.numbers["doubt"] == 0
    wrong = by_name(model, replace(seen, labels=torch.tensor([5])))["Labels"]
    assert wrong.numbers["agrees"] is False
    assert "Others were told" in wrong.text


@pytest.mark.parametrize("count", [1, 3, 6])
def test_batch_size_is_the_rank_of_the_first_layer(count):
    model = seeded(lambda: FullyConnected(hidden=(40,), image_size=16))
    seen, _ = observed(model, tuple(range(count)))
    found = by_name(model, seen)["Batch size"]
    assert found.verdict == "read off"
    assert (found.numbers["rank"], found.numbers["layer"]) == (count, "linear0.weight")
    assert found.numbers["agrees"]
    assert found.numbers["gap"] > 1e4
    fewer = by_name(model, replace(seen, num_images=max(1, count - 1), labels=None))["Batch size"]
    assert fewer.verdict == ("read off" if count == 1 else "does not fit")


def test_local_steps_are_counted_and_held_against_those_that_were_stated():
    model, seen = normalised(protocol=iv.FedAvg(lr=0.01, local_steps=3), training_mode=True)
    found = by_name(model, seen)["Local steps"]
    assert (found.verdict, found.numbers["steps"]) == ("read off", 3)
    other = replace(seen, protocol=iv.FedAvg(lr=0.01, local_steps=2))
    assert by_name(model, other)["Local steps"].verdict == "does not fit"
    assert by_name(model, replace(seen, buffers={}))["Local steps"].verdict == "nothing found"


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    "protocol", [iv.FedSGD(), iv.FedAvg(lr=1e-3, local_steps=2, weight_decay=0.1)], ids=["one", "two steps"]
)
def test_weights_before_batch_norm_tell_the_mode(training, protocol):
    model, seen = normalised(protocol=protocol, training_mode=training)
    found = by_name(model, seen)["Mode of batch norm"]
    assert (found.verdict, found.numbers["training"]) == ("read off", training)
    hidden = replace(seen, training_mode=not training, buffers={})
    assert by_name(model, hidden)["Mode of batch norm"].verdict == "does not fit"


def test_mean_colour_is_that_of_the_batch():
    model, seen = normalised(training_mode=True)
    found = by_name(model, seen)["Batch statistics"]
    truth = photos(0, 1, 2)[0].mean((0, 2, 3))
    gap = (torch.tensor(found.numbers["colour"]) - truth).abs()
    assert (gap <= 3 * torch.tensor(found.numbers["deviation"]) + 1e-3).all()


def test_tokens_and_the_longest_sequence():
    model, words = Net(), drawn(2, 7)
    seen = iv.observe(
        model, words, torch.tensor([7, 8]), iv.FedSGD(), vocabulary=[f"w{k}" for k in range(60)]
    )
    found = by_name(model, seen)
    assert found["Tokens"].numbers["tokens"] == words.unique().tolist()
    assert f"w{int(words.min())}" in found["Tokens"].text
    assert found["Longest sequence"].numbers["length"] == 7


@pytest.mark.parametrize(
    ("make", "attacks"),
    [
        (updates.fully_connected, ["fully_connected", "exact_batch"]),
        (updates.exact_batch, ["exact_batch"]),
        (updates.searched, []),
        (updates.patches, ["patch_embedding"]),
        (updates.tokens, ["token_embedding"]),
        (updates.other_model, ["recursive_inversion"]),
    ],
    ids=lambda x: getattr(x, "__name__", None),
)
def test_closed_forms_are_named_where_they_apply(make, attacks):
    case = make()
    found = by_name(case.model, case.seen)["Exactly readable layers"]
    assert found.numbers["attacks"] == attacks
    assert found.verdict == ("read off" if attacks else "nothing found")


def test_closed_forms_are_not_read_off_noise():
    case = updates.noisy()
    found = by_name(case.model, case.seen)["Exactly readable layers"]
    assert found.numbers["attacks"]
    assert found.verdict == "nothing found"


def test_a_head_that_is_not_used_is_named():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.other = lenet(), nn.Linear(3, 2)

        def forward(self, x):
            return self.body(x) + 0 * self.other.weight.sum()

    model = Two()
    seen, _ = observed(model)
    assert by_name(model, seen)["Zero tensors"].numbers["names"] == ["other.weight", "other.bias"]


@pytest.mark.parametrize("grid", ["bfloat16", "float16"])
def test_precision_is_the_grid_of_the_numbers(grid):
    model = lenet()
    seen, _ = observed(model)
    kind = getattr(torch, grid)
    rounded = replace(seen, update={n: v.to(kind).float() for n, v in seen.update.items()})
    assert by_name(model, rounded)["Precision"].numbers["grid"] == grid
    assert "Precision" not in by_name(model, seen)
    # Rounding is no noise.
    assert by_name(model, rounded)["Noise"].verdict == "nothing found"


def test_signs_and_bits_are_counted():
    model = lenet()
    for transform, levels in ((iv.defenses.Sign(), 1), (iv.defenses.Quantize(4), 15)):
        seen, _ = observed(model, protocol=iv.Defended(iv.FedSGD(), [transform], public=False))
        found = by_name(model, seen)
        assert found["Quantisation"].verdict == "read off"
        assert "Precision" not in found
        assert found["Quantisation"].numbers["levels"] <= levels
    assert "Quantisation" not in by_name(model, observed(model)[0])


@pytest.mark.parametrize("share", [0.02, 0.3])
def test_numbers_that_were_left_out_are_told_from_silent_units(share):
    model = lenet()
    cut = iv.Defended(iv.FedSGD(), [iv.defenses.TopK(share)], public=False)
    found = by_name(model, observed(model, protocol=cut)[0])["Sparsity"]
    assert found.verdict == "read off"
    assert found.numbers["zeros"] == pytest.approx(1 - share, abs=1e-3)
    relu = seeded(lambda: FullyConnected(hidden=(64, 64), image_size=16))
    for rows in ((0,), (0, 1, 2)):
        natural = by_name(relu, observed(relu, rows)[0])["Sparsity"]
        assert natural.verdict == "nothing found"
        assert natural.numbers["zeros"] > 0.02


@pytest.mark.parametrize("rows", [(0,), (0, 1, 2)])
@pytest.mark.parametrize("sigma", [1e-4, 1e-2])
def test_noise_is_estimated_within_its_error(rows, sigma):
    model = seeded(lambda: FullyConnected(hidden=(64,), image_size=16))
    client = iv.Defended(iv.FedSGD(), [iv.defenses.GaussianNoise(sigma)], public=False)
    found = by_name(model, observed(model, rows, protocol=client)[0])["Noise"]
    assert found.verdict == "read off"
    assert found.numbers["sigma"] == pytest.approx(sigma, rel=4 * found.numbers["error"])
    assert by_name(model, observed(model, rows)[0])["Noise"].verdict == "nothing found"


def test_rows_of_the_last_layer_add_up_to_zero_by_the_slow_way():
    model = lenet()
    images, labels = photos(0, 1)
    loss = F.cross_entropy(model(iv.CIFAR10.encode(images)), labels)
    slope = torch.autograd.grad(loss, model.fc.weight)[0]
    seen, _ = observed(model, (0, 1))
    noisy = {**seen.update, "fc.weight": slope + 0.01}
    found = foreign(model, replace(seen, update=noisy), 1e-7)[0]
    # The sum over ten classes is 0.1 in each column, and 0.1 / sqrt(10) is the noise that makes it.
    columns = model.fc.weight.shape[1]
    assert found.sigma == pytest.approx(0.1 / 10**0.5 * (columns / (columns + 1)) ** 0.5, rel=1e-3)


def test_the_softmax_of_the_features_is_that_of_the_slow_way():
    model = lenet()
    seen, images = observed(model, (3,))
    found = softmax(model, seen)
    assert found.gap < 1e-5
    assert found.negative == 1
    assert found.label > -1e-5
    with torch.no_grad():
        own = model(iv.CIFAR10.encode(images)).softmax(1)[0, 3]
    assert found.length == pytest.approx(1 - float(own), rel=1e-4)
    assert softmax(lenet(1), seen).gap > 0.01
    # A clipped update is of the same model.
    clipped = iv.Defended(iv.FedSGD(), [iv.defenses.Clip(0.1)], public=False)
    assert softmax(model, observed(model, (3,), protocol=clipped)[0]).gap < 1e-5
    assert softmax(model, observed(model, (0, 1))[0]) is None


def test_several_steps_have_more_products_behind_the_first_layer():
    model = seeded(lambda: FullyConnected(hidden=(40, 30), image_size=16))
    seen, _ = observed(model, (0, 1), protocol=iv.FedAvg(lr=0.05, local_steps=3))
    most = {r.layer: r.most for r in ranks(model, seen)}
    assert most["linear0.weight"] == 2
    assert most.get("linear1.weight", 6) == 6
    first = next(r for r in ranks(model, seen) if r.layer == "linear0.weight")
    assert first.rank == 2


def test_a_network_without_batch_norm_has_no_mode():
    model = lenet()
    seen, _ = observed(model)
    assert scale_free(model, seen) is None
    assert "Mode of batch norm" not in by_name(model, seen)
    assert precision(seen, numbers_of(model, seen)) == torch.finfo(torch.float32).eps


def test_rounding_of_a_sure_networks_probabilities_is_no_noise():
    model = lenet()
    with torch.no_grad():
        model.fc.bias[5] += 10
    seen, _ = observed(model, (5,))
    assert softmax(model, seen).length < 1e-3
    assert not any(f.there for f in foreign(model, seen, torch.finfo(torch.float32).eps))


def test_adam_makes_neither_sparse_numbers_nor_a_mode():
    model, seen = normalised(protocol=iv.FedAvg(lr=1e-3, local_steps=2, optimizer="adam"), training_mode=True)
    found = by_name(model, seen)
    assert "Mode of batch norm" not in found
    assert found["Sparsity"].verdict == "nothing found"
