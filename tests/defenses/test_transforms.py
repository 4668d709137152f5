"""What each transform sends, and what is left of an update after several in their order."""

import copy
import pickle

import pytest
import torch

import invlib as iv
from invlib.core.fingerprint import describe
from invlib.errors import ConfigError, ObservationError
from tests.conftest import build_tiny, random_batch

D = iv.defenses
ALL = [
    D.Clip(0.5),
    D.GaussianNoise(0.1),
    D.LaplaceNoise(0.1),
    D.TopK(0.1),
    D.Sign(),
    D.Quantize(4),
    D.Transport("bfloat16"),
    D.MaskLayer("3"),
]


def update(size=400):
    generator = torch.Generator().manual_seed(3)
    return {
        "3": torch.randn(size // 4, 3, generator=generator),
        "b": torch.randn(size // 4, generator=generator),
    }


def sent(*transforms, seed=1, of=None):
    client = D.Defended(iv.FedSGD(), transforms)
    return client.release(of or update(), torch.Generator().manual_seed(seed))


def flat(named):
    return torch.cat([value.flatten() for value in named.values()])


def observed(*transforms, seed=0, client=None, **settings):
    x, y = random_batch()
    defended = iv.Defended(client or iv.FedSGD(), transforms, **settings)
    generator = torch.Generator().manual_seed(seed)
    return iv.observe(build_tiny(), x, y, defended, normalization=iv.CIFAR10, generator=generator)


def test_a_clip_is_that_of_torch():
    params = [torch.zeros_like(u).requires_grad_() for u in update().values()]
    for p, u in zip(params, update().values(), strict=True):
        p.grad = u.clone()
    torch.nn.utils.clip_grad_norm_(params, 0.5)
    for p, u in zip(params, sent(D.Clip(0.5)).values(), strict=True):
        torch.testing.assert_close(u, p.grad)
    assert torch.equal(flat(sent(D.Clip(1e6))), flat(update()))


@pytest.mark.parametrize("noise", [D.GaussianNoise, D.LaplaceNoise])
def test_sigma_is_the_standard_deviation_of_each_number(noise):
    drawn = flat(sent(noise(0.3), of={"w": torch.zeros(200_000)}))
    assert abs(float(drawn.std()) - 0.3) < 0.003
    assert abs(float(drawn.mean())) < 0.003
    most = float(drawn.abs().mean()) / 0.3  # of a normal number sqrt(2 / pi), of Laplace's sqrt(1 / 2)
    assert abs(most - {D.GaussianNoise: 0.798, D.LaplaceNoise: 0.707}[noise]) < 0.005
    assert torch.equal(flat(sent(noise(0.0))), flat(update()))


@pytest.mark.parametrize("share", [0.2, 1.0])
def test_noise_turns_an_update_as_far_as_its_length_says(share):
    g = flat(update(40_000))
    size = share * float(g.norm()) / len(g) ** 0.5
    noisy = flat(sent(D.GaussianNoise(size), of=update(40_000)))
    expected = 1 / (1 + len(g) * size**2 / float(g.square().sum())) ** 0.5
    assert float(torch.cosine_similarity(g, noisy, 0)) == pytest.approx(expected, abs=0.01)


def test_top_k_keeps_the_largest_of_all_tensors():
    g, kept = flat(update()), flat(sent(D.TopK(0.1)))
    assert int(kept.count_nonzero()) == 40
    assert torch.equal(kept[kept != 0], g[kept != 0])
    assert g[kept == 0].abs().max() <= kept[kept != 0].abs().min()
    assert torch.equal(flat(sent(D.TopK(1.0))), g)


def test_signs_levels_and_half_precision():
    g = update()
    assert torch.equal(flat(sent(D.Sign())), flat(g).sign())
    for name, value in sent(D.Quantize(4)).items():
        step = g[name].abs().max() / 7
        torch.testing.assert_close(value, (g[name] / step).round() * step)
        assert len(value.unique()) <= 15
    torch.testing.assert_close(flat(sent(D.Quantize(32))), flat(g))
    assert torch.equal(flat(sent(D.Transport("float16"))), flat(g).half().float())
    assert not flat(sent(D.Quantize(4), of={"w": torch.zeros(3)})).any()


def test_a_layer_is_masked_by_its_name_or_its_parameters():
    assert not sent(D.MaskLayer("3"))["3"].any()
    assert torch.equal(sent(D.MaskLayer("3"))["b"], update()["b"])
    layer = observed(D.MaskLayer("0"))
    assert [name for name, value in layer.update.items() if not value.any()] == ["0.weight", "0.bias"]
    both = observed(D.MaskLayer(("0.bias", "3")))
    assert [name for name, value in both.update.items() if value.any()] == ["0.weight"]
    with pytest.raises(ConfigError, match=r"MaskLayer names has 'fc'; expected one of 0.weight, 0.bias, 3"):
        observed(D.MaskLayer("fc"))


def test_order_counts():
    clipped, noisy = sent(D.Clip(0.5), D.GaussianNoise(0.1)), sent(D.GaussianNoise(0.1), D.Clip(0.5))
    assert flat(noisy).norm() == pytest.approx(0.5, rel=1e-4)
    assert flat(clipped).norm() > 1
    assert int(flat(sent(D.TopK(0.1), D.GaussianNoise(0.1))).count_nonzero()) == 400
    assert int(flat(sent(D.GaussianNoise(0.1), D.TopK(0.1))).count_nonzero()) == 40


@pytest.mark.parametrize("transform", ALL, ids=lambda t: type(t).__name__)
def test_a_seed_gives_the_update_and_nothing_else_is_drawn(transform):
    before, generator = torch.get_rng_state(), torch.Generator().manual_seed(5)
    state, private = generator.get_state(), copy.deepcopy(update())
    x, y = random_batch()
    client = iv.Defended(iv.FedSGD(), [transform])
    seen = [
        iv.observe(build_tiny(), x, y, client, normalization=iv.CIFAR10, generator=generator)
        for _ in range(2)
    ]
    assert torch.equal(flat(seen[0].update), flat(seen[1].update))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(generator.get_state(), state)
    given = update()
    sent(transform, of=given)
    assert torch.equal(flat(given), flat(private))
    other = observed(transform, seed=6)
    assert torch.equal(flat(seen[0].update), flat(other.update)) == (not transform.noise)


@pytest.mark.parametrize("transform", ALL, ids=lambda t: type(t).__name__)
def test_it_prints_pickles_and_is_described(transform):
    client = iv.Defended(iv.FedSGD(), [transform, D.Clip(1.0)], public=False)
    names = {name: getattr(D, name) for name in D.__all__} | {"FedSGD": iv.FedSGD}
    assert eval(repr(client), names) == client
    assert pickle.loads(pickle.dumps(client)) == client
    assert describe(client) == describe(pickle.loads(pickle.dumps(client)))
    assert describe(client) != describe(iv.Defended(iv.FedSGD(), [transform]))


def test_what_was_not_sent_is_said_and_hidden_with_the_rest():
    seen = observed(D.TopK(0.1))
    assert seen.sent
    for name, mask in seen.sent.items():
        assert torch.equal(mask, seen.update[name] != 0)
    assert set(observed(D.MaskLayer("3")).sent) == {"3.weight", "3.bias"}
    assert not observed(D.TopK(0.1), D.GaussianNoise(0.1)).sent
    assert not observed(D.TopK(1.0)).sent
    hidden = observed(D.TopK(0.1), public=False)
    assert hidden.protocol == iv.FedSGD()
    assert not hidden.sent
    assert torch.equal(flat(hidden.update), flat(seen.update))


def test_a_defended_client_of_several_steps_is_a_loop_of_torch():
    x, y = random_batch(4)
    net, start = build_tiny(), build_tiny()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    for rows in (slice(0, 2), slice(2, 4)):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(net(iv.CIFAR10.encode(x[rows])), y[rows]).backward()
        optimizer.step()
    moved = [a.detach() - b.detach() for a, b in zip(net.parameters(), start.parameters(), strict=True)]
    whole = torch.cat([value.flatten() for value in moved])
    least = whole.abs().sort(descending=True).values[round(0.2 * len(whole)) - 1]
    factor = 0.01 / (float(whole.norm()) + 1e-6)
    client = iv.FedAvg(lr=0.1, epochs=1, batch_size=2, momentum=0.9)
    seen = iv.observe(start, x, y, iv.Defended(client, [D.TopK(0.2), D.Clip(1e3)]), normalization=iv.CIFAR10)
    expected = torch.where(whole.abs() >= least, whole, 0)
    torch.testing.assert_close(flat(seen.update), expected)
    seen = iv.observe(start, x, y, iv.Defended(client, [D.Clip(0.01)]), normalization=iv.CIFAR10)
    torch.testing.assert_close(flat(seen.update), whole * factor)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: D.Clip(0), "Clip norm is 0; expected a positive number"),
        (lambda: D.GaussianNoise(-1), "GaussianNoise sigma is -1; expected a number from 0 on"),
        (lambda: D.LaplaceNoise("1"), "LaplaceNoise sigma is '1'; expected a number from 0 on"),
        (lambda: D.TopK(0), r"TopK share is 0; expected a number in \(0, 1\]"),
        (lambda: D.TopK(10), r"TopK share is 10; expected a number in \(0, 1\]"),
        (lambda: D.Quantize(1), "Quantize bits is 1; expected a whole number from 2 to 32"),
        (lambda: D.Transport("int8"), "Transport dtype is 'int8'; expected 'bfloat16' or 'float16'"),
        (lambda: D.MaskLayer(()), r"MaskLayer names is \(\); expected the name of a layer or a parameter"),
        (lambda: iv.Defended(iv.FedSGD, []), "Defended client is FedSGD; expected an instance"),
        (lambda: iv.Defended(iv.FedSGD(), D.Clip(1.0)), "Defended transforms is Clip"),
        (lambda: iv.Defended(iv.FedSGD(), [D.Clip]), r"Defended transforms .* not the class Clip"),
        (lambda: iv.Defended(iv.FedSGD(), [], public=1), "Defended public is 1; expected True or False"),
        (
            lambda: iv.Defended(iv.Defended(iv.FedSGD()), [D.Clip(1.0)]),
            "expected a client without defences, and all transforms in one list",
        ),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_an_update_that_half_precision_cannot_hold_is_refused():
    with pytest.raises(ObservationError, match="NaN or infinite numbers"):
        observed(D.Transport("float16"), client=_Huge())


class _Huge:
    """A client whose numbers are above the largest of half precision."""

    def __call__(self, model, inputs, labels, **settings):
        """Return them."""
        return {name: torch.full_like(p, 1e6) for name, p in model.named_parameters()}
