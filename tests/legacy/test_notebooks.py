"""A program of 2020, cell by cell, with no other change than the import."""

import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import invlib.legacy as inversefed
from invlib import models
from invlib.errors import ConfigError, DataError, UnknownNameError
from invlib.optim.optimizers import LBFGS

ROOT = Path(__file__).parents[2]
CONFIG = {
    "signed": True,
    "boxed": True,
    "cost_fn": "sim",
    "indices": "def",
    "weights": "equal",
    "lr": 0.1,
    "optim": "adam",
    "restarts": 1,
    "max_iterations": 3,
    "total_variation": 1e-1,
    "init": "randn",
    "filter": "none",
    "lr_decay": True,
    "scoring_choice": "loss",
}


@pytest.fixture(autouse=True)
def _own_randomness() -> Iterator[None]:
    """Seeding the global generators is the contract here; no other test shall notice."""
    state = np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng(devices=[]):
        inversefed.utils.set_random_seed(0)
        yield
    np.random.set_state(state)  # noqa: NPY002


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with tiny CIFAR-10, CIFAR-100, MNIST and ImageNet, and no network."""
    rng = np.random.default_rng(0)
    for name, shape, classes in (
        ("cifar10", (32, 32, 3), 10),
        ("cifar100", (32, 32, 3), 100),
        ("mnist", (28, 28), 10),
    ):
        for split, count in (("train", 12), ("test", 8)):
            x = rng.integers(1, 256, (count, *shape), dtype=np.uint8)
            np.savez(tmp_path / f"{name}_{split}.npz", x=x, y=np.arange(count) % classes)
    for split in ("train", "test"):
        for label, name in enumerate(("beagle", "cat")):
            folder = tmp_path / "imagenet" / split / name
            folder.mkdir(parents=True)
            pixels = rng.integers(0, 256, (60, 80, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{label}.png")
    monkeypatch.setenv("INVLIB_DATA", str(tmp_path))
    return tmp_path


def statistics(name: str, setup: dict[str, Any]) -> tuple[Tensor, Tensor]:
    dm = torch.as_tensor(getattr(inversefed.consts, f"{name}_mean"), **setup)[:, None, None]
    ds = torch.as_tensor(getattr(inversefed.consts, f"{name}_std"), **setup)[:, None, None]
    return dm, ds


def several(validloader: Any, setup: dict[str, Any], count: int, first: int = 2) -> tuple[Tensor, Tensor]:
    ground_truth, labels = [], []
    while len(labels) < count:
        img, label = validloader.dataset[first]
        first += 1
        if label not in labels:
            labels.append(torch.as_tensor((label,), device=setup["device"]))
            ground_truth.append(img.to(**setup))
    return torch.stack(ground_truth), torch.cat(labels)


def test_recovery_from_a_gradient(
    disk: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(disk)
    arch = "LeNetZhu"
    setup = inversefed.utils.system_startup()
    defs = inversefed.training_strategy("conservative")
    loss_fn, trainloader, validloader = inversefed.construct_dataloaders("CIFAR10", defs)
    model, _ = inversefed.construct_model(arch, num_classes=10, num_channels=3)
    model.to(**setup)
    defs.epochs = 2
    file = f"{arch}_{defs.epochs}.pth"
    for _ in range(2):
        try:
            model.load_state_dict(torch.load(file, weights_only=True))
        except FileNotFoundError:
            inversefed.train(model, loss_fn, trainloader, validloader, defs, setup=setup)
            torch.save(model.state_dict(), file)
    model.eval()
    dm, ds = statistics("cifar10", setup)

    picture = Image.new("RGB", (64, 48), (200, 30, 30)).resize((32, 32), Image.BICUBIC)
    ground_truth = torch.as_tensor(np.array(picture) / 255, **setup)
    ground_truth = ground_truth.permute(2, 0, 1).sub(dm).div(ds).unsqueeze(0).contiguous()
    labels = torch.as_tensor((1,), device=setup["device"])
    assert [validloader.dataset.classes[label] for label in labels] == ["automobile"]

    model.zero_grad()
    target_loss, _, _ = loss_fn(model(ground_truth), labels)
    input_gradient = torch.autograd.grad(target_loss, model.parameters())
    input_gradient = [grad.detach() for grad in input_gradient]
    rec_machine = inversefed.GradientReconstructor(model, (dm, ds), CONFIG, num_images=1)
    output, stats = rec_machine.reconstruct(input_gradient, labels, img_shape=(3, 32, 32))
    feat_mse = (model(output.detach()) - model(ground_truth)).pow(2).mean().item()
    test_mse = (output - ground_truth).pow(2).mean().item()
    test_psnr = inversefed.metrics.psnr(output, ground_truth, factor=1 / ds)
    assert re.fullmatch(
        r"-?\d+\.\d{4} \d+\.\d{4} -?\d+\.\d{2} \d\.\d{4}e.\d\d",
        f"{stats['opt']:2.4f} {test_mse:2.4f} {test_psnr:4.2f} {feat_mse:2.4e}",
    )
    data = inversefed.metrics.activation_errors(model, output, ground_truth)
    assert len(list(data["se"].values())[:-3]) == len(list(data["sim"].values())[:-3]) > 4
    inversefed.utils.save_to_table(
        "tables", name="exp_iv", dryrun=False, model=arch, rec_loss=stats["opt"], psnr=test_psnr
    )
    table = (disk / "tables" / "table_exp_iv.csv").read_text().splitlines()
    assert table == ["model\trec_loss\tpsnr", f"{arch}\t{stats['opt']}\t{test_psnr}"]
    printed = capsys.readouterr().out
    assert printed.startswith("Currently evaluating")
    assert "Rec. loss" not in printed


@pytest.mark.parametrize(("num_images", "batch_size"), [(1, 0), (2, 0), (4, 2)])
def test_recovery_from_weight_updates(disk: Path, num_images: int, batch_size: int) -> None:
    setup = inversefed.utils.system_startup()
    defs = inversefed.training_strategy("conservative")
    loss_fn, _, validloader = inversefed.construct_dataloaders("CIFAR10", defs)
    model, _ = inversefed.construct_model("LeNetZhu", num_classes=10, num_channels=3, seed=4)
    model.to(**setup)
    model.eval()
    dm, ds = statistics("cifar10", setup)
    ground_truth, labels = several(validloader, setup, num_images)
    local_lr, local_steps, use_updates = 1e-3, 5, True
    input_parameters = inversefed.reconstruction_algorithms.loss_steps(
        model,
        ground_truth,
        labels,
        lr=local_lr,
        local_steps=local_steps,
        use_updates=use_updates,
        batch_size=batch_size,
    )
    input_parameters = [p.detach() for p in input_parameters]
    rec_machine = inversefed.FedAvgReconstructor(
        model,
        (dm, ds),
        local_steps,
        local_lr,
        {**CONFIG, "restarts": 2},
        num_images=num_images,
        use_updates=use_updates,
        batch_size=batch_size,
    )
    output, stats = rec_machine.reconstruct(input_parameters, labels, img_shape=(3, 32, 32))
    guess = inversefed.loss_steps(
        model, output, labels, lr=local_lr, local_steps=local_steps, batch_size=batch_size
    )
    cost = inversefed.reconstruction_algorithms.reconstruction_costs([guess], input_parameters, "sim")
    assert stats["opt"] == pytest.approx(float(cost), rel=1e-3, abs=1e-6)
    # A network under other weights, as 2020's own loss_steps ran it.
    patched = inversefed.MetaMonkey(model)
    assert isinstance(patched, inversefed.nn.MetaMonkey)
    moved = {name: p + 0.1 for name, p in patched.parameters.items()}
    assert torch.equal(patched(ground_truth), model(ground_truth))
    assert not torch.allclose(patched(ground_truth, moved), model(ground_truth))
    loss, *_ = loss_fn(patched(ground_truth, patched.parameters), labels)
    assert len(torch.autograd.grad(loss, list(patched.parameters.values()))) == len(input_parameters)


def test_a_residual_network_on_cifar100(disk: Path) -> None:
    setup = inversefed.utils.system_startup()
    defs = inversefed.training_strategy("conservative")
    loss_fn, _, validloader = inversefed.construct_dataloaders("CIFAR100", defs)
    model, _ = inversefed.construct_model("ResNet20", num_classes=100, num_channels=3)
    model.to(**setup)
    model.eval()
    dm, ds = statistics("cifar100", setup)
    ground_truth, labels = several(validloader, setup, 3)
    target_loss, _, _ = loss_fn(model(ground_truth), labels)
    gradient = [g.detach() for g in torch.autograd.grad(target_loss, model.parameters())]
    config = {**CONFIG, "max_iterations": 1, "total_variation": 1e-4}
    rec_machine = inversefed.GradientReconstructor(model, (dm, ds), config, num_images=3)
    output, _ = rec_machine.reconstruct(gradient, labels, img_shape=(3, 32, 32))
    assert output.shape == ground_truth.shape
    data = inversefed.metrics.activation_errors(model, output, ground_truth)
    assert len([value for name, value in data["mse"].items() if "conv" in name]) == 19


def test_imagenet_with_a_network_of_the_callers_own(disk: Path) -> None:
    setup = inversefed.utils.system_startup()
    defs = inversefed.training_strategy("conservative")
    loss_fn, trainloader, validloader = inversefed.construct_dataloaders(
        "ImageNet", defs, data_path=str(disk)
    )
    model = models.build("resnet18", seed=0).to(**setup)
    dm, ds = statistics("imagenet", setup)
    img, label = validloader.dataset[1]
    assert img.shape == (3, 224, 224)
    assert label == 1
    assert len(validloader.dataset.classes) == 1000
    assert next(iter(trainloader))[0].shape == (2, 3, 224, 224)
    ground_truth, labels = img[None].to(**setup), torch.as_tensor((label,), device=setup["device"])
    target_loss, _, _ = loss_fn(model(ground_truth), labels)
    gradient = [g.detach() for g in torch.autograd.grad(target_loss, model.parameters())]
    rec_machine = inversefed.GradientReconstructor(model, (dm, ds), {**CONFIG, "max_iterations": 1})
    output, _ = rec_machine.reconstruct(gradient, labels, img_shape=(3, 224, 224), dryrun=True)
    assert output.shape == ground_truth.shape


def test_the_loop_of_rec_mult(disk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = inversefed.options().parse_args(["--signed", "--epochs", "1", "--data_path", str(disk)])
    assert (args.signed, args.boxed, args.tv, args.target_id) == (False, True, 1e-4, None)
    defs = inversefed.training_strategy("adam", epochs=args.epochs, lr=0.01)
    setup = inversefed.utils.system_startup(args, defs)
    loss_fn, _, validloader = inversefed.construct_dataloaders(args.dataset, defs, data_path=args.data_path)
    model, seed = inversefed.construct_model("LeNetZhu", verbose=True)
    stats: dict[str, list[float]] = {}
    inversefed.training.training_routine.validate(model.eval(), loss_fn, validloader, defs, setup, stats)
    name, form = loss_fn.metric()
    logits = model(torch.stack([x for x, _ in validloader.dataset])).detach()
    targets = torch.arange(8)
    assert stats["valid_losses"][-1] == pytest.approx(float(cross_entropy(logits, targets)) / 2, rel=1e-5)
    right = float((logits.argmax(1) == targets).float().mean())
    assert f"{stats['valid_' + name][-1]:{form}}" == f"{right:6.2%}"
    config = {**CONFIG, "optim": "LBFGS", "cost_fn": "l2", "max_iterations": 1}
    rec_machine = inversefed.GradientReconstructor(model, config=config)
    rec_machine.iDLG = False
    x, y = validloader.dataset[0]
    loss = loss_fn(model(x[None]), torch.tensor([y]))[0]
    rec_machine.reconstruct(torch.autograd.grad(loss, model.parameters()), None, verbose=True)
    printed = capsys.readouterr().out
    assert f"Model initialized with random key {seed}." in printed
    assert "AdamStrategy(epochs=1, batch_size=32" in printed
    assert re.search(r"It: 0\. Rec\. loss: +\d+\.\d{4}\.\nChoosing optimal result \.\.\.\n", printed)
    assert re.search(r"Optimal result score: +\d+\.\d{4}\nTotal time: \d+\.\d+\.\n$", printed)


def test_training_lowers_the_loss_and_says_how(disk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    defs = inversefed.training_strategy("conservative", lr=0.02, epochs=8)
    defs.augmentations, defs.validate = False, 4
    loss_fn, trainloader, validloader = inversefed.construct_dataloaders("CIFAR10", defs)
    model, _ = inversefed.construct_model("TwoLP", seed=0)
    stats = inversefed.train(model, loss_fn, trainloader, validloader, defs, verbose=True)
    assert stats["train_losses"][-1] < stats["train_losses"][0] / 2
    assert {key: len(values) for key, values in stats.items()} == {
        "train_losses": 8,
        "train_Accuracy": 8,
        "valid_losses": 3,
        "valid_Accuracy": 3,
    }
    rates = re.findall(r"Epoch: (\d+)\| lr: (\S+) \|", capsys.readouterr().out)
    assert rates == [("0", "0.0200"), ("4", "0.0002"), ("7", "0.0000")]
    assert not model.training
    defs.epochs, defs.lr = 3, 1e30
    with pytest.warns(UserWarning, match=r"the loss of epoch \d is not finite; the training ends here"):
        inversefed.train(model, loss_fn, trainloader, validloader, defs)
    defs.optimizer = "LARS"
    with pytest.raises(ConfigError, match="config 'optimizer' is 'LARS'; expected one of 'SGD', 'AdamW'"):
        inversefed.train(model, loss_fn, trainloader, validloader, defs)
    with pytest.raises(
        ConfigError, match="config 'strategy' is 'bold'; expected one of 'conservative', 'adam'"
    ):
        inversefed.training_strategy("bold")


def test_the_warm_up_of_adam() -> None:
    defs = inversefed.training_strategy("adam", epochs=40)
    defs.validate = 5
    rates: list[float] = []
    model = nn.Linear(1, 2)
    step = torch.optim.AdamW.step

    class Recording:
        def __call__(self, x: Tensor, y: Tensor) -> tuple[Tensor, str, str]:
            return cross_entropy(x, y), "", ""

        def metric(self, *_: Tensor) -> tuple[Any, ...]:
            return (torch.zeros(()), "Accuracy") if _ else ("Accuracy", "")

    def recorded(self: torch.optim.AdamW, *how: Any) -> Any:
        rates.append(self.param_groups[0]["lr"])
        return step(self, *how)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", recorded)
        loader = [(torch.zeros(1, 1), torch.zeros(1, dtype=torch.long))]
        inversefed.train(model, Recording(), loader, loader, defs)
    found = [round(rate * 1e4, 6) for rate in rates]
    assert found[:11] == pytest.approx([1, 1.9, 2.8, 3.7, 4.6, 5.5, 6.4, 7.3, 8.2, 9.1, 10])
    assert [found[epoch] for epoch in (23, 24, 33, 34, 39)] == pytest.approx([10, 1, 1, 0.1, 0.1])


# Data.


def test_images_are_those_of_2020(disk: Path) -> None:
    defs = inversefed.training_strategy("conservative")
    for name, slug, side, mean, std in (
        ("CIFAR10", "cifar10", 32, inversefed.consts.cifar10_mean, inversefed.consts.cifar10_std),
        ("MNIST", "mnist", 28, inversefed.consts.mnist_mean, inversefed.consts.mnist_std),
        ("MNIST_GRAY", "mnist", 28, inversefed.consts.mnist_mean, inversefed.consts.mnist_std),
    ):
        _, trainloader, validloader = inversefed.construct_dataloaders(name, defs)
        with np.load(disk / f"{slug}_test.npz") as stored:
            x, y = torch.from_numpy(stored["x"]).float() / 255, stored["y"]
        x = x[:, None] if x.ndim == 3 else x.movedim(3, 1)
        expected = (x - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
        images, labels = next(iter(validloader))
        torch.testing.assert_close(images, expected)
        assert labels.tolist() == y.tolist()
        assert validloader.dataset[-1][1] == 7
        assert trainloader.batch_size == 12
        plain = inversefed.construct_dataloaders(name, defs, normalize=False)[2]
        torch.testing.assert_close(plain.dataset[3][0], x[3])
        assert plain.dataset[3][0].shape == (len(mean), side, side)


def test_augmentation_shifts_and_mirrors(disk: Path) -> None:
    defs = inversefed.training_strategy("conservative")
    for name in ("CIFAR10", "MNIST"):
        trainset = inversefed.construct_dataloaders(name, defs, normalize=False)[1].dataset
        defs.augmentations = False
        whole = inversefed.construct_dataloaders(name, defs, normalize=False)[1].dataset[0][0]
        defs.augmentations = True
        side = whole.shape[-1]
        padded = nn.functional.pad(whole, (4, 4, 4, 4))
        windows = padded.unfold(1, side, 1).unfold(2, side, 1).flatten(1, 2).movedim(1, 0)
        seen = set()
        for _ in range(40):
            image, _ = trainset[0]
            found = [
                (int((windows == turned).all((1, 2, 3)).nonzero()), flipped)
                for flipped, turned in enumerate((image, image.flip(-1)))
                if (windows == turned).all((1, 2, 3)).any()
            ]
            assert len(found) == 1
            seen.add(found[0])
        assert {flipped for _, flipped in seen} == {0, 1}
        assert len({place for place, _ in seen}) > 10


def test_data_that_is_not_there_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: Any, **__: Any) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr("invlib.data.files.torchvision_set", offline)
    monkeypatch.delenv("INVLIB_DATA", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    defs = inversefed.training_strategy("conservative")
    with pytest.raises(DataError, match=r"CIFAR10 \(train\) could not be downloaded .*no route to host"):
        inversefed.construct_dataloaders("CIFAR10", defs)
    with pytest.raises(DataError, match="no such folder"):
        inversefed.construct_dataloaders("CIFAR10", defs, data_path="~/elsewhere")
    with pytest.raises(DataError, match=r"ImageNet \(train\) is not in .* and must be fetched by hand"):
        inversefed.construct_dataloaders("ImageNet", defs, tmp_path)
    with pytest.raises(UnknownNameError, match=r"no data set 'BSDS-SR' \(.*not here\); known: CIFAR10, "):
        inversefed.construct_dataloaders("BSDS-SR", defs)
    with pytest.raises(UnknownNameError, match="no data set 'CIFAR'; known"):
        inversefed.construct_dataloaders("CIFAR", defs)
    (tmp_path / "data").mkdir()
    for split in ("train", "test"):
        x = np.zeros((1, 32, 32, 3), dtype=np.uint8)
        np.savez(tmp_path / "data" / f"cifar10_{split}.npz", x=x, y=np.zeros(1, int))
    assert len(inversefed.construct_dataloaders("CIFAR10", defs)[2].dataset) == 1


# Helpers.


def test_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inversefed.utils.save_to_table(tmp_path / "new", "a", True, psnr=1)
    assert not (tmp_path / "new").exists()
    for psnr in (1.5, None):
        inversefed.utils.save_to_table(tmp_path / "new", "a", False, psnr=psnr, name_="x y")
    assert (tmp_path / "new" / "table_a.csv").read_text() == "psnr\tname_\n1.5\tx y\n\tx y\n"
    with pytest.raises(ConfigError, match=r"table_a\.csv has the columns \['psnr', 'name_'\]; expected"):
        inversefed.utils.save_to_table(tmp_path / "new", "a", False, psnr=1)
    printed = capsys.readouterr().out
    assert "Would save these keys: ['psnr']." in printed
    assert f"Results saved to {tmp_path / 'new' / 'table_a.csv'}." in printed


def test_activation_errors_are_those_of_the_inputs() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 1, bias=False), nn.BatchNorm2d(2), nn.Flatten()).train()
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([2.0, -1.0]).view(2, 1, 1, 1))
    a, b = torch.ones(1, 1, 1, 2), torch.tensor([[[[1.0, 3.0]]]])
    errors = inversefed.metrics.activation_errors(model, a, b)
    assert list(errors["se"]) == ["0", "1", "2", ""]
    assert errors["se"]["0"] == errors["se"][""] == 4
    assert errors["mse"]["0"] == 2
    assert errors["se"]["1"] == 4 * (4 + 1)
    # By running statistics, which are 0 and 1 here.
    assert errors["se"]["2"] == pytest.approx(errors["se"]["1"] / (1 + 1e-5))
    assert errors["sim"]["0"] == pytest.approx(4 / (2**0.5 * 10**0.5))
    assert all(module.training for module in model)
    assert int(model[1].num_batches_tracked) == 0
    assert not model[0]._forward_hooks
    with pytest.raises(ConfigError, match="expected the same"):
        inversefed.metrics.activation_errors(model, a, b[..., :1])


def test_cudnn_can_be_made_deterministic(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", False)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", inversefed.consts.BENCHMARK)
    inversefed.utils.set_deterministic()
    assert torch.backends.cudnn.deterministic
    assert not torch.backends.cudnn.benchmark


# Networks, seeds and weights.


@pytest.mark.parametrize(("arch", "seed"), [("LeNetZhu", 1), ("ResNet20", 2)])
def test_a_seed_gives_the_weights_of_2020(arch: str, seed: int) -> None:
    model, _ = inversefed.construct_model(arch, seed=seed)
    with np.load(ROOT / "tests" / "reference" / "inversefed.npz") as stored:
        known = [stored[key] for key in sorted(stored) if key.startswith(f"weights/{arch}-{seed}/")]
    for parameter, value in zip(model.parameters(), known, strict=True):
        assert np.array_equal(parameter.detach().numpy(), value)


def test_a_seed_fixes_the_starting_points() -> None:
    drawn = []
    for _ in range(2):
        inversefed.construct_model("LeNetZhu", seed=1)
        drawn.append((torch.randn(3).tolist(), np.random.rand()))  # noqa: NPY002
    assert drawn[0] == drawn[1]
    torch.manual_seed(2)
    nn.init.uniform_(torch.empty(1))
    inversefed.utils.set_random_seed()
    assert torch.initial_seed() == 234


def test_convnet_draws_its_seventh_convolution_twice() -> None:
    model, _ = inversefed.construct_model("ConvNet", seed=3)
    torch.manual_seed(4)
    shapes = [(3, 64), (64, 128), (128, 128), (128, 256), *[(256, 256)] * 5]
    convs = [nn.Conv2d(a, b, 3) for a, b in shapes]
    linear = nn.Linear(2304, 10)
    kept = [*convs[:6], *convs[7:], linear]
    own = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    for a, b in zip(own, kept, strict=True):
        assert torch.equal(a.weight, b.weight)
        assert torch.equal(a.bias, b.bias)


def test_the_networks_of_beyond_inferring() -> None:
    for name, channels in (("BeyondInferringMNIST", 1), ("BeyondInferringCifar", 3)):
        with torch.device("meta"):
            model, _ = inversefed.construct_model(name, seed=0)
        assert [n for n, _ in model.named_parameters()][::2] == [
            *(f"conv{i}.weight" for i in (1, 2, 3, 4)),
            "linear0.weight",
            "linear1.weight",
        ]
        assert model.linear0.weight.shape == (12544, 12544)
        assert model(torch.zeros(2, channels, 28, 28, device="meta")).shape == (2, 10)
        assert isinstance(model[-1], nn.Softmax)


def renamed(model: nn.Module, **prefixes: str) -> dict[str, Tensor]:
    """The model's tensors under the names of 2020."""
    state = {}
    for name, value in model.state_dict().items():
        for own, other in prefixes.items():
            name = re.sub(own, other, name)
        state[name] = value
    return state


