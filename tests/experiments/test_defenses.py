"""Defences before two attackers, and the training that is left: known answers, small and deterministic."""

import pytest
import torch

import invlib as iv
from invlib import experiments
from invlib.experiments import defenses, record
from invlib.experiments.cases import Setup

IMAGES, LABELS = iv.data.samples("fashion")
INPUTS = iv.FASHION_MNIST.encode(IMAGES)


def right(client, rounds=2, seed=0, layer=""):
    sides = INPUTS[:40], LABELS[:40], INPUTS[40:], LABELS[40:]
    return defenses.trained("LeNetZhu", client, *sides, rounds=rounds, seed=seed, layer=layer)


def test_a_training_is_the_same_twice_and_leaves_the_global_generator():
    noisy = iv.Defended(iv.FedSGD(), [iv.defenses.Clip(1.0), iv.defenses.GaussianNoise(0.01)])
    state = torch.get_rng_state()
    first = right(noisy)
    assert first.shape == (60,)
    assert torch.equal(first, right(noisy))
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(
    "client",
    [
        iv.Defended(iv.FedSGD(), [iv.defenses.TopK(1.0), iv.defenses.GaussianNoise(0.0)]),
        iv.defenses.SecureAggregation(2),
        iv.defenses.SecureAggregation(4),
    ],
    ids=str,
)
def test_what_leaves_the_mean_update_as_it_is_costs_nothing(client):
    assert int((right(client) != right(iv.FedSGD())).sum()) <= 1  # one, by rounding


def test_training_learns_and_much_noise_ends_it():
    clean = int(right(iv.FedSGD(), rounds=40).sum())
    noisy = iv.Defended(iv.FedSGD(), [iv.defenses.Clip(1.0), iv.defenses.GaussianNoise(10.0)])
    assert clean > 15
    assert int(right(noisy, rounds=40).sum()) < clean - 5


def test_a_bottleneck_draws_the_same_twice_and_leaves_the_global_generator():
    state = torch.get_rng_state()
    assert torch.equal(right(iv.FedSGD(), layer="fc"), right(iv.FedSGD(), layer="fc"))
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.filterwarnings("ignore::invlib.errors.DoubtWarning")
def test_precode_is_read_in_front_of_what_it_draws(tmp_path):
    """The gradient of one layer with one input has that input, whatever is drawn behind it."""
    path = tmp_path / "r.jsonl"
    options = {"images": 1, "steps": 2, "reduced": True, "progress": False}
    assert experiments.run("defenses", path, only=("LeNetZhu, PRECODE, width 256, needs",), **options) == 1
    (row,) = record.read(path)
    assert row["counts"]["identified"] == [1, 1]
    assert row["psnr"][0] > 50
    assert row["score"] > 1e-5  # the attack does not know what the client drew


def test_each_network_has_all_defences_and_three_have_names():
    made = defenses.cases(Setup(steps=150, restarts=1, reduced=True, slug="fashion-mnist"))
    names = {case.columns["network"] for case in made}
    assert names == {"LeNetZhu", "ViT", "TwoLP"}
    for name in names:
        of = {case.columns["defence"] for case in made if case.network == name}
        assert {"clip", "sign", "top-k", "mixup of 2", "secure aggregation"} < of
        assert ("PRECODE" in of) == (name != "ViT")


def test_attackers_and_training_make_rows_of_one_record(tmp_path, monkeypatch):
    monkeypatch.setattr(defenses, "_ROUNDS", 2)
    path = tmp_path / "r.jsonl"
    only = ("ViT, clip, 1", "ViT, top-k, 0.1")
    options = {"images": 1, "reduced": True, "only": only, "progress": False}
    assert experiments.run("defenses", path, **options) == 4
    assert experiments.run("defenses", path, **options) == 0
    rows = record.read(path)
    counts = {row["columns"]["attacker"]: row["counts"]["identified"] for row in rows[:2]}
    assert counts == {defenses.NAIVE: [1, 1], defenses.KNOWS: [1, 1]}
    assert rows[0]["psnr"][0] == pytest.approx(rows[1]["psnr"][0], abs=3)
    table = experiments.table(path)
    assert table.rows[0][table.columns.index("identified")] == "1 of 1"
    assert rows[0]["settings"]["protocol"] != rows[1]["settings"]["protocol"]
