"""Where paged state lies: arithmetic."""

from __future__ import annotations

import pytest

from fastpeft.optim.placement import BLOCK, CELL_BYTES, Layout, lay_out, room

PAGE = 2 << 20
SIZES = {
    "one element": [1],
    "many small": [65_536, 16, 1, 300] * 100,
    "one big": [3_000_001],
    "mixed": [0, 700_000, 255, 0, 5_000_000, 256, 257, 40_000_000],
    "a page exactly": [PAGE // 8],
    "nothing": [0, 0],
}
LAYOUTS = pytest.mark.parametrize(
    ("sizes", "eight_bit"), [(name, bits) for name in SIZES for bits in (False, True)], ids=str
)


def laid_out(sizes: str, eight_bit: bool) -> tuple[list[int], Layout]:
    numels = SIZES[sizes]
    return numels, lay_out(numels, eight_bit, PAGE)


@LAYOUTS
def test_every_element_has_one_place(sizes: str, eight_bit: bool) -> None:
    numels, layout = laid_out(sizes, eight_bit)
    covered = [0] * len(numels)
    for piece in layout.pieces:
        assert piece.begin == covered[piece.parameter] and piece.begin % BLOCK == 0 and piece.numel > 0
        covered[piece.parameter] += piece.numel
    assert covered == numels


@LAYOUTS
def test_ranges_do_not_overlap_and_stay_in_their_cell(sizes: str, eight_bit: bool) -> None:
    _, layout = laid_out(sizes, eight_bit)
    end = 0
    for piece in layout.pieces:
        scales = -(-piece.numel // BLOCK) * 4
        sizes_of = [piece.numel] * 2 + [scales] * 2 if eight_bit else [4 * piece.numel] * 2
        ranges = layout.ranges(piece)
        assert [part.nbytes for part in ranges] == sizes_of
        for index, part in enumerate(ranges):
            assert part.begin >= end and part.begin % (16 if index < 2 else 4) == 0
            end = part.begin + part.nbytes
        first, last = ranges[0].begin // layout.cell_bytes, (end - 1) // layout.cell_bytes
        assert first == last == piece.cell < layout.cells
    assert end <= layout.nbytes and layout.nbytes % PAGE == 0


@LAYOUTS
def test_little_is_wasted(sizes: str, eight_bit: bool) -> None:
    numels, layout = laid_out(sizes, eight_bit)
    state = sum(-(-numel // BLOCK) * (2 * BLOCK + 8 if eight_bit else 8 * BLOCK) for numel in numels)
    assert layout.nbytes - state < 0.02 * state + len(numels) * 256 + PAGE


@LAYOUTS
def test_a_budget_is_kept_and_used(sizes: str, eight_bit: bool) -> None:
    _, layout = laid_out(sizes, eight_bit)
    assert layout.cell_bytes <= CELL_BYTES
    for budget in (0, 1, PAGE, layout.nbytes // 2, layout.nbytes - 1, layout.nbytes, 10 * layout.nbytes):
        cells = layout.cells_within(budget)
        assert layout.near_bytes(cells) <= budget
        assert cells == layout.cells or layout.near_bytes(cells) + layout.cell_bytes > min(budget, layout.nbytes - 1)
    assert layout.near_bytes(layout.cells) == layout.nbytes and layout.cells_within(0) == 0


def test_cells_grow_with_the_state() -> None:
    assert lay_out([1000], False, PAGE).cell_bytes == PAGE
    assert lay_out([1 << 26], False, PAGE).cell_bytes == CELL_BYTES
    assert lay_out([40 * (1 << 20)], False, PAGE).cells >= 20


GB = 1 << 30


@pytest.mark.parametrize(
    ("free", "reserve", "near", "wanted", "expected"),
    [
        (10 * GB, GB, 0, 4 * GB, 4 * GB),  # room for all
        (3 * GB, GB, 0, 4 * GB, 2 * GB),  # for some
        (GB // 2, GB, 0, 4 * GB, 0),  # for none
        (GB // 2, GB, 2 * GB, 4 * GB, 2 * GB),  # what is near stays
        (GB + (1 << 20), GB, 2 * GB, 4 * GB, 2 * GB),  # too little to begin
        (GB + (64 << 20), GB, 2 * GB, 4 * GB, 2 * GB + (64 << 20)),
        (GB + (1 << 20), GB, 2 * GB, 2 * GB + (1 << 20), 2 * GB + (1 << 20)),  # little, but all that is missing
        (10 * GB, GB, 3 * GB, GB, GB),  # a budget that was lowered
        (0, GB, 0, 0, 0),
    ],
)
def test_room(free: int, reserve: int, near: int, wanted: int, expected: int) -> None:
    assert room(free, reserve, near, wanted) == expected
