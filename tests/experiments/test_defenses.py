"""Defences before two attackers, and the training that is left: known answers, small and deterministic."""

import pytest
import torch

import invlib as iv
from invlib import experiments
from invlib.experiments import defenses, record

IMAGES, LABELS = iv.data.samples("fashion")
INPUTS = iv.FASHION_MNIST.encode(IMAGES)


def right(client, rounds=2, seed=0):
    return defenses.trained(
        "LeNetZhu", client, INPUTS[:40], LABELS[:40], INPUTS[40:], LABELS[40:], rounds=rounds, seed=seed
    )


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
