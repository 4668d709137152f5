"""The span check: batches, networks without learned positions, adapters, and where it ends."""

import pytest
import torch
from torch import nn

import invlib as iv
from invlib.attacks.spans import basis, layers_of, outside_span, span_check
from invlib.errors import RecoveryError
from tests.attacks.text_nets import Net, distinct, drawn, found, seen_by

ATTACK, SPANS = iv.token_embedding(), iv.token_embedding(method="spans")


def test_a_sum_of_outer_products_spans_its_vectors_alone():
    generator = torch.Generator().manual_seed(0)
    u, delta, other = (torch.randn(n, 99, dtype=torch.float64, generator=generator) for n in (5, 5, 1))
    span, rounding, exact = basis(u.T @ delta, 5, 1e-16)
    assert span.shape == (99, 5)
    assert exact
    assert rounding < 1e-12
    assert outside_span(u, span).max() < 1e-12
    assert outside_span(other, span).min() > 0.9


@pytest.mark.parametrize("count", [15, 16])
def test_one_token_fewer_than_the_width_works_and_as_many_are_refused(count):
    net, tokens = Net(after=True, positions="none").double(), distinct(count)
    seen = seen_by(net, tokens)
    if count == 15:
        result = SPANS(net, seen)
        assert torch.equal(result.tokens, tokens)
        assert result.certified.all()
    else:
        with pytest.raises(RecoveryError, match=r"has rank 16, all that it can have: the 16 tokens"):
            span_check(net, seen, torch.arange(60), 60)
        result = SPANS(net, seen)
        assert not result.certified.any()
        assert "16 tokens of the batch confine nothing" in result.note


BATCHES = {
    "two": ({}, (2, 8)),
    "four": ({"width": 48}, (4, 6)),
    "norms after": ({"after": True}, (2, 8)),
    "no learned positions": ({"positions": "none"}, (2, 8)),
    "tied": ({"tied": True}, (2, 8)),
    "tied, one": ({"tied": True}, (1, 12)),
    "double": ({"double": True}, (3, 8)),
}


@pytest.mark.parametrize("name", BATCHES)
def test_batches_come_back_whole(name):
    settings, shape = BATCHES[name]
    settings = {"width": 32, **settings}
    double = settings.pop("double", False)
    net = Net(**settings)
    net = net.double() if double else net
    tokens = drawn(*shape)
    for client in (iv.FedSGD(), iv.FedAvg(lr=0.1, local_steps=1)):
        result = ATTACK(net, seen_by(net, tokens, client))
        assert found(result, tokens) == len(tokens)
        assert result.certified.all()


def test_the_order_of_a_batch_and_the_scale_of_its_update_change_nothing():
    net, tokens = Net(width=32), drawn(3, 6)
    one, other = ATTACK(net, seen_by(net, tokens)), ATTACK(net, seen_by(net, tokens.flip(0)))
    assert found(one, tokens) == found(other, tokens) == 3
    seen = seen_by(net, tokens)
    scaled = iv.from_gradients(
        net, [-1e-3 * value for value in seen.update.values()], num_images=3, image_shape=(6,)
    )
    assert found(ATTACK(net, scaled), tokens) == 3


def test_sequences_that_begin_alike_and_one_that_comes_twice():
    net = Net(width=32)
    tokens = torch.cat([drawn(1, 4).expand(2, 4), drawn(2, 4, seed=1)], 1)
    assert found(ATTACK(net, seen_by(net, tokens)), tokens) == 2
    twice = drawn(1, 8).expand(2, 8).clone()
    result = ATTACK(net, seen_by(net, twice))
    assert torch.equal(result.tokens[0], twice[0])
    assert (result.tokens[1] == -1).all()
    assert result.certified.tolist() == [True, False]


def test_an_encoder_is_tried_with_whole_sequences():
    net, tokens = Net(width=32, causal=False, pooled=True), distinct(8).view(2, 4)
    result = ATTACK(net, seen_by(net, tokens))
    assert found(result, tokens) == 2
    assert result.certified.all()
    result = iv.token_embedding(most=10)(net, seen_by(net, tokens))
    assert "which go together is not told" in result.note
    assert not result.certified.any()