OLD_NAMES: list[tuple[str, dict[str, str]]] = [
    ("ConvNet64", {"^": "model."}),
    ("LeNetZhu", {"^fc": "fc.0"}),
    ("TwoLP", {"linear1": "linear3"}),
    ("MLP", {}),
    ("ResNet20", {}),
]


@pytest.mark.parametrize(("arch", "names"), OLD_NAMES, ids=[name for name, _ in OLD_NAMES])
def test_state_dicts_of_2020_are_loaded(tmp_path: Path, arch: str, names: dict[str, str]) -> None:
    trained, _ = inversefed.construct_model(arch, seed=1)
    state = renamed(trained, **names)
    torch.save(state, tmp_path / "old.pth")
    model, _ = inversefed.construct_model(arch, seed=2)
    model.load_state_dict(torch.load(tmp_path / "old.pth", weights_only=True))
    built = models.build(arch, weights=tmp_path / "old.pth")
    x = torch.rand(2, 3, 32, 32)
    assert torch.equal(model.eval()(x), trained.eval()(x))
    assert torch.equal(built(x), trained(x))
    # Its own names still fit, and the caller's dict stays as it was.
    model.load_state_dict(trained.state_dict())
    assert set(state) == set(torch.load(tmp_path / "old.pth", weights_only=True))


