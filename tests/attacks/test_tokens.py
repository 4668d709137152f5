"""Words from the rows of two tables: known answers, every optimiser, repeated words, padding, bad input."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import invlib as iv
from invlib.attacks.tokens import order_of_tokens, tables_of, tokens_used, without_decay
from invlib.core.fingerprint import describe
from invlib.errors import ConfigError, ObservationError, RecoveryError
from tests.attacks.text_nets import Net, distinct, drawn, seen_by

ATTACK = iv.token_embedding()


def planted(tokens, words=30, width=24, seed=0):
    """Tables' updates of a sequence whose signals are random."""
    signals = torch.randn(
        len(tokens), width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )
    table = torch.zeros(words, width, dtype=torch.float64)
    table.index_add_(0, torch.tensor(tokens), signals)
    return table, signals


def trained(net, tokens, optimizer, steps=5):
    """Train as a client does, by torch's own optimiser and with dropout, and observe the state dicts."""
    model = copy.deepcopy(net).train()
    moving = optimizer(model.parameters())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        for _ in range(steps):
            moving.zero_grad()
            F.cross_entropy(model(tokens), torch.tensor([5])).backward()
            moving.step()
    return iv.from_state_dicts(
        net,
        net.state_dict(),
        model.state_dict(),
        protocol=iv.FedAvg(lr=0.1, local_steps=steps),
        num_images=1,
        image_shape=tuple(tokens.shape[1:]),
        training_mode=True,
    )


@pytest.mark.parametrize(
    "tokens", [[3], [3, 1, 2], [5, 5], [5, 1, 5, 2, 5], [1, 1, 2, 2, 3, 3, 4], [9] * 12 + [8] * 11]
)
def test_planted_signals_are_put_in_order(tokens):
    read = order_of_tokens(*planted(tokens))
    assert read.tokens.tolist() == tokens
    assert read.used.tolist() == sorted(set(tokens))
    assert read.certified
    assert read.errors.nan_to_num().max() < 1e-12


def test_more_places_than_numbers_in_a_row_are_tried_as_small_sets():
    tokens = [*range(20), 20, 20, 21, 21]
    read = order_of_tokens(*planted(tokens, width=4))
    assert read.tokens.tolist() == tokens
    assert read.certified


def test_scaling_and_any_function_of_each_number_change_nothing():
    table, places = planted([4, 2, 7, 1])
    for change in (lambda x: 1e-6 * x, lambda x: -x, torch.sign, lambda x: x / (x.abs() + 0.1)):
        assert order_of_tokens(change(table), change(places)).tokens.tolist() == [4, 2, 7, 1]


def test_equal_signals_tell_no_order():
    table = torch.zeros(9, 4)
    table[[3, 5]] = 1.0
    read = order_of_tokens(table, torch.ones(2, 4))
    assert sorted(read.tokens.tolist()) == [3, 5]
    assert not read.certified


def test_places_without_a_trace_are_unknown():
    table, places = planted([4, 2, 7])
    read = order_of_tokens(table, torch.cat([places, torch.zeros(2, 24)]))
    assert read.tokens.tolist() == [4, 2, 7, -1, -1]
    assert read.length == 3
    assert read.certified


def test_rows_that_are_no_sums_prove_nothing():
    table, places = planted([4, 2, 4, 2, 7])
    read = order_of_tokens(torch.sign(table), torch.sign(places))
    assert all(v in (-1, true) for v, true in zip(read.tokens.tolist(), [4, 2, 4, 2, 7], strict=True))
    assert read.tokens[4] == 7
    assert read.left.tolist() == [2, 4]
    assert not read.certified


def test_under_adam_repeated_words_are_guessed_by_likeness_and_not_certified():
    tokens = [4, 2, 4, 2, 7, 4]
    table, places = planted(tokens, width=900)
    read = order_of_tokens(torch.sign(table), torch.sign(places))
    assert read.tokens.tolist() == tokens
    assert read.alike == 5
    assert read.left.tolist() == [2, 4]
    assert read.errors.isnan().tolist() == [True] * 4 + [False, True]
    assert not read.certified


def test_decay_is_found_without_its_rate():
    weight = torch.randn(50, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    update = -0.03 * weight
    update[7] += 1.0
    moved, factor = without_decay(update, weight)
    assert factor == pytest.approx(0.03)
    assert (moved.norm(dim=1) > 1e-9).nonzero().flatten().tolist() == [7]


SPELLINGS = {
    "embedding with an offset": {},
    "parameter": {"positions": "parameter"},
    "token types": {"types": True},
    "norms after": {"after": True},
    "encoder": {"causal": False, "pooled": True},
    "one block": {"depth": 1},
    "dropout": {"dropout": 0.1},
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_a_sentence_of_distinct_words_is_recovered_whole(name):
    net, tokens = Net(**SPELLINGS[name]), distinct(16)
    result = ATTACK(net, seen_by(net, tokens, training_mode=name == "dropout", reveal_labels=False))
    assert torch.equal(result.tokens, tokens)
    assert result.certified.tolist() == [True]
    assert result.labels.tolist() == [7]
    assert result.score == result.residuals.max() < 1e-6
    assert not result.images.numel()


def test_repeated_words_after_local_steps_of_dropout():
    net, tokens = Net(width=32, dropout=0.1), drawn(1, 16, words=9)
    result = ATTACK(net, seen_by(net, tokens, iv.FedAvg(lr=0.1, local_steps=5), training_mode=True))
    assert torch.equal(result.tokens, tokens)
    assert result.certified.all()


OPTIMISERS = {
    "SGD": lambda p: torch.optim.SGD(p, 0.05),
    "momentum": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9),
    "momentum and decay": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, weight_decay=1e-2),
    "Adam": lambda p: torch.optim.Adam(p, 1e-3),
    "AdamW": lambda p: torch.optim.AdamW(p, 1e-3),
}


