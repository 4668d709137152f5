"""ViT and TextDecoder: what a token is, what may look at what, and that attacks can run them."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from invlib import models
from invlib.errors import ConfigError
from invlib.models.decoder import TextDecoder
from invlib.models.transformer import Attention
from invlib.models.vit import ViT


def vit(**settings: int) -> ViT:
    sizes = {"width": 12, "depth": 2, "hidden": 8, "image_size": 8, "in_channels": 1, "num_classes": 3}
    torch.manual_seed(0)
    return ViT(**sizes | settings).eval()


def decoder() -> TextDecoder:
    torch.manual_seed(0)
    return TextDecoder(num_classes=11, context=6, width=8, heads=2, hidden=8).eval()


@pytest.mark.parametrize(("name", "count"), [("ViT", 719_690), ("TextDecoder", 717_520)])
def test_count_of_numbers_fits_a_megabyte_and_a_half_in_half_precision(name: str, count: int) -> None:
    assert models.parameter_count(models.build(name, seed=0)) == count
    assert 2 * count < 1_500_000


def test_a_token_of_vit_is_its_patch_times_the_embedding_plus_bias_and_position() -> None:
    model, seen = vit(), []
    model.blocks.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    images = torch.rand(2, 1, 8, 8)
    model(images)
    patch = images[1, 0, 4:, :4].reshape(-1)  # row 1, column 0 of two times two: token 1 + 2
    weight, bias = model.patch_embedding.weight.reshape(12, 16), model.patch_embedding.bias
    expected = weight @ patch + bias + model.position_embedding[0, 3]
    torch.testing.assert_close(seen[0][1, 3], expected)
    torch.testing.assert_close(seen[0][0, 0], model.class_token[0, 0] + model.position_embedding[0, 0])


def test_gradient_of_the_embedding_is_that_of_the_positions_times_the_patches() -> None:
    model = vit().train()  # dropout's masks are the same in both
    image = torch.rand(1, 1, 8, 8)
    nn.functional.cross_entropy(model(image), torch.tensor([2])).backward()
    patches = nn.functional.unfold(image, 4, stride=4)[0]
    errors = model.position_embedding.grad[0, 1:]
    torch.testing.assert_close(model.patch_embedding.weight.grad.reshape(12, 16), errors.T @ patches.T)
    torch.testing.assert_close(model.patch_embedding.bias.grad, errors.sum(0))


def test_attention_is_the_weighted_mean_of_the_values() -> None:
    torch.manual_seed(0)
    layer, x = Attention(4, 1, causal=True), torch.rand(1, 3, 4)
    q, k, v = (part(x)[0] for part in (layer.query, layer.key, layer.value))
    scores = (q @ k.T / 2).masked_fill(torch.ones(3, 3).triu(1).bool(), -torch.inf)
    torch.testing.assert_close(layer(x)[0], layer.output(scores.softmax(1) @ v))


def test_a_word_sees_no_later_one_and_the_logits_are_the_last_words() -> None:
    model = decoder()
    words = torch.tensor([[3, 1, 4, 1, 5]])
    after = model.features(words)
    changed = words.clone()
    changed[0, 3] = 9
    torch.testing.assert_close(model.features(changed)[:, :3], after[:, :3])
    assert not torch.allclose(model.features(changed)[:, 3:], after[:, 3:])
    torch.testing.assert_close(model(words), model.head(after[:, -1]))
    torch.testing.assert_close(model(words[:, :2]), model.head(after[:, 1]))


def test_gradient_of_the_tokens_is_zero_but_for_those_used_padding_included() -> None:
    model = decoder()
    nn.functional.cross_entropy(model(torch.tensor([[0, 7, 2]])), torch.tensor([4])).backward()
    used = model.token_embedding.weight.grad.abs().sum(1).nonzero().flatten()
    assert used.tolist() == [0, 2, 7]
    places = model.position_embedding.weight.grad.abs().sum(1).nonzero().flatten()
    assert places.tolist() == [0, 1, 2]


def test_vmap_differentiates_vit_twice() -> None:
    model = vit()
    weights = {name: p.detach().double() for name, p in model.named_parameters()}
    guesses, label = torch.rand(3, 1, 1, 8, 8, dtype=torch.float64), torch.tensor([1])

    def size_of_the_gradient(image: torch.Tensor) -> torch.Tensor:
        def loss(given: dict[str, torch.Tensor]) -> torch.Tensor:
            return nn.functional.cross_entropy(functional_call(model, given, image), label)

        return sum(part.square().sum() for part in grad(loss)(weights).values())

    with sdpa_kernel(SDPBackend.MATH):
        all_at_once = vmap(grad(size_of_the_gradient))(guesses)
        one = grad(size_of_the_gradient)(guesses[1])
    torch.testing.assert_close(all_at_once[1], one)
    assert one.abs().max() > 0


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        (torch.zeros(1, 7, dtype=torch.int64), "the text has 7 words; expected 1 to 6"),
        (torch.zeros(1, 0, dtype=torch.int64), "the text has 0 words; expected 1 to 6"),
        (torch.zeros(2, 3), "float32 .2, 3.; expected words, int64"),
        (torch.zeros(2, 3, 8, 8), "float32 .2, 3, 8, 8.; expected words"),
    ],
)
def test_other_texts_are_refused(text: torch.Tensor, wrong: str) -> None:
    with pytest.raises(ConfigError, match=wrong):
        decoder()(text)


@pytest.mark.parametrize(("size", "wrong"), [(30, "a multiple of ViT's patch, 4"), (3, "a .* at least 4")])
def test_vit_refuses_images_that_are_no_whole_patches(size: int, wrong: str) -> None:
    with pytest.raises(ConfigError, match=f"image_size is {size}; expected {wrong}"):
        models.build("ViT", image_size=size)


def test_settings_reach_the_transformers() -> None:
    assert models.build("TextDecoder", num_classes=50)(torch.tensor([[3, 4]])).shape == (1, 50)
    other = models.build("ViT", image_size=16, in_channels=1, num_classes=4, activation="tanh")
    assert other(torch.zeros(2, 1, 16, 16)).shape == (2, 4)