@pytest.mark.parametrize("arch", ["MNASNet", "DenseNet121"])
def test_torchvisions_names_are_understood(arch: str) -> None:
    vision = {"MNASNet": "mnasnet1_0", "DenseNet121": "densenet121"}
    old = models.build(vision[arch], num_classes=10, seed=1)
    model, _ = inversefed.construct_model(arch, seed=2)
    model.load_state_dict(old.state_dict())
    x = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(model.eval()(x), old(x))


def test_state_dicts_that_compute_something_else_are_refused(tmp_path: Path) -> None:
    for arch, own, other, reason in (
        ("DenseNet40", "block", "dense", "before those it was given"),
        ("iRevNet", "blocks", "stack", "orders the channels in another way"),
    ):
        model, _ = inversefed.construct_model(arch)
        old = {re.sub(f"^{own}", other, name): value for name, value in model.state_dict().items()}
        with pytest.raises(DataError, match=f"cannot be used: .*{reason}.*train it anew"):
            model.load_state_dict(old)
        torch.save(old, tmp_path / "old.pth")
        with pytest.raises(DataError, match=reason):
            models.build(arch, weights=str(tmp_path / "old.pth"))


def test_nothing_is_loaded_that_only_has_the_right_shapes() -> None:
    model, _ = inversefed.construct_model("LeNetZhu")
    state = renamed(model, **{"^fc": "fc.0"})
    for wrong in (
        {f"features.{name}": value for name, value in state.items()},  # names of another network
        dict(sorted(state.items())),  # another order: biases before weights
        dict(list(state.items())[:-1]),  # one is missing
    ):
        with pytest.raises(RuntimeError, match="Missing key"):
            model.load_state_dict(wrong)
    wide = renamed(inversefed.construct_model("ConvNet64")[0], **{"^": "model."})
    narrow, _ = inversefed.construct_model("ConvNet8")
    with pytest.raises(RuntimeError, match=r"size mismatch for conv0\.weight"):
        narrow.load_state_dict(wide)