class Torch(nn.Module):
    """torch's own encoder layer, whose attention has one weight for query, key and value."""

    def __init__(self, *, first):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.first = first
            self.words, self.places = nn.Embedding(60, 32), nn.Parameter(torch.randn(8, 32))
            layer = nn.TransformerEncoderLayer(32, 4, 48, batch_first=first, norm_first=True)
            self.blocks = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
            self.head = nn.Linear(32, 20)

    def forward(self, tokens):
        x = self.words(tokens) + self.places[: tokens.shape[1]]
        mask = torch.full((len(x[0]), len(x[0])), -torch.inf, dtype=x.dtype).triu(1)
        if self.first:
            return self.head(self.blocks(x, mask=mask)[:, -1])
        return self.head(self.blocks(x.transpose(0, 1), mask=mask)[-1])


@pytest.mark.parametrize("first", [True, False])
def test_torchs_own_layers_and_places_before_sequences(first):
    net, tokens = Torch(first=first), drawn(2, 6)
    result = ATTACK(net, seen_by(net, tokens))
    assert found(result, tokens) == 2
    assert result.certified.all()


class Adapted(nn.Module):
    """A frozen layer and a trained one of low rank beside it: W x + B A x."""

    def __init__(self, base, rank):
        super().__init__()
        self.base = base
        self.down = nn.Parameter(torch.randn(rank, base.in_features) / base.in_features**0.5)
        self.up = nn.Parameter(torch.zeros(base.out_features, rank))

    def forward(self, x):
        return self.base(x) + (x @ self.down.T) @ self.up.T


def adapted(rank, *, started):
    net = Net(words=100, width=48).requires_grad_(requires_grad=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        for block in net.blocks:
            block.qkv, block.out = Adapted(block.qkv, rank), Adapted(block.out, rank)
            for layer in (block.qkv, block.out) if started else ():
                nn.init.normal_(layer.up, std=0.02)
    return net


@pytest.mark.parametrize("started", [False, True], ids=["B = 0", "later"])
def test_adapters_leak_fewer_tokens_than_their_rank(started):
    net, tokens = adapted(12, started=started), drawn(2, 5, words=100)
    result = ATTACK(net, seen_by(net, tokens))
    assert found(result, tokens) == 2
    assert result.certified.all()
    with pytest.raises(
        RecoveryError, match="the 14 tokens of the batch confine nothing; expected fewer than 12"
    ):
        ATTACK(net, seen_by(net, drawn(2, 7, words=100)))


@pytest.mark.parametrize("client", [{"local_steps": 3}, {"epochs": 1, "batch_size": 1}], ids=str)
def test_several_local_steps_certify_nothing_that_is_wrong(client):
    net, tokens = Net(width=32), drawn(2, 6)
    result = ATTACK(net, seen_by(net, tokens, iv.FedAvg(lr=0.1, **client)))
    right = torch.stack([(row == tokens).all(1).any() for row in result.tokens])
    assert right.any()
    assert not result.certified.any()


def test_what_hides_the_inputs_is_named():
    net, tokens = Net(width=32, dropout=0.2), drawn(2, 6)
    with pytest.raises(RecoveryError, match="in training mode, with dropout, spans the inputs"):
        span_check(net, seen_by(net, tokens, training_mode=True), torch.arange(60), 60)
    shallow = Net(width=32, depth=1)
    with pytest.raises(RecoveryError, match="shows the inputs of 1 of 6 places"):
        span_check(shallow, seen_by(shallow, tokens), torch.arange(60), 60, most=50)
    net = Net(width=32)
    other = seen_by(
        Net(width=32).apply(lambda m: [p.data.mul_(1.3) for p in m.parameters(recurse=False)]), tokens
    )
    result = ATTACK(net, other)
    assert not result.certified.any()
    assert found(result, tokens) == 0


def test_layers_say_what_their_inputs_depend_on():
    net, tokens = Net(width=32), drawn(2, 6)
    kinds = [(layer.names, layer.kind) for layer in layers_of(net, seen_by(net, tokens), 60)]
    assert kinds[0] == (["blocks.0.qkv.weight"], "token")
    assert kinds[1] == (["blocks.0.out.weight"], "prefix")
    assert kinds[-1] == (["head.weight"], "whole")
