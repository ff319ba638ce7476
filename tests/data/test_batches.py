"""The order of rows, and how rows become tensors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_cli.data.batches import MEGABATCH, Batching, Order, collate, join, micro_batches, packs, shuffled
from qlora_cli.data.encode import Encoded

few = settings(max_examples=50, deadline=None)


def row(ids: list[int], loss: str, where: str = "") -> Encoded:
    return Encoded(np.array(ids, np.int32), np.array([letter == "x" for letter in loss]), where)


def epoch_of(order: Order, epoch: int) -> list[int]:
    """All rows of an epoch whose length is a multiple of the batch size."""
    steps = len(order.lengths) // order.batch_size
    every = (epoch + 1) * len(order.lengths)
    return [i for step in range(epoch * steps, (epoch + 1) * steps) for i in order.step_rows(step, every)]


def padding(order: Order, epochs: int) -> int:
    """Padded positions when each step is one batch."""
    total = epochs * len(order.lengths)
    steps = [order.step_rows(step, total) for step in range(-(-total // order.batch_size))]
    widths = [[order.lengths[i] for i in rows] for rows in steps]
    return sum(max(lengths) * len(lengths) - sum(lengths) for lengths in widths)


def splitmix64(state: int) -> int:
    """The generator's output after one step from `state`, in plain integers, as its authors print it."""
    z = (state + 0x9E3779B97F4A7C15) % 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return z ^ (z >> 31)


def test_the_shuffle_sorts_rows_by_splitmix64() -> None:
    assert splitmix64(0) == 0xE220A8397B1DCDAF  # the published first output for seed 0
    gamma = 0x9E3779B97F4A7C15
    start = 0x2545F4914F6CDD1D + 7 * gamma + 3 * 0xD1B54A32D192ED03
    keys = [splitmix64((start + (row - 1) * gamma) % 2**64) for row in range(100)]
    assert shuffled(7, 3, 100).tolist() == sorted(range(100), key=keys.__getitem__)


def test_the_order_of_rows_is_the_same_in_every_version() -> None:
    assert shuffled(0, 0, 8).tolist() == [5, 7, 4, 2, 0, 3, 1, 6]


@few
@given(st.integers(0, 2**32 - 1), st.integers(0, 1000), st.integers(0, 300))
def test_a_shuffle_is_a_permutation_and_a_pure_function(seed: int, epoch: int, count: int) -> None:
    before = torch.get_rng_state()
    order = shuffled(seed, epoch, count).tolist()
    assert sorted(order) == list(range(count))
    assert shuffled(seed, epoch, count).tolist() == order
    assert torch.equal(torch.get_rng_state(), before)


@few
@given(st.integers(1, 40), st.integers(1, 9), st.booleans(), st.integers(0, 99))
def test_every_epoch_draws_every_row_once(count: int, batch_size: int, grouped: bool, seed: int) -> None:
    order = Order(tuple(range(1, count + 1)), batch_size, seed, grouped)
    epochs = 3
    steps = order.steps_for(epochs)
    drawn = [i for step in range(steps) for i in order.step_rows(step, epochs * count)]
    assert len(drawn) == epochs * count
    for epoch in range(epochs):
        assert sorted(drawn[epoch * count : (epoch + 1) * count]) == list(range(count))


def test_a_step_does_not_depend_on_the_steps_before_it() -> None:
    def fresh() -> Order:
        return Order((5, 3, 9, 1, 7, 2, 8), 3, seed=4, group_by_length=True)

    one = fresh()
    in_turn = [one.step_rows(step, 100) for step in range(12)]
    assert [fresh().step_rows(step, 100) for step in reversed(range(12))] == in_turn[::-1]


def test_epochs_and_seeds_differ_in_order() -> None:
    order = Order((1,) * 32, 8, seed=0)
    assert epoch_of(order, 0) != epoch_of(order, 1)
    assert epoch_of(order, 0) != epoch_of(Order((1,) * 32, 8, seed=1), 0)


def test_a_batch_larger_than_the_data_goes_on_with_the_next_epoch() -> None:
    order = Order((1, 1, 1), 8, seed=0)
    rows = order.step_rows(0, 8)
    assert [sorted(rows[:3]), sorted(rows[3:6])] == [[0, 1, 2], [0, 1, 2]]
    assert len(rows) == 8


STEPS = [(1.0, 10, 4, 3), (2.0, 10, 4, 5), (0.5, 10, 4, 2), (0.01, 10, 4, 1), (1.0, 8, 4, 2), (1.0, 1, 16, 1)]


@pytest.mark.parametrize(("epochs", "count", "batch_size", "steps"), STEPS)
def test_epochs_become_steps_of_which_the_last_may_be_smaller(
    epochs: float, count: int, batch_size: int, steps: int
) -> None:
    assert Order((1,) * count, batch_size, 0).steps_for(epochs) == steps


