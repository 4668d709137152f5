"""Identifiability by hand, its interval beside scipy's, and the floors' neighbours."""

import pytest
import scipy.stats
import torch

import invlib as iv
from invlib import metrics
from invlib.errors import ConfigError


def pool_of(count=20, side=12):
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(0))


def test_blurred_images_are_identified_and_others_placed():
    pool = pool_of()
    truth = pool[[3, 7, 11]]
    images = torch.stack([0.5 * pool[3] + 0.25, pool[8], 0.5 * pool[11] + 0.5 * pool[0]])
    images[2] = 0.51 * pool[0] + 0.49 * pool[11]
    for likeness in (metrics.by_pixels, metrics.by_ssim):
        found = iv.identifiability(images, truth, pool, likeness=likeness)
        assert found.ranks[0] == 1
        assert found.ranks[1] > 1
        assert found.ranks[2] == 2
        assert (found.hits, found.candidates) == (1, 20)
        assert (found.share, found.chance) == (pytest.approx(1 / 3), 0.05)


def test_originals_that_the_pool_lacks_are_candidates_too():
    pool = pool_of()
    inside = iv.identifiability(pool[:4], pool[:4], pool)
    outside = iv.identifiability(pool[:4], pool[:4], pool[4:])
    some = iv.identifiability(pool[:4], pool[:4], pool[2:])
    assert inside == outside == some
    assert inside.candidates == 20


def test_a_twin_counts_against_the_original_and_a_broken_image_is_last():
    pool = pool_of(5)
    twins = torch.cat([pool, pool[:1]])
    assert iv.identifiability(pool[:1], pool[:1], twins).ranks == (2,)
    assert iv.identifiability(torch.full_like(pool[:1], torch.nan), pool[:1], pool).ranks == (5,)


def test_noise_is_identified_as_often_as_a_guess():
    pool = pool_of(10, side=4)
    noise = torch.rand(400, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    truth = pool[torch.arange(400) % 10]
    low, high = iv.identifiability(noise, truth, pool).interval
    assert low < 0.1 < high


@pytest.mark.parametrize(("hits", "of"), [(0, 5), (3, 8), (8, 8), (40, 100)])
def test_the_interval_is_wilsons(hits, of):
    found = metrics.Identified(ranks=(1,) * hits + (2,) * (of - hits), candidates=10)
    expected = scipy.stats.binomtest(hits, of).proportion_ci(method="wilson")
    assert found.interval == pytest.approx((expected.low, expected.high), abs=1e-4)
    assert f"identified {hits} of {of} among 10 candidates" in str(found)
    assert str(found).endswith("chance 10.0%")


def test_what_cannot_be_compared_is_refused():
    pool = pool_of(3)
    with pytest.raises(ConfigError, match="expected the same"):
        iv.identifiability(pool[:2], pool[:1], pool)
    with pytest.raises(ConfigError, match=r"the pool \(3, 3, 6, 12\)"):
        iv.identifiability(pool[:1], pool[:1], pool[:, :, :6])
    with pytest.raises(ConfigError, match="none of them zero"):
        iv.identifiability(pool[:0], pool[:0], pool)
    with pytest.raises(ConfigError, match="no image besides the truth"):
        iv.identifiability(pool[:1], pool[:1], pool[:1])
