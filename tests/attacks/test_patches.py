"""The closed form of vision transformers: layouts, clients, expectations and refusals."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

import invlib as iv
from invlib.attacks.layout import patch_step
from invlib.core.network import trainable_parameters
from invlib.core.optional import torchvision
from invlib.errors import DoubtWarning, RecoveryError

SIDE, PATCH, WIDTH, COUNT = 32, 8, 64, 16


class Small(nn.Module):
    """A vision transformer of two blocks; subclasses embed in other ways."""

    def __init__(self, *, token=True, dropout=0.1, width=WIDTH, patch=PATCH):
        super().__init__()
        self.patch = patch
        count = (SIDE // patch) ** 2
        self.proj = nn.Conv2d(3, width, patch, stride=patch)
        self.cls_token = nn.Parameter(0.02 * torch.randn(1, 1, width)) if token else None
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, count + token, width))
        self.drop = nn.Dropout(dropout)
        self.blocks = nn.Sequential(
            *(
                nn.TransformerEncoderLayer(
                    width, 4, width, dropout, activation="gelu", batch_first=True, norm_first=True
                )
                for _ in range(2)
            )
        )
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def embed(self, x):
        x = self.proj(x).flatten(2).transpose(1, 2)
        if self.cls_token is not None:
            x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)
        return x + self.pos_embed

    def forward(self, x):
        x = self.norm(self.blocks(self.drop(self.embed(x))))
        return self.head(x.mean(1) if self.cls_token is None else x[:, 0])


class LinearPatches(Small):
    """Patches in an order of their own, a Linear, positions from nn.Embedding, none of the class token."""

    def __init__(self):
        super().__init__()
        del self.proj, self.pos_embed
        self.to_token, self.places = nn.Linear(3 * PATCH**2, WIDTH), nn.Embedding(COUNT + 5, WIDTH)
        self.register_buffer("order", torch.randperm(COUNT))

    def embed(self, x):
        n = SIDE // PATCH
        x = x.view(len(x), 3, n, PATCH, n, PATCH).permute(0, 2, 4, 3, 5, 1).reshape(len(x), COUNT, -1)
        x = self.to_token(x[:, self.order]) + self.places(torch.arange(COUNT).flip(0))
        return torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)


class Functional(Small):
    """No module is called: im2col, a product from the left, and a table in the shape of the map."""

    def __init__(self):
        super().__init__(token=False)
        del self.proj, self.pos_embed
        self.matrix = nn.Parameter(torch.randn(WIDTH, 3 * PATCH**2) / 14)
        self.table = nn.Parameter(torch.zeros(WIDTH, SIDE // PATCH, SIDE // PATCH))

    def embed(self, x):
        x = F.unfold(x, PATCH, stride=PATCH)
        x = 2 * (self.matrix @ x)
        x = x.view(len(x), WIDTH, SIDE // PATCH, -1)
        x += self.table
        return x.flatten(2).mT


class NormalizesInside(Small):
    def embed(self, x):
        return super().embed((x - 0.4) / torch.tensor([0.2, 0.3, 0.4]).view(3, 1, 1))


class Overlapping(Small):
    def __init__(self):
        super().__init__(token=False)
        self.proj = nn.Conv2d(3, WIDTH, PATCH, stride=7, padding=2)
        self.pos_embed = nn.Parameter(torch.randn(1, 25, WIDTH))


def torchvisions():
    torchvision()
    from torchvision.models.vision_transformer import VisionTransformer

    net = VisionTransformer(
        image_size=SIDE,
        patch_size=PATCH,
        num_layers=2,
        num_heads=4,
        hidden_dim=WIDTH,
        mlp_dim=WIDTH,
        dropout=0.1,
        num_classes=10,
    )
    nn.init.normal_(net.heads.head.weight, std=0.02)  # zero when fresh
    return net


LAYOUTS = {
    "convolution, class token": Small,
    "no class token": lambda: Small(token=False),
    "linear, embedded places": LinearPatches,
    "functional": Functional,
    "normalizes inside": NormalizesInside,
    "overlapping windows": Overlapping,
    "torchvision": torchvisions,
}


def made(make, dtype=torch.float32):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make().to(dtype).eval()


def photo(dtype=torch.float32, n=1):
    x, y = iv.data.samples("photos32", indices=list(range(1, 1 + n)))
    return x.to(dtype), y


def see(net, protocol=None, **options):
    x, y = photo(next(net.parameters()).dtype)
    return x, iv.observe(net, x, y, protocol or iv.FedSGD(), normalization=iv.CIFAR10, **options)


def psnr(result, x):
    return -10 * math.log10(float((result.images.double() - x.double()).square().mean()))


def plain(net, seen):
    """Return the images that least squares give without weights and without photographs."""
    step = patch_step(net, seen.image_shape)
    signals = step.of_positions(seen.update[step.positions])
    inputs = torch.zeros(math.prod(seen.image_shape), dtype=torch.float64)
    solved = torch.linalg.lstsq(signals.T, step.of_weight(seen.update[step.weight])).solution
    inputs[step.pixels] = solved
    return SimpleNamespace(images=seen.normalization.decode(inputs.view(1, *seen.image_shape)).clamp(0, 1))


def client(steps, *, adam=False, **settings):
    """A client that trains with an optimiser of torch, as a function."""

    def train(model, inputs, labels, *, params=None, buffers=None, loss=F.cross_entropy, on_step=None):
        start = dict(trainable_parameters(model) if params is None else params)
        now = {name: p.detach().clone().requires_grad_() for name, p in start.items()}
        optimizer = (torch.optim.Adam if adam else torch.optim.SGD)(now.values(), **settings)
        for _ in range(steps):
            value = loss(functional_call(model, {**now, **(buffers or {})}, (inputs,)), labels)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
        return {name: now[name].detach() - start[name] for name in start}

    return train


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_float32_gradient_gives_the_image_to_rounding(layout):
    net = made(LAYOUTS[layout])
    before = {name: p.clone() for name, p in net.state_dict().items()}
    x, seen = see(net, reveal_labels=False)
    rec = iv.patch_embedding()(net, seen)
    assert psnr(rec, x) > 100
    assert rec.certified.tolist() == [True]
    assert rec.residuals[0] == rec.score < 1e-6
    assert rec.expected_psnr[0] == pytest.approx(psnr(rec, x), abs=6)
    assert rec.labels.tolist() == photo()[1].tolist()
    assert not rec.warnings
    assert all(torch.equal(p, before[name]) for name, p in net.state_dict().items())


@pytest.mark.parametrize("layout", ["convolution, class token", "linear, embedded places"])
def test_synthetic_signals_of_full_rank_in_double_precision(layout):
    net = made(LAYOUTS[layout], torch.float64)
    x, seen = see(net)
    step = patch_step(net, (3, SIDE, SIDE))
    generator = torch.Generator().manual_seed(1)
    table = torch.randn(seen.update[step.positions].shape, generator=generator, dtype=torch.float64)
    weight = torch.zeros_like(seen.update[step.weight]).flatten()
    weight[step.weight_at] = step.of_positions(table).T @ step.patches(iv.CIFAR10.encode(x))
    weight = weight.view(seen.update[step.weight].shape)
    for scale in (1.0, -1e-9):  # of clipping, or of a learning rate
        update = {**seen.update, step.positions: scale * table, step.weight: scale * weight}
        assert psnr(iv.patch_embedding()(net, replace(seen, update=update)), x) > 200


CLIENTS = {
    "ten local steps": iv.FedAvg(lr=0.05, local_steps=10),
    "momentum": client(20, lr=0.01, momentum=0.9),
    "weight decay": client(10, lr=0.02, momentum=0.9, weight_decay=1e-2),
}


@pytest.mark.parametrize("name", CLIENTS)
def test_local_steps_with_dropout_in_training_mode(name):
    net = made(Small)
    x, seen = see(net, CLIENTS[name], training_mode=True)
    rec = iv.patch_embedding()(net, seen)
    assert psnr(rec, x) > 80
    assert rec.certified.all()
    assert not rec.warnings
    decayed = "weight decay" in name
    assert ("subtracted" in rec.note) == decayed
    if decayed:
        with pytest.warns(DoubtWarning, match="is of no image"):
            assert psnr(iv.patch_embedding(decay=False)(net, seen), x) < 50


def test_decay_of_the_embedding_alone_is_found_in_a_gradient():
    net = made(Small)
    x, seen = see(net)
    update = dict(seen.update)
    update["proj.weight"] = update["proj.weight"] + 3e-3 * net.proj.weight.detach()
    rec = iv.patch_embedding()(net, replace(seen, update=update))
    assert psnr(rec, x) > 90
    assert "0.003 times" in rec.note


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_weighed_against_the_spectrum_of_photographs(dtype):
    net = made(Small)
    x, seen = see(net)
    seen = replace(seen, update={name: u.to(dtype) for name, u in seen.update.items()})
    rec = iv.patch_embedding()(net, seen)
    assert psnr(rec, x) > psnr(plain(net, seen), x) + 2
    assert psnr(rec, x) > (30 if dtype is torch.bfloat16 else 45)
    assert rec.expected_psnr[0] == pytest.approx(psnr(rec, x), abs=6)
    assert not rec.warnings


@pytest.mark.parametrize(("share", "noiseless", "gain"), [(1e-3, [], -0.1), (0.1, ["pos_embed"], 5)])
def test_noise_is_expected_by_the_residual_and_weighed_against_photographs(share, noiseless, gain):
    net = made(Small)
    x, seen = see(net)
    generator = torch.Generator().manual_seed(0)
    size = math.sqrt(sum(float(u.square().mean()) for u in seen.update.values()) / len(seen.update))
    noisy = {n: u + share * size * torch.randn(u.shape, generator=generator) for n, u in seen.update.items()}
    seen = replace(seen, update={**noisy, **{name: seen.update[name] for name in noiseless}})
    with pytest.warns(DoubtWarning, match="it has noise"):
        rec = iv.patch_embedding()(net, seen)
    assert psnr(rec, x) > psnr(plain(net, seen), x) + gain
    assert -12 < rec.expected_psnr[0] - psnr(rec, x) < 4  # which side has the noise cannot be known
    assert rec.certified.tolist() == [False]
    assert "subtracted" not in rec.note


@pytest.mark.parametrize(
    ("make", "indices"),
    [
        (Small, [0, 2]),
        (lambda: iv.models.build("ViT"), [0]),
        (lambda: iv.models.build("ViT", weights="cifar10"), [2]),
    ],
    ids=["small", "fresh ViT", "trained ViT"],
)
def test_the_expectation_falls_with_the_picture_under_heavy_noise(make, indices):
    net = made(make)
    photos, classes = iv.data.samples("photos32", indices=indices)
    for x, y in zip(photos.split(1), classes.split(1), strict=True):
        seen = iv.observe(net, x, y, iv.FedSGD(), normalization=iv.CIFAR10)
        size = torch.cat([u.flatten() for u in seen.update.values()]).square().mean().sqrt()
        before = math.inf
        for share in (1e-3, 1e-2, 1e-1, 1.0):
            draw = torch.Generator().manual_seed(0)
            noisy = {
                n: u + share * size * torch.randn(u.shape, generator=draw) for n, u in seen.update.items()
            }
            with pytest.warns(DoubtWarning, match="it has noise"):
                rec = iv.patch_embedding()(net, replace(seen, update=noisy))
            expected = float(rec.expected_psnr[0])
            if math.isnan(expected):
                assert rec.residuals[0] > 0.7, share
                assert "no PSNR can be expected" in rec.warnings[0]
            else:
                assert abs(expected - psnr(rec, x)) < 7, share
                assert expected < before + 2, share
                before = expected
        assert before < 20
        noise = {n: torch.randn(u.shape, generator=draw) for n, u in seen.update.items()}
        with pytest.warns(DoubtWarning, match="no PSNR can be expected"):
            assert math.isnan(iv.patch_embedding()(net, replace(seen, update=noise)).expected_psnr[0])


@pytest.mark.parametrize("case", ["Adam", "two images"])
def test_what_is_no_sum_over_one_image_is_never_certified(case):
    net = made(Small)
    if case == "Adam":
        _, seen = see(net, client(3, adam=True, lr=1e-3))
    else:
        x, y = photo(n=2)
        seen = iv.observe(net, x, y, client(1, lr=0.1), normalization=iv.CIFAR10)
        seen = replace(seen, num_images=1, labels=None)
    with pytest.warns(DoubtWarning, match="not linear in its gradients"):
        rec = iv.patch_embedding()(net, seen)
    assert rec.certified.tolist() == [False]
    assert math.isnan(rec.expected_psnr[0])
    assert rec.score > 1e-2


class Sinusoidal(Small):
    def __init__(self):
        super().__init__(token=False)
        table = self.pos_embed.detach().clone()
        del self.pos_embed
        self.register_buffer("pos_embed", table)


class Rotary(Small):
    def __init__(self):
        super().__init__(token=False)
        del self.pos_embed

    def embed(self, x):
        return F.layer_norm(self.proj(x).flatten(2).mT, (WIDTH,))


class Stem(Small):
    def __init__(self):
        super().__init__(token=False)
        self.proj = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.ReLU(), nn.Conv2d(8, WIDTH, 2, 2))


class Normed(Small):
    def embed(self, x):
        x = F.layer_norm(self.proj(x).flatten(2).mT, (WIDTH,))
        return x + self.pos_embed[:, 1:]


class Twice(Small):
    """The table is added after the first block once more."""

    def forward(self, x):
        x = self.blocks[0](self.embed(x)) + self.pos_embed
        return self.head(self.norm(self.blocks[1](x))[:, 0])


class Computed(Small):
    """One table of rows and one of columns."""

    def __init__(self):
        super().__init__(token=False)
        del self.pos_embed
        self.rows, self.columns = (nn.Parameter(torch.randn(4, WIDTH)) for _ in range(2))

    def embed(self, x):
        table = self.rows[:, None] + self.columns
        return self.proj(x).flatten(2).mT + table.flatten(0, 1)


def frozen(name):
    def make():
        net = Small()
        net.get_parameter(name).requires_grad_(False)
        return net

    return make


def zero_head():
    net = Small()
    nn.init.zeros_(net.head.weight)
    return net


REFUSED = {
    "sinusoidal": (Sinusoidal, "before 'add of fixed or computed positions"),
    "rotary": (Rotary, "positions are added to what 'convolution' makes of the image, before 'native_layer"),
    "stem": (Stem, "a convolutional stem"),
    "normed": (Normed, "positions are added to what 'convolution' makes of the image, before 'native_layer"),
    "twice": (Twice, "'pos_embed' or 'proj.weight' is used for more"),
    "computed": (Computed, "before 'add of fixed or computed positions"),
    "frozen table": (frozen("pos_embed"), "add of 'pos_embed', which is frozen"),
    "frozen embedding": (frozen("proj.weight"), "'proj.weight', which is frozen"),
    "head of zeros": (zero_head, "a head of zeros"),
    "narrow": (lambda: Small(patch=4, width=48), "48 equations for each pixel of a patch have 64 unknowns"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_say_what_is_in_the_way(name):
    make, why = REFUSED[name]
    net = made(make)
    _, seen = see(net)
    with pytest.raises(RecoveryError, match=why):
        iv.patch_embedding()(net, seen)


def test_refusals_of_observations():
    net = made(Small)
    _, seen = see(net)
    part = torch.ones_like(seen.update["pos_embed"], dtype=torch.bool)
    part[0, 0] = False
    with pytest.raises(RecoveryError, match="of the numbers of 'pos_embed' were sent"):
        iv.patch_embedding()(net, replace(seen, sent={"pos_embed": part}))
    x, y = photo(n=2)
    batch = iv.observe(net, x, y, iv.FedSGD(), normalization=iv.CIFAR10)
    with pytest.raises(RecoveryError, match="confine every patch to 32 of 192 dimensions"):
        iv.patch_embedding()(net, batch)
    with pytest.raises(RecoveryError, match="'pos' is no parameter of Small"):
        iv.patch_embedding(positions="pos")(net, seen)


def test_as_many_unknowns_as_equations_leave_nothing_to_certify():
    net = made(lambda: Small(patch=4))
    x, seen = see(net)
    with pytest.warns(DoubtWarning, match="64 unknowns and as many equations leave none to check"):
        rec = iv.patch_embedding()(net, seen)
    assert psnr(rec, x) > 35
    assert rec.expected_psnr[0] < psnr(rec, x) + 3
    assert rec.certified.tolist() == [False]


def test_names_may_be_given():
    net = made(Small)
    x, seen = see(net)
    assert psnr(iv.patch_embedding(weight="proj.weight", positions="pos_embed")(net, seen), x) > 100
    with pytest.raises(RecoveryError, match="no product of the image with 'norm"):
        iv.patch_embedding(weight="norm.weight")(net, seen)


def test_best_takes_it_and_believes_its_certificate_where_dropout_hides_the_step():
    net = made(Small)
    for options in ({}, {"protocol": CLIENTS["ten local steps"], "training_mode": True}):
        x, seen = see(net, **options)
        rec = iv.best()(net, seen)
        assert psnr(rec, x) > 80
        assert rec.note.startswith("closed form, from the patch embedding and its positions, certified")
        assert rec.certified.all()