def test_files_that_are_no_state_dict(tmp_path: Path) -> None:
    path = tmp_path / "net.pth"
    path.write_bytes(b"not weights")
    with pytest.raises(DataError, match=r"net\.pth' cannot be read"):
        models.build("LeNetZhu", weights=path)
    torch.save([1, 2], path)
    with pytest.raises(DataError, match=r"net\.pth' has list; expected a state dict"):
        models.build("LeNetZhu", weights=path)
    torch.save(nn.Linear(1, 1), path)
    with pytest.raises(DataError, match=r"net\.pth' cannot be read"):
        models.build("LeNetZhu", weights=path)


# The config.


def test_a_config_may_hold_what_it_held_in_2020() -> None:
    config = {
        **CONFIG,
        "signed": 1,
        "boxed": np.bool_(False),
        "lr_decay": np.int64(0),
        "restarts": np.int64(3),
        "max_iterations": torch.tensor(7),
        "lr": np.float32(0.5),
        "total_variation": np.float64(0),
        "indices": np.arange(2),
    }
    for given in (config, config.items(), iter(list(config.items()))):
        attack = inversefed.attack(given)
        assert (attack.steps, attack.restarts, attack.box, attack.decay) == (7, 3, False, None)
        assert attack.priors == ()
        assert (attack.optimizer.lr, attack.optimizer.signed) == (0.5, True)
    model, _ = inversefed.construct_model("LeNetZhu", seed=0)
    for indices in ([0, 1], (0, 1), range(2), np.arange(2), torch.arange(2), (i for i in range(2))):
        machine = inversefed.GradientReconstructor(model, config={"indices": indices})
        assert machine.config["indices"] == (0, 1)
    assert isinstance(inversefed.attack({"optim": "LBFGS", "lr": 0}).optimizer, LBFGS)
    for wrong in ([0.5], 3, ["a"]):
        with pytest.raises(ConfigError, match="expected a name or whole numbers"):
            inversefed.attack({"indices": wrong})
    for key, value in (("restarts", 2.5), ("restarts", True), ("lr", "0.1"), ("lr", np.bool_(True))):
        with pytest.raises(ConfigError, match=f"config '{key}' is .*; expected a number of at least"):
            inversefed.attack({key: value})
    for wrong in ("adam", 3, [1, 2]):
        with pytest.raises(ConfigError, match="expected a mapping, or pairs"):
            inversefed.attack(wrong)


