"""Bounds against the tables, their inverses, and each other."""

import pytest

from invlib.defenses import accounting, bounds
from invlib.errors import ConfigError

ONE = "add or remove one"


@pytest.mark.parametrize(
    ("kappa", "expected"),
    [(0.1, (0.151, 0.217, 0.389, 0.764, 0.997)), (0.001, (0.0023, 0.0048, 0.0183, 0.138, 0.819))],
)
def test_table_of_noise(kappa, expected):
    found = [bounds.reconstruction_bound(kappa, 1 / noise) for noise in (4, 2, 1, 0.5, 0.25)]
    assert found == pytest.approx(expected, abs=1e-3)
    assert found[0] == pytest.approx(expected[0], rel=0.05)


def test_table_of_rounds():
    mus = [accounting.gaussian_mu(4, neighbours=ONE, rounds=rounds) for rounds in (1, 10, 100, 1000)]
    found = [bounds.reconstruction_bound(0.001, mu) for mu in mus]
    assert found == pytest.approx((0.0023, 0.0107, 0.278, 1.0), abs=1e-3)
    assert found[1] == pytest.approx(0.0107, rel=0.01)


def test_without_an_update_nothing_is_gained():
    assert bounds.reconstruction_bound(0.03, 0) == pytest.approx(0.03)
    for kappa in (0, 1, -0.1):
        with pytest.raises(ConfigError, match=r"kappa is .*; expected a number in \(0, 1\)"):
            bounds.reconstruction_bound(kappa, 1)


@pytest.mark.parametrize("neighbours", [ONE, "replace one"])
def test_noise_for_undoes_the_bound(neighbours):
    noise = bounds.noise_for(0.05, 0.001, neighbours=neighbours, rounds=7)
    mu = accounting.gaussian_mu(noise, neighbours=neighbours, rounds=7)
    assert bounds.reconstruction_bound(0.001, mu) == pytest.approx(0.05)
    with pytest.raises(ConfigError, match=r"gamma is 0\.001; expected more than kappa, 0\.05"):
        bounds.noise_for(0.001, 0.05, neighbours=neighbours)
    with pytest.raises(TypeError, match="neighbours"):
        bounds.noise_for(0.05, 0.001)


@pytest.mark.parametrize("kappa", [0.0001, 0.1, 0.5, 0.9])
@pytest.mark.parametrize(("noise", "rounds"), [(4, 10), (1, 1)])
def test_subsampling_everybody_is_the_closed_form(kappa, noise, rounds):
    pytest.importorskip("dp_accounting")
    mu = accounting.gaussian_mu(noise, neighbours=ONE, rounds=rounds)
    closed = bounds.reconstruction_bound(kappa, mu)
    found = bounds.subsampled_bound(kappa, noise, rate=1, rounds=rounds, neighbours=ONE)
    assert closed <= found + 1e-9
    assert found == pytest.approx(closed, rel=2e-3)


def test_subsampled_round_is_a_mixture():
    pytest.importorskip("dp_accounting")
    # One round, taken part in with probability q: the test is the whole round's, and is worth it q times.
    kappa, rate = 0.01, 0.2
    whole = bounds.reconstruction_bound(kappa, 1.0)
    found = bounds.subsampled_bound(kappa, 1, rate=rate, rounds=1, neighbours=ONE)
    assert found == pytest.approx((1 - rate) * kappa + rate * whole, rel=1e-3)


def test_noise_for_subsampled_rounds():
    pytest.importorskip("dp_accounting")
    setting = {"rate": 0.1, "rounds": 20, "neighbours": ONE}
    noise = bounds.noise_for(0.005, 0.001, **setting)
    assert bounds.subsampled_bound(0.001, noise, **setting) == pytest.approx(0.005, rel=0.03)
    assert noise < bounds.noise_for(0.005, 0.001, rounds=20, neighbours=ONE) / 2
    with pytest.raises(ConfigError, match=r"neighbours is 'replace one' with a rate of 0\.1"):
        bounds.noise_for(0.02, 0.001, rate=0.1, neighbours="replace one")
    with pytest.raises(ConfigError, match="neighbours is 'replace one'; expected 'add or remove one'"):
        bounds.subsampled_bound(0.02, 1, rate=0.1, rounds=1, neighbours="replace one")


def test_two_points():
    assert bounds.two_point_bound(0, 1) == 0.5
    # Two candidates, one clip on either side of zero: replacing one by the other.
    assert bounds.two_point_bound(2, 1.6) == pytest.approx(bounds.reconstruction_bound(0.5, 1 / 1.6))
    with pytest.raises(ConfigError, match="noise is 0; expected a positive number"):
        bounds.two_point_bound(1, 0)