@pytest.mark.parametrize("name", OPTIMISERS)
def test_every_optimiser_spells_the_sentence(name):
    net, tokens = Net(width=32, words=200, dropout=0.1), distinct(14, words=200)
    result = ATTACK(net, trained(net, tokens, OPTIMISERS[name]))
    assert torch.equal(result.tokens, tokens)
    assert result.certified.all()
    tokens[0, 3] = tokens[0, 11]
    result = ATTACK(net, trained(net, tokens, OPTIMISERS[name]))
    assert torch.equal(result.tokens, tokens)
    if "W" in name or "decay" in name:
        assert "decay of" in result.note


def test_two_repeated_words_under_adam_are_named():
    net, tokens = Net(width=32, words=200), distinct(12, words=200)
    tokens[0, 3], tokens[0, 7] = tokens[0, 11], tokens[0, 8]
    result = ATTACK(net, trained(net, tokens, OPTIMISERS["Adam"]))
    known = result.tokens >= 0
    assert torch.equal(result.tokens[known], tokens[known])
    assert {*range(12)} - {3, 11, 7, 8} <= {*known[0].nonzero().flatten().tolist()} < {*range(12)}
    assert not result.certified.any()
    assert f"{int((~known).sum())} places are unknown; several times occur" in result.note
    assert str(int(tokens[0, 3])) in result.note


def test_padding_has_no_gradient_and_takes_what_is_left():
    net, tokens = (
        Net(padding=0),
        torch.cat([1 + distinct(9, words=59), torch.zeros(1, 5, dtype=torch.int64)], 1),
    )
    result = ATTACK(net, seen_by(net, tokens))
    assert tables_of(net, 14).padding == 0
    assert torch.equal(result.tokens, tokens)
    assert result.certified.all()


def test_tables_are_found_by_what_they_do():
    tables = tables_of(Net(types=True), 5)
    assert (tables.tokens, tables.positions, tables.tied) == ("wte.weight", "wpe.weight", False)
    assert tables.rows.tolist() == [2, 3, 4, 5, 6]
    assert tables_of(Net(positions="parameter"), 5).positions == "pos"
    assert tables_of(Net(positions="none"), 5).positions is None
    assert tables_of(Net(tied=True), 5).tied
    named = tables_of(Net(types=True), 5, tokens="wte.weight", positions="wpe.weight")
    assert named.positions == "wpe.weight"


def test_words_are_printed():
    net, tokens = Net(), distinct(4)
    words = [f"word{k}" for k in range(60)]
    result = ATTACK(net, seen_by(net, tokens, vocabulary=words))
    assert result.text == (" ".join(words[v] for v in tokens[0].tolist()),)


def test_which_words_are_used_is_known_for_a_batch():
    net, tokens = Net(width=32, dropout=0.1), drawn(3, 5)
    seen = seen_by(net, tokens, training_mode=True)
    assert tokens_used(net, seen).tolist() == sorted(set(tokens.flatten().tolist()))
    result = ATTACK(net, seen)
    assert (result.tokens == -1).all()
    assert "tokens are used" in result.note
    assert "in training mode, with dropout" in result.note


def test_a_bag_of_words_has_no_order():
    net = Net(words=50, positions="none", depth=0, pooled=True)
    result = iv.token_embedding(method="rows")(net, seen_by(net, torch.tensor([[17, 3, 42]])))
    assert result.tokens.tolist() == [[3, 17, 42]]
    assert not result.certified.any()
    assert "their order is not told" in result.note


def test_the_attack_is_an_attack():
    attack = iv.token_embedding(most=5)
    assert repr(attack) == "TokenEmbedding(most=5)"
    assert pickle.loads(pickle.dumps(attack)) == attack
    assert describe(attack) != describe(ATTACK)
    net, seen = Net(), seen_by(Net(), distinct(4))
    before = copy.deepcopy(net.state_dict())
    generator = torch.Generator().manual_seed(0)
    result = attack(net, seen, generator=generator, callback=lambda _: True, progress=True)
    assert result.status == "closed_form"
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert generator.get_state().equal(torch.Generator().manual_seed(0).get_state())


def images_seen():
    x, y = torch.rand(1, 1, 4, 4), torch.tensor([0])
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    return net, iv.observe(net, x, y, iv.FedSGD(), normalization=iv.UNIT)


def test_bad_input_is_named():
    with pytest.raises(ObservationError, match=r"of images \(1, 4, 4\); expected token sequences"):
        ATTACK(*images_seen())
    with pytest.raises(ConfigError, match="most"):
        iv.token_embedding(most=0)
    with pytest.raises(ConfigError, match="method"):
        iv.token_embedding(method="guess")
    net = Net()
    with pytest.raises(RecoveryError, match="no parameter 'nope'"):
        iv.token_embedding(tokens="nope")(net, seen_by(net, distinct(4)))
    tied = Net(tied=True)
    with pytest.raises(RecoveryError, match=r"60 of 60 rows of 'wte\.weight' moved"):
        iv.token_embedding(method="rows")(tied, seen_by(tied, distinct(4)))
    with pytest.raises(RecoveryError, match=r"expected \(V, D\) and \(T, D\)"):
        order_of_tokens(torch.zeros(3, 4), torch.zeros(3, 5))
    with pytest.raises(RecoveryError, match="no row of the token table"):
        order_of_tokens(torch.zeros(3, 4), torch.zeros(3, 4))
    part = iv.from_arrays(
        net, {"wpe.weight": torch.ones(18, 16)}, num_images=1, image_shape=(4,), sent="given"
    )
    with pytest.raises(RecoveryError, match=r"wte\.weight"):
        ATTACK(net, part)