@pytest.mark.parametrize("optim", ["adam", "LBFGS"])
def test_no_iterations_give_the_starting_points(optim: str) -> None:
    model, _ = inversefed.construct_model("LeNetZhu", seed=0)
    x, y = torch.randn(1, 3, 32, 32), torch.tensor([3])
    gradient = torch.autograd.grad(cross_entropy(model(x), y), model.parameters())
    config = {**CONFIG, "max_iterations": 0, "restarts": 2, "optim": optim, "filter": "median"}
    machine = inversefed.GradientReconstructor(model, (0.5, 0.25), config)
    torch.manual_seed(1)
    images, stats = machine.reconstruct(gradient, y)
    torch.manual_seed(1)
    starts = torch.randn(2, 1, 3, 32, 32)
    assert torch.equal(images, starts[stats["trial_scores"].index(stats["opt"])])


def test_the_lines_of_2020(capsys: pytest.CaptureFixture[str]) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    x, y = torch.ones(1, 1, 2, 2), torch.tensor([1])
    gradient = torch.autograd.grad(cross_entropy(model(x), y), model.parameters())
    config = {**CONFIG, "max_iterations": 502, "restarts": 2}
    machine = inversefed.GradientReconstructor(model, config=config)
    machine.reconstruct(gradient, y, (1, 2, 2), verbose=True)
    printed = capsys.readouterr().out
    assert re.findall(r"It: (\d+)\. Rec\. loss: +-?\d+\.\d{4}\.", printed) == ["0", "500", "501"]
    config = {**CONFIG, "scoring_choice": "pixelmean"}
    inversefed.GradientReconstructor(model, config=config).reconstruct(gradient, y, (1, 2, 2), verbose=True)
    assert "Computing a combined result via pixelmean ..." in capsys.readouterr().out


