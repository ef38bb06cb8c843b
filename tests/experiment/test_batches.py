"""Batches keep their order under resume and are shared among processes without loss or doubling."""

import numpy as np
import pytest

from experiment.sources.batches import EpochBatchSampler, rounded_width


def plan(epoch: int) -> list[list[int]]:
    order = np.random.default_rng(epoch).permutation(22)
    return [list(order[start : start + 4]) for start in range(0, 22, 4)]


class Share(EpochBatchSampler):
    """A schedule as process ``rank`` of ``world`` sees it."""

    def __init__(self, rank: int, world: int) -> None:
        super().__init__(plan)
        self.place = rank, world

    @property
    def share(self) -> tuple[int, int]:
        return self.place


def test_resumed_schedule_goes_on_where_it_stopped() -> None:
    resumed = EpochBatchSampler(plan)
    resumed.epoch, resumed.start = 3, 2
    assert list(resumed) == plan(3)[2:]
    assert list(resumed) == plan(4)


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_shares_hold_each_index_once(world: int) -> None:
    shares = [list(Share(rank, world)) for rank in range(world)]
    indices = [int(index) for share in shares for batch in share for index in batch]
    assert sorted(indices) == list(range(22))


@pytest.mark.parametrize("world", [2, 3, 4])
def test_shares_are_equally_long(world: int) -> None:
    shares = [Share(rank, world) for rank in range(world)]
    assert {len(list(share)) for share in shares} == {-(-6 // world)}
    assert [len(share) for share in shares] == [-(-6 // world)] * world


def test_two_processes_together_see_the_batches_of_one() -> None:
    first, second = list(Share(0, 2)), list(Share(1, 2))
    together = [batch for pair in zip(first, second, strict=True) for batch in pair]
    assert together == plan(0)


@pytest.mark.parametrize("limit", [100, 512, 1000, 4096])
def test_widths_are_few_and_pad_little(limit: int) -> None:
    widths = [rounded_width(longest, limit) for longest in range(1, limit + 1)]
    assert all(longest <= width <= limit for longest, width in enumerate(widths, 1))
    assert all(width - longest < max(16, longest / 8) for longest, width in enumerate(widths, 1))
    assert len(set(widths)) <= 16 + 8 * max(0, np.ceil(np.log2(limit / 256)))
