"""Accounting against closed forms, and against numbers that other accountants give."""

import math

import pytest

import invlib as iv
from invlib.defenses import accounting
from invlib.errors import ConfigError, DependencyError

ONE = "add or remove one"


def test_mu_names_the_neighbours_and_grows_with_the_root_of_the_rounds():
    assert accounting.gaussian_mu(4, neighbours=ONE) == 0.25
    assert accounting.gaussian_mu(4, neighbours="replace one") == 0.5
    assert accounting.gaussian_mu(4, neighbours=ONE, rounds=100) == 2.5
    with pytest.raises(TypeError, match="neighbours"):
        accounting.gaussian_mu(4)
    with pytest.raises(ConfigError, match="neighbours is 'bounded'; expected 'add or remove one' or"):
        accounting.gaussian_mu(4, neighbours="bounded")


@pytest.mark.parametrize("multiplier", [0, -1.0, math.nan, math.inf])
def test_no_noise_has_no_finite_mu(multiplier):
    with pytest.raises(ConfigError, match=r"noise_multiplier is .*; expected a positive number"):
        accounting.gaussian_mu(multiplier, neighbours=ONE)


# Opacus 1.6.0, accountants.analysis.gdp: eps_from_mu(mu=mu, delta=delta), delta_eps_mu(eps=eps, mu=mu).
@pytest.mark.parametrize(
    ("mu", "delta", "epsilon"),
    [
        (0.5, 1e-5, 1.9930914044151204),
        (1, 1e-5, 4.377178095681223),
        (2, 1e-6, 10.997151214220654),
        (4, 1e-5, 24.381610883113723),
    ],
)
def test_epsilon_is_that_of_opacus(mu, delta, epsilon):
    assert accounting.epsilon(mu, delta) == pytest.approx(epsilon, rel=1e-9)
    assert accounting.delta(mu, epsilon) == pytest.approx(delta, rel=1e-9)


@pytest.mark.parametrize(
    ("epsilon", "mu", "delta"),
    [(1, 0.5, 0.006829594983114591), (1, 1, 0.12693673750664392), (8, 2, 0.000495401738938746)],
)
def test_delta_is_that_of_opacus(epsilon, mu, delta):
    assert accounting.delta(mu, epsilon) == pytest.approx(delta, rel=1e-9)


# Opacus 1.6.0: PRVAccountant with history [(noise, rate, rounds)], get_epsilon(1e-5, eps_error=0.001), an
# upper limit that is at most 0.002 too large.
@pytest.mark.parametrize(
    ("noise", "rate", "rounds", "epsilon"),
    [
        (4, 1, 10, 3.3425956788211733),
        (1, 1, 1, 4.378411683273295),
        (1, 0.01, 1000, 1.8293687321449958),
        (0.8, 0.02, 500, 4.669353693074162),
    ],
)
def test_subsampled_epsilon_is_that_of_opacus(noise, rate, rounds, epsilon):
    if rate == 1:
        whole = accounting.epsilon(accounting.gaussian_mu(noise, neighbours=ONE, rounds=rounds), 1e-5)
        assert whole == pytest.approx(epsilon, abs=2e-3)
    pytest.importorskip("dp_accounting")
    given = accounting.subsampled_epsilon(noise, 1e-5, rate=rate, rounds=rounds, neighbours=ONE)
    assert given == pytest.approx(epsilon, abs=2e-3)


def test_ends_of_the_range():
    assert accounting.delta(0, 1) == 0
    assert accounting.epsilon(0, 1e-5) == 0
    assert accounting.epsilon(1e-7, 1e-5) == 0  # delta alone is enough
    assert accounting.delta(1, 0) == pytest.approx(math.erf(0.5 / math.sqrt(2)))  # the total variation
    assert 0 < accounting.delta(1, 30) < 1e-190
    assert accounting.delta(1000, 0) == 1
    for delta in (0, 1, 1.5):
        with pytest.raises(ConfigError, match=r"epsilon delta is .*; expected a number in \(0, 1\)"):
            accounting.epsilon(1, delta)


def test_classical_formula_says_less_than_it_gives_and_knows_the_clip():
    told = {"sensitivity": 1.0, "clip": 1.0, "neighbours": ONE}
    noise = math.sqrt(2 * math.log(1.25 / 1e-5)) / 0.5
    mu = accounting.classical_mu(0.5, 1e-5, **told)
    assert mu == pytest.approx(1 / noise)
    assert accounting.epsilon(mu, 1e-5) < 0.5  # where it is proved, it is safe
    many = accounting.classical_mu(50, 1e-5, **told)
    assert accounting.delta(many, 50) > 1e-5  # and where it is not, it need not be
    assert accounting.classical_mu(0.5, 1e-5, **told | {"clip": 3.0}, rounds=4) == pytest.approx(6 * mu)
    assert accounting.classical_mu(0.5, 1e-5, **told | {"sensitivity": 2.0}) == pytest.approx(mu / 2)


def test_whom_a_client_protects():
    clip, noise = iv.defenses.Clip(2.0), iv.defenses.GaussianNoise(1.0)

    def of(*transforms, client=None):
        return accounting.protection(iv.Defended(client or iv.FedSGD(), transforms), 8)

    assert of(clip, noise) == accounting.Protection(unit="one client", noise_multiplier=0.5)
    assert of(clip, iv.defenses.TopK(0.1), noise, iv.defenses.Sign()) == of(clip, noise)

    class Each(iv.FedSGD):
        clip = 4.0

    assert of(noise, client=Each()) == accounting.Protection(unit="one example", noise_multiplier=2.0)
    assert of(clip, noise, client=Each()) == of(clip, noise)
    for transforms in [(noise,), (noise, clip), (clip, iv.defenses.Sign(), noise)]:
        with pytest.raises(ConfigError, match=r"GaussianNoise\(1\.0\); expected Gaussian noise after a clip"):
            of(*transforms)
    with pytest.raises(ConfigError, match="expected Gaussian noise"):
        of(clip, iv.defenses.LaplaceNoise(1.0))
    for client in (iv.FedSGD(), iv.Defended(iv.FedSGD(), [clip])):
        with pytest.raises(ConfigError, match="tells of no noise; expected a Defended"):
            accounting.protection(client, 8)


def test_a_missing_accountant_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "dp_accounting", None)
    with pytest.raises(DependencyError, match=r"pip install invlib\[dp\]"):
        accounting.subsampled_epsilon(1, 1e-5, rate=0.1, rounds=10, neighbours=ONE)
