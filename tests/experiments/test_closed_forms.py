"""Experiments whose clients are read by closed forms: what is counted, and that their rows go on."""

from dataclasses import replace

import pytest
import torch

import invlib as iv
from invlib import experiments
from invlib.errors import RecoveryError
from invlib.experiments import exact, plan, record
from invlib.experiments.exact import compared
from invlib.models.mlp import FullyConnected


def test_what_is_found_is_counted_against_what_there_is():
    truth = torch.rand(4, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    labels = torch.tensor([3, 1, 4, 1])
    far = (truth[0] + 0.5) % 1
    images, named = torch.stack([truth[2] + 1e-6, truth[1], far]), torch.tensor([4, 2, 3])
    found = compared(images, named, torch.tensor([True, True, False]), truth, labels)
    assert found["psnr"][1:3] == [float("inf"), pytest.approx(120.0, abs=1e-3)]
    assert sum(value != value for value in found["psnr"]) == 1
    assert found["counts"] == {
        "certified": [2, 4],
        "right": [2, 4],
        "certified and wrong": [1, 2],  # another label
        "whole batches": [0, 1],
    }
    whole = compared(truth.flip(0), labels.flip(0), torch.ones(4).bool(), truth, labels)
    assert whole["counts"]["whole batches"] == [1, 1]
    assert whole["counts"]["certified and wrong"] == [0, 4]
    assert whole["labels_right"] == 4
    none = compared(truth[:0], labels[:0], torch.ones(0).bool(), truth, labels)
    assert none["counts"]["certified and wrong"] == [0, 0]
    assert none["labels_right"] == 0


def made(tmp_path, name, *only, dataset=None):
    """Run an experiment on one client a case, twice; the second run has nothing to do."""
    path = tmp_path / "r.jsonl"
    options = {"images": 1, "reduced": True, "only": only, "dataset": dataset, "progress": False}
    count = experiments.run(name, path, **options)
    before = path.read_bytes()
    assert experiments.run(name, path, **options) == 0
    assert path.read_bytes() == before
    rows = record.read(path)
    assert len(rows) == count
    return rows, experiments.table(path)


@pytest.fixture
def four(monkeypatch):
    """Batches of four images alone, whose names are a part of others."""

    def cases(setup):
        return [case for case in exact.cases(setup) if case.images == 4]

    monkeypatch.setattr(exact, "_STEPS", 30)
    monkeypatch.setitem(experiments.EXPERIMENTS, "exact", replace(exact.EXPERIMENT, cases=cases))


def test_batches_of_fresh_and_trained_networks_make_rows_and_a_table(tmp_path, four):
    only = [f"4, 200, 1, {weights}, normalised" for weights in ("fresh", "trained")]
    rows, table = made(tmp_path, "exact", *only, dataset="patches32")
    assert [row["settings"]["measure"]["trained"] for row in rows] == [False, True]
    for row in rows:
        assert row["counts"]["whole batches"] == [1, 1]
        assert min(row["psnr"]) > 150
        assert row["floors"][0]["grey"] < 30
    assert table.rows[0][table.columns.index("certified")] == "4 of 4"
    assert "4 of 4" in str(table)
    assert "evaluations" not in table.columns
    assert "restart" not in table.caption
    assert "SSIM" not in table.columns


def test_photographs_and_sentences_make_rows_of_one_record(tmp_path):
    rows, table = made(tmp_path, "transformers", "trained, gradient, float", "2 sentences")
    single, half, text = rows
    assert single["psnr"][0] > 100
    assert single["counts"] == {"certified": [1, 1]}
    assert 30 < half["psnr"][0] < single["psnr"][0]
    assert text["psnr"] == text["floors"] == []
    assert text["sentences"] == text["found"]
    assert text["counts"]["whole sentences"] == [2, 2]
    assert text["settings"]["dataset"] == "sentences"
    assert text["truth"] is None
    words = dict(zip(table.columns, table.rows[2], strict=True))
    assert (words["certified"], words["whole sentences"], words["PSNR in dB"]) == ("2 of 2", "2 of 2", "")
    assert len({a.get_xlabel() for a in experiments.figure(tmp_path / "r.jsonl").axes if a.images}) == 3


def test_a_case_has_at_most_as_many_clients_as_it_says():
    tasks = plan.plan(plan.Request(name="transformers")).tasks()
    numbers = {case.name: [first for one, first in tasks if one is case] for case, _ in tasks}
    assert numbers["ViT, fresh, gradient, float32"] == [0, 1, 2, 3]
    assert numbers["TextDecoder, trained, 4 sentences, gradient"] == [0, 4, 8, 12]
    assert len(numbers["TextDecoder, trained, a sentence, 5 steps of SGD, dropout"]) == 16


def test_a_refusal_is_a_row(tmp_path, monkeypatch, four):
    def refuse(*_, **__):
        raise RecoveryError("no rank")

    monkeypatch.setattr("invlib.attacks.exact.ExactBatch.__call__", refuse)
    [row], table = made(tmp_path, "exact", "4, 200, 1, fresh, normalised", dataset="patches32")
    assert row["note"] == "no rank"
    assert row["counts"]["right"] == [0, 4]
    words = dict(zip(table.columns, table.rows[0], strict=True))
    assert (words["right"], words["PSNR in dB"], words["seconds"]) == ("0 of 4", "", "–")


def test_a_layer_with_fewer_active_units_than_images_certifies_nothing():
    """Every signal lies in a column space that is all of the active units' own."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = FullyConnected(hidden=(64, 32), image_size=8).double()
    with torch.no_grad():
        model.linear0.bias[6:] = -100.0
    images = torch.rand(8, 3, 8, 8, generator=torch.Generator().manual_seed(0)).double()
    seen = iv.observe(model, images, torch.arange(8), iv.FedSGD(), normalization=iv.CIFAR10)
    with pytest.raises(RecoveryError, match="only 6 inputs or active outputs"):
        iv.exact_batch()(model, seen)