def test_the_last_step_of_an_epoch_draws_only_what_is_left() -> None:
    order = Order((1,) * 10, 4, seed=0)
    assert [len(order.step_rows(step, 10)) for step in range(3)] == [4, 4, 2]


def test_grouping_by_length_pads_less_and_still_shuffles() -> None:
    lengths = tuple(int(v) for v in np.random.default_rng(0).integers(1, 200, size=512))
    plain, grouped = Order(lengths, 8, 0), Order(lengths, 8, 0, group_by_length=True)
    assert padding(grouped, 2) < padding(plain, 2) / 4
    assert epoch_of(grouped, 0) != epoch_of(grouped, 1)


def test_grouped_batches_follow_each_other_in_random_order() -> None:
    grouped = Order(tuple(range(1, 41)), 2, 0, group_by_length=True)
    longest = [max(grouped.lengths[i] for i in grouped.step_rows(step, 40)) for step in range(20)]
    assert sorted(longest) == list(range(2, 41, 2))
    assert longest not in (sorted(longest), sorted(longest, reverse=True))


def test_grouping_sorts_within_megabatches_only_so_that_order_stays_random() -> None:
    lengths = tuple(range(1, 4 * MEGABATCH + 1))
    grouped = Order(lengths, 2, 0, group_by_length=True)
    plain = Order(lengths, 2, 0)
    mega = 2 * MEGABATCH
    drawn, unsorted = epoch_of(grouped, 0), epoch_of(plain, 0)
    assert sorted(drawn) == sorted(unsorted)
    pairs = {tuple(drawn[i : i + 2]) for i in range(0, len(drawn), 2)}
    first = sorted(unsorted[:mega], key=lambda i: -lengths[i])
    assert {tuple(first[i : i + 2]) for i in range(0, mega, 2)} <= pairs


def test_rows_are_padded_at_the_right_and_targets_stand_where_the_prediction_is_made() -> None:
    batch = collate([row([1, 5, 6, 2], "..xx", "f:1"), row([1, 7, 2], ".xx", "f:2")])
    assert batch.ids.tolist() == [[1, 5, 6, 2], [1, 7, 2, 0]]
    assert batch.attention.tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]
    assert batch.targets.tolist() == [[False, True, True, False], [True, True, False, False]]
    assert batch.labels.tolist() == [6, 2, 7, 2]


def test_padding_hides_no_target_whatever_its_id() -> None:
    batch = collate([row([1, 5, 0, 9, 0], "..x.x"), row([1, 0], ".x")])
    assert batch.labels.tolist() == [0, 0, 0]
    assert batch.attention.sum().item() == 7


def test_widths_are_rounded_up_to_a_multiple_without_new_targets() -> None:
    batch = collate([row([1, 5, 2], ".xx")], multiple=4)
    assert batch.ids.tolist() == [[1, 5, 2, 0]]
    assert batch.attention.tolist() == [[1, 1, 1, 0]]
    assert batch.labels.tolist() == [5, 2]


def test_a_loss_on_the_first_token_is_no_target() -> None:
    assert collate([row([5, 6], "xx")]).targets.tolist() == [[True, False]]
    assert not collate([row([5], "x")]).targets.any()


def test_a_batch_moves_to_a_device_whole() -> None:
    moved = collate([row([1, 5, 2], ".xx")]).to(torch.device("meta"))
    assert {moved.ids.device.type, moved.attention.device.type, moved.targets.device.type} == {"meta"}


@few
@given(st.lists(st.integers(2, 12), min_size=1, max_size=20), st.integers(1, 6))
def test_micro_batches_keep_every_row(lengths: list[int], size: int) -> None:
    rows = [row([9] * n, "." + "x" * (n - 1), str(i)) for i, n in enumerate(lengths)]
    batches = micro_batches(rows, size)
    assert sorted(row.where for batch in batches for row in batch) == sorted(str(i) for i in range(len(rows)))
    assert max(len(batch) for batch in batches) <= size


def test_micro_batches_put_the_longest_rows_first_so_that_memory_runs_out_early_or_never() -> None:
    rows = [row([9] * n, "x" * n) for n in (2, 7, 3, 5)]
    assert [[len(row) for row in batch] for batch in micro_batches(rows, 2)] == [[7, 5], [3, 2]]


def plain_row(length: int, where: str = "") -> Encoded:
    return row([9] * length, "." + "x" * (length - 1), where)


LENGTHS = st.lists(st.integers(2, 40), min_size=1, max_size=30)


