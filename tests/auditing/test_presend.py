"""The client's check: what leaks is read off and named; what a cheating server builds raises an alarm."""

import math

import pytest
import torch

import invlib as iv
from invlib.auditing.presend import presend
from tests.auditing.constructions import (
    bins_of,
    expected_alone,
    fishing,
    imprint,
    pictures,
    traps,
)

UNIT = iv.UNIT


def check(net, x, y, **settings):
    return presend(net, x, y, **{"normalization": UNIT, "seconds": 0.1} | settings)


def ways(found, leak):
    return [way for way in found.ways if way.leak == leak]


@pytest.mark.parametrize(
    ("count", "bins", "known"),
    [(64, 1000, 60.09), (32, 1000, 31.02), (64, 128, 39.05), (64, 64, 23.7), (256, 1000, 198.3)],
)
def test_expected_number_alone_in_equally_likely_bins(count, bins, known):
    assert expected_alone(count, bins) == pytest.approx(known, abs=0.06)
    drawn = [bins_of(pictures(count, seed)[0], bins).bincount(minlength=bins) for seed in range(20)]
    alone = sum(int((c == 1).sum()) for c in drawn) / 20
    assert alone == pytest.approx(known, abs=4 * math.sqrt(count / 20))


@pytest.mark.parametrize(("count", "bins"), [(64, 1000), (32, 1000), (64, 128), (64, 64)])
def test_imprint_gives_the_pictures_that_are_alone_in_their_bin(count, bins):
    x, y = pictures(count)
    where = bins_of(x, bins)
    found = check(imprint(bins), x, y, readable=60)  # dominated mixtures apart
    assert found.leaks.tolist() == (where.bincount(minlength=bins)[where] == 1).tolist()
    assert found.action == "refuse"
    assert found.numbers["parallel_rows"] == bins
    assert [way.name for way in ways(found, "network")] == ["parallel rows"]


def test_traps_fire_for_one_picture_and_give_it():
    x, y = pictures(64)
    found = check(traps(512, 64), x, y)
    assert found.numbers["singletons"] / 512 == pytest.approx(1 / math.e, abs=0.08)
    assert found.leaks.float().mean() > 0.5
    assert found.action in ("drop", "refuse")
    assert found.numbers["parallel_rows"] == 0


def test_fishing_leaves_one_gradient_alone():
    x, y = pictures(8)
    y = torch.tensor([0, 1, 3, 4, 2, 1, 0, 3])
    honest, cheated = check(fishing(1.0), x, y), check(fishing(1000.0), x, y)
    assert not ways(honest, "network")
    assert honest.numbers["d_snr"] < 2 < 100 < cheated.numbers["d_snr"]
    assert [way.images for way in ways(cheated, "gradient")] == [(4,)]
    assert [way.name for way in ways(cheated, "network")] == ["scaled class"]
    assert (cheated.action, cheated.drop) == ("refuse", (4,))
    assert cheated.partly[4]
