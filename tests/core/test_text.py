"""Observations of token sequences: integer inputs, no normalisation, words to print."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import invlib as iv
from invlib.errors import ConfigError, ObservationError


class Words(nn.Module):
    """Embedding and mean: of 20 words, 3 classes; or logits of each place."""

    def __init__(self, *, each_place: bool = False) -> None:
        super().__init__()
        self.words, self.drop, self.head = nn.Embedding(20, 8), nn.Dropout(0.1), nn.Linear(8, 3)
        self.each_place = each_place

    def forward(self, tokens):
        x = self.drop(self.words(tokens))
        return self.head(x if self.each_place else x.mean(1))


def of_places(logits, labels):
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


TOKENS, LABELS = torch.tensor([[3, 17, 4, 4], [0, 1, 2, 3]]), torch.tensor([1, 2])
VOCABULARY = tuple(f"w{k}" for k in range(20))


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Words()


def seen_by(net, tokens=TOKENS, labels=LABELS, protocol=None, **more):
    return iv.observe(net, tokens, labels, protocol or iv.FedSGD(), **more)


def test_tokens_are_observed_as_their_gradient_by_hand(net):
    seen = seen_by(net, vocabulary=list(VOCABULARY))
    by_hand = torch.autograd.grad(F.cross_entropy(net.eval()(TOKENS), LABELS), list(net.parameters()))
    assert all(torch.allclose(a, b) for a, b in zip(seen.update.values(), by_hand, strict=True))
    assert seen.is_text
    assert seen.image_shape == (4,)
    assert seen.num_images == 2
    assert seen.normalization == iv.UNIT
    assert seen.vocabulary == VOCABULARY
    assert "tokens 2×4" in repr(seen)
    assert seen.in_words(torch.tensor([[3, -1, 99]])) == ("w3 _ _",)
    assert (
        seen_by(net, TOKENS.to(torch.uint8).numpy()).update["words.weight"].equal(seen.update["words.weight"])
    )


@pytest.mark.parametrize("protocol", [iv.FedSGD(), iv.FedAvg(lr=0.1, local_steps=3, batch_size=1)])
def test_dropout_and_local_steps(net, protocol):
    seen = seen_by(net, protocol=protocol, training_mode=True)
    used = seen.update["words.weight"].any(1).nonzero().flatten().tolist()
    assert set(used) <= {*TOKENS.flatten().tolist()}


def test_logits_of_each_place_have_labels_of_each_place():
    net = Words(each_place=True)
    seen = seen_by(net, labels=TOKENS % 3, loss=of_places)
    assert seen.labels.dtype == torch.int64
    assert seen.labels.shape == (2, 4)
    seen.validate(net, text=True)


def test_captured_updates_of_text(net, tmp_path):
    seen = seen_by(net, vocabulary=VOCABULARY)
    known = {"num_images": 2, "image_shape": (4,), "vocabulary": VOCABULARY}
    again = iv.from_gradients(net, list(seen.update.values()), **known)
    assert again.is_text
    assert again.normalization == iv.UNIT
    assert again.vocabulary == VOCABULARY
    before = {name: value.clone() for name, value in net.state_dict().items()}
    after = {name: value - 0.1 * seen.update[name] for name, value in before.items()}
    trained = iv.from_state_dicts(net, before, after, protocol=iv.FedAvg(lr=0.1, local_steps=1), **known)
    assert torch.allclose(trained.mean_gradient("words.weight"), seen.update["words.weight"], atol=1e-6)
    iv.save_observation(again, tmp_path / "text")
    loaded = iv.load_observation(tmp_path / "text")
    assert loaded.image_shape == (4,)
    assert loaded.vocabulary == VOCABULARY
    assert loaded.is_text


def test_the_next_word_is_a_label_like_others(net):
    seen = seen_by(net, TOKENS[:1], LABELS[:1], reveal_labels=False)
    assert iv.labels.infer(net, seen).labels.tolist() == [1]


@pytest.mark.parametrize(
    "attack",
    [iv.fully_connected(), iv.GradientMatching(steps=1), iv.best(steps=1), iv.recursive_inversion()],
    ids=lambda attack: type(attack).__name__,
)
def test_attacks_on_images_refuse_text_by_name(net, attack):
    with pytest.raises(ObservationError, match=r"of token sequences \(4,\); expected images"):
        attack(net, seen_by(net))


def test_a_text_is_no_image_to_measure():
    empty = torch.empty(0)
    result = iv.Reconstruction(
        images=empty,
        labels=None,
        score=0.0,
        trial_scores=empty,
        trials=empty,
        status="closed_form",
        tokens=TOKENS,
        seconds=0,
    )
    with pytest.raises(ConfigError, match="the reconstruction is of text; expected images"):
        iv.evaluate(result, torch.rand(2, 1, 4, 4))


@pytest.mark.parametrize(
    ("tokens", "more", "message"),
    [
        (torch.tensor([[3, 20]] * 2), {}, "does not run on tokens from 3 to 20"),
        (torch.tensor([[3, -1]] * 2), {}, "lowest number of -1; expected whole numbers from 0 on"),
        (torch.zeros(2, 0, dtype=torch.int64), {}, r"tokens have shape \(2, 0\)"),
        (TOKENS[:1], {}, "for 1 token sequences; expected one for each"),
        (TOKENS, {"vocabulary": "abc"}, "vocabulary is a str; expected a list of words"),
        (TOKENS, {"vocabulary": [1, 2]}, "vocabulary is a list; expected a list of words"),
    ],
)
def test_bad_text_is_named(net, tokens, more, message):
    with pytest.raises(ObservationError, match=message):
        seen_by(net, tokens, **more)


def test_images_still_need_a_normalization(net):
    with pytest.raises(ConfigError, match="normalization is None"):
        iv.observe(nn.Sequential(nn.Flatten(), nn.Linear(4, 2)), torch.rand(1, 1, 2, 2), [0], iv.FedSGD())
    seen = seen_by(net)
    with pytest.raises(ObservationError, match="vocabulary is given for images"):
        iv.Observation(
            update=seen.update,
            protocol=seen.protocol,
            num_images=1,
            image_shape=(1, 2, 2),
            normalization=iv.UNIT,
            vocabulary=VOCABULARY,
        )
    with pytest.raises(ObservationError, match=r"of images \(1, 2, 2\); expected token sequences"):
        iv.Observation(
            update={}, protocol=seen.protocol, num_images=1, image_shape=(1, 2, 2), normalization=iv.UNIT
        ).validate(net, text=True)
