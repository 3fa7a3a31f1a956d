"""Converted weights lie in mappings for large pages; what is freed is given back and used again."""

import gc
import mmap
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

from blyan_node.moe.pages import LARGE_PAGE, MAPPING_BYTES, Pages
from blyan_node.moe.precision import convert

KIB = 1 << 10
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's /proc and madvise")


def matrix(pages: Pages, rows: int = 300) -> Tensor:
    """A new matrix of 1 KiB a row, filled with ones."""
    return pages.empty(rows, KIB, torch.int8).fill_(1)


def test_matrices_of_one_size_lie_next_to_each_other_from_a_large_page_on() -> None:
    pages = Pages()
    made = [matrix(pages) for _ in range(4)]
    places = sorted(one.data_ptr() for one in made)
    assert [b - a for a, b in pairwise(places)] == [300 * KIB] * 3
    slots = MAPPING_BYTES // (300 * KIB)
    last = places[-1] + 300 * KIB  # slots are taken from the end
    assert (last - min(64, slots) * 300 * KIB) % LARGE_PAGE == 0


def flags_of(place: int) -> set[str]:
    """What the system says of the memory there."""
    within = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        head = line.split()[0]
        if "-" in head and not head.endswith(":"):
            begin, end = (int(part, 16) for part in head.split("-"))
            within = begin <= place < end
        elif within and head == "VmFlags:":
            return set(line.split())
    raise AssertionError("no such memory")


@LINUX
def test_large_pages_are_asked_for_what_is_in_use_and_not_for_what_is_free() -> None:
    """Else the system may make one large page of a slot in use and the free ones beside it."""
    try:
        mmap.mmap(-1, 4 * LARGE_PAGE, flags=mmap.MAP_PRIVATE).madvise(mmap.MADV_HUGEPAGE)
    except OSError as error:
        pytest.skip(f"this system has none: {error}")
    pages = Pages()
    kept, freed = matrix(pages), matrix(pages)
    place = freed.data_ptr()
    assert "hg" in flags_of(place) and "hg" in flags_of(kept.data_ptr())
    del freed
    gc.collect()
    assert "nh" in flags_of(place) and "hg" in flags_of(kept.data_ptr())
    again = matrix(pages)
    assert again.data_ptr() == place and "hg" in flags_of(place)


def test_what_is_in_use_is_shared_with_nobody() -> None:
    pages = Pages()
    made = [matrix(pages, rows).fill_(n) for n, rows in enumerate([300, 7, 300, 40_000, 7, 300])]
    assert [set(one.flatten().tolist()) for one in made] == [{n} for n in range(6)]


@LINUX
def test_what_is_freed_is_given_back_and_used_again() -> None:
    pages = Pages()
    kept, freed = matrix(pages), matrix(pages)
    place, mapped = freed.data_ptr(), pages.mapped
    view = freed[3:5]
    del freed
    assert set(view.flatten().tolist()) == {1}  # a part of it is in use
    del view
    gc.collect()
    again = pages.empty(300, KIB, torch.int8)
    assert again.data_ptr() == place and pages.mapped == mapped
    assert set(again.flatten().tolist()) == {0}  # pages of the system's, not what was there
    assert set(kept.flatten().tolist()) == {1}


def test_a_mapping_ends_with_the_last_of_its_matrices() -> None:
    pages = Pages()
    made = [matrix(pages) for _ in range(3)]
    assert 0 < pages.mapped <= MAPPING_BYTES
    made.clear()
    gc.collect()
    assert pages.mapped == 0


def test_small_ones_take_little_and_large_ones_what_they_need() -> None:
    pages = Pages()
    small = pages.empty(3, 5, torch.float16)
    assert pages.mapped == 64 * mmap.PAGESIZE
    large = pages.empty(3, MAPPING_BYTES, torch.int8)
    assert pages.mapped == 64 * mmap.PAGESIZE + 3 * MAPPING_BYTES
    assert pages.empty(0, 5, torch.int8).shape == (0, 5)
    assert small.shape == (3, 5) and large.shape == (3, MAPPING_BYTES)


def test_threads_take_and_free_at_once() -> None:
    pages, wrong = Pages(), list[int]()

    def work(number: int) -> None:
        for turn in range(60):
            value = (7 * number + turn) % 100
            one = pages.empty(1 + turn % 3, 4 * KIB, torch.int8).fill_(value)
            other = pages.empty(1 + turn % 2, 4 * KIB, torch.int8).fill_(value + 1)
            if not bool((one == value).all()) or not bool((other == value + 1).all()):
                wrong.append(number)

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(work, range(8)))
    gc.collect()
    assert not wrong and pages.mapped == 0


def test_conversions_lie_in_them(monkeypatch: pytest.MonkeyPatch) -> None:
    pages = Pages()
    monkeypatch.setattr("blyan_node.moe.precision.pages", pages)
    made = convert(torch.randn(64, 96), "int8", "w1")
    assert pages.mapped == 64 * 2 * mmap.PAGESIZE  # 6 KiB of codes
    del made
    gc.collect()
    assert pages.mapped == 0