def test_packed_rows_lie_end_to_end_with_positions_and_borders_of_their_own() -> None:
    batch = join([row([1, 5, 6, 2], "..xx"), row([1, 7, 2], ".xx")], width=8)
    assert batch.ids.tolist() == [[1, 5, 6, 2, 1, 7, 2, 0]]
    assert batch.labels.tolist() == [6, 2, 7, 2]
    inputs = batch.inputs
    assert inputs["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1, 2, 0]]
    assert inputs["cu_seq_lens_q"].tolist() == inputs["cu_seq_lens_k"].tolist() == [0, 4, 7, 8]
    assert inputs["max_length_q"] == inputs["max_length_k"] == 4
    assert "attention_mask" not in inputs  # with one, transformers lets packed rows see each other


def test_no_target_crosses_a_border() -> None:
    batch = join([row([1, 5], "xx"), row([6, 7], "xx")])
    assert batch.targets.tolist() == [[True, False, True, False]]


@few
@given(LENGTHS, st.integers(2, 60))
def test_every_row_is_in_one_pack_and_no_pack_holds_more_than_the_most(lengths: list[int], most: int) -> None:
    rows = [plain_row(n, str(i)) for i, n in enumerate(lengths)]
    found = packs(rows, most)
    assert sorted(r.where for pack in found for r in pack) == sorted(r.where for r in rows)
    assert all(sum(map(len, pack)) <= most or len(pack) == 1 for pack in found)


@few
@given(LENGTHS, st.integers(40, 80))
def test_two_packs_of_a_step_could_never_be_one(lengths: list[int], most: int) -> None:
    sizes = [sum(map(len, pack)) for pack in packs([plain_row(n) for n in lengths], most)]
    assert all(a + b > most for i, a in enumerate(sizes) for b in sizes[i + 1 :])


def test_packs_are_best_fit_decreasing() -> None:
    found = packs([plain_row(n) for n in (3, 5, 4, 7, 2)], 10)
    assert [[len(r) for r in pack] for pack in found] == [[7, 3], [5, 4], [2]]


@few
@given(LENGTHS, st.integers(1, 4), st.booleans())
def test_packed_or_padded_a_step_has_the_same_tokens_and_targets(lengths: list[int], rows: int, packed: bool) -> None:
    given_rows = [row(list(range(1, n + 1)), "." + "x" * (n - 1)) for n in lengths]
    batching = Batching(rows, 40, packed)
    found = [batching.collate(part) for part in batching.split(given_rows)]
    labels = sorted(label for batch in found for label in batch.labels.tolist())
    assert labels == sorted(label for each in given_rows for label in each.ids[1:].tolist())
    assert sum(int(batch.attention.sum()) for batch in found) == sum(lengths)
    assert [batch.ids.numel() for batch in found] == [batching.positions(part) for part in batching.split(given_rows)]


@few
@given(LENGTHS, st.integers(1, 4), st.booleans())
def test_the_bound_of_a_step_is_never_below_its_largest_micro_batch(
    lengths: list[int], rows: int, packed: bool
) -> None:
    batching = Batching(rows, 40, packed)
    given_rows = [plain_row(n) for n in lengths]
    assert batching.bound([len(row) for row in given_rows]) >= max(map(batching.positions, batching.split(given_rows)))


@few
@given(st.integers(1, 4), st.integers(32, 2100), st.floats(0, 1))
def test_a_packed_line_is_padded_by_less_than_a_row_and_a_full_one_as_little_as_can_be(
    rows: int, length: int, share: float
) -> None:
    tokens, full = max(1, round(share * rows * length)), -(-rows * length // 32) * 32
    width = Batching(rows, length, packed=True).positions([plain_row(tokens)])
    assert tokens <= width <= full and width % 32 == 0
    assert width - tokens < (32 if tokens <= 512 or length < 64 else 64)


def test_packed_lines_have_few_widths() -> None:
    batching = Batching(2, 1024, packed=True)
    widths = {batching.positions([plain_row(tokens)]) for tokens in range(1, 2049)}
    assert sorted(widths) == [*range(32, 513, 32), *range(576, 2049, 64)]


def test_packs_of_log_normal_rows_use_97_percent_of_their_positions() -> None:
    drawn = np.random.default_rng(0).lognormal(np.log(300), 0.86, 953).astype(int).clip(2, 1024)
    order, batching = Order(tuple(drawn.tolist()), 16, 0), Batching(1, 1024, packed=True)
    rows = [plain_row(n) for n in order.lengths]
    parts = [part for step in range(60) for part in batching.split([rows[i] for i in order.step_rows(step, 953)])]
    assert sum(len(r) for part in parts for r in part) == sum(order.lengths)
    assert sum(order.lengths) / sum(map(batching.positions, parts)) >= 0.97


@pytest.mark.parametrize("packed", [True, False])
def test_halving_ends_at_one_token(packed: bool) -> None:
    batching: Batching | None = Batching(4, 8, packed)
    seen = []
    while batching is not None:
        seen.append((batching.rows, batching.length))
        batching = batching.halved()
    assert seen == [(4, 8), (2, 8), (1, 8), (1, 4), (1, 2), (1, 1)]
