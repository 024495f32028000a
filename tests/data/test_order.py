"""Orders that are computed: every row once, another order every epoch, and any position by itself."""

from __future__ import annotations

import numpy as np
import pytest

from fastpeft.data import ComputedShuffle, LengthGrouped, MixedDataset, build_sft_dataset, shuffled
from fastpeft.errors import UserError


@pytest.mark.parametrize("count", [1, 2, 3, 5, 16, 17, 1000, 65537])
def test_every_row_comes_once(count):
    assert sorted(shuffled(0, count, count, seed=3, epoch=0)) == list(range(count))


def test_a_position_is_known_without_those_before():
    whole = shuffled(0, 1000, 1000, seed=1, epoch=2)
    assert np.array_equal(shuffled(700, 703, 1000, seed=1, epoch=2), whole[700:703])


def test_far_positions_of_very_many_rows_cost_nothing():
    found = shuffled(10**12 - 3, 10**12, 10**12, seed=0, epoch=0)
    assert len(set(found.tolist())) == 3 and all(0 <= index < 10**12 for index in found)


def test_orders_look_drawn_and_differ_by_seed_and_epoch():
    orders = [shuffled(0, 4096, 4096, seed, epoch) for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    for order in orders:
        assert abs(np.corrcoef(order, np.arange(4096))[0, 1]) < 0.06  # 4 sigma
        assert np.count_nonzero(np.diff(order) == 1) < 10  # a drawn order has one such pair
    assert not np.array_equal(orders[0], orders[1]) and not np.array_equal(orders[0], orders[2])


def test_a_sampler_goes_by_its_epoch():
    sampler = ComputedShuffle(70_000, seed=5)
    first = list(sampler)
    assert first == list(sampler) and sorted(first) == list(range(70_000)) and len(sampler) == 70_000
    sampler.set_epoch(1)
    assert first != list(sampler)


def test_batches_of_like_length():
    lengths = np.random.default_rng(0).integers(10, 1000, 1003).tolist()
    sampler = LengthGrouped(lengths, batch_size=8, seed=0)
    order = list(sampler)
    assert sorted(order) == list(range(1003))
    batches = [[lengths[row] for row in order[i : i + 8]] for i in range(0, 1003, 8)]
    padding = 1 - sum(map(sum, batches)) / sum(len(batch) * max(batch) for batch in batches)
    assert padding < 0.03  # of a plain shuffle's, 0.4
    firsts = [batch[0] for batch in batches[:50]]
    assert firsts != sorted(firsts, reverse=True)
    with pytest.raises(UserError, match="batch_size is 0"):
        LengthGrouped(lengths, 0, 0)


def rows_named(name, count, tokenizer):
    return build_sft_dataset([{"input": f"{name} {i}", "output": "x" * (i + 1)} for i in range(count)], tokenizer)


@pytest.mark.parametrize(("weight", "times"), [(1, {1}), (2, {2}), (0.5, {0, 1}), (1.5, {1, 2})])
def test_a_weight_is_how_often_rows_come(plain_tokenizer, weight, times):
    one, other = rows_named("one", 10, plain_tokenizer), rows_named("two", 4, plain_tokenizer)
    mixed = MixedDataset([one, other], [weight, 1])
    assert len(mixed) == 10 * weight + 4
    found = [item["input_ids"] for item in mixed]
    assert {found.count(item["input_ids"]) for item in one} == times
    assert found[-4:] == [item["input_ids"] for item in other]
    assert mixed.lengths == [len(ids) for ids in found]
    assert [item["input_ids"] for item in MixedDataset([one, other], [weight, 1])] == found
    assert mixed[-1] == other[-1] and f"an epoch has {len(mixed)} rows" in mixed.report.summary()
    with pytest.raises(IndexError):
        mixed[len(mixed)]


@pytest.mark.parametrize(
    ("weights", "words"),
    [([1], "2 data sets and 1 weights"), ([1, 0], r"weights\[1\] is 0"), ([True, 1], r"weights\[0\] is True")],
)
def test_weights_that_are_none(plain_tokenizer, weights, words):
    rows = rows_named("a", 3, plain_tokenizer)
    with pytest.raises(UserError, match=words):
        MixedDataset([rows, rows], weights)