# The page.


def names_on_the_page() -> list[str]:
    text = (ROOT / "book" / "coming-from-2020.md").read_text(encoding="utf-8")
    table = re.search(r"^\| in 2020 \|.*\n\|[-| ]+\n((?:\|.*\n)+)", text, flags=re.MULTILINE)
    assert table
    return re.findall(r"`inversefed\.([\w.]+)`", table[1])


def test_every_name_on_the_page_is_there() -> None:
    names = names_on_the_page()
    assert len(set(names)) > 30
    for name in names:
        thing: Any = inversefed
        for part in name.split("."):
            thing = getattr(thing, part)


def test_every_name_that_is_there_is_on_the_page() -> None:
    names = names_on_the_page()
    assert not set(inversefed.__all__) - set(names)
    for file in inversefed.__all__:
        module = getattr(inversefed, file)
        if isinstance(module, ModuleType):
            defined = {
                name
                for name, value in vars(module).items()
                if name[0] != "_" and getattr(value, "__module__", None) == module.__name__
            }
            said = {name.rpartition(".")[2] for name in names if name == file or f"{file}." in name}
            assert not defined - said - set(inversefed.__all__), file


def test_the_code_on_the_page_runs() -> None:
    text = (ROOT / "book" / "coming-from-2020.md").read_text(encoding="utf-8")
    own = text[: text.index("## The command line")]
    code = "\n".join(re.findall(r"^```python\n(.*?)^```", own, flags=re.MULTILINE | re.DOTALL))
    names: dict[str, Any] = {}
    exec(code.replace("4800", "2"), names)
    assert names["found"].images.shape == (1, 3, 32, 32)
