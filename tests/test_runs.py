"""Rows by their numbers, a slice for each run."""

from __future__ import annotations

import itertools

import torch

from finf_fast.runs import picked, runs


def test_all_sets_of_six_numbers_in_any_order():
    x = torch.arange(12).view(6, 2)
    for count in range(5):
        for numbers in itertools.permutations(range(6), count):
            assert torch.equal(picked(x, numbers), x[list(numbers)])
            found = torch.zeros_like(x)
            for mine, rows in runs(numbers):
                found[rows] = x[: len(numbers)][mine]
            wanted = torch.zeros_like(x)
            wanted[list(numbers)] = x[: len(numbers)]
            assert torch.equal(found, wanted)


def test_one_run_is_a_view():
    x = torch.zeros(5, 3)
    assert picked(x, (1, 2, 3)).data_ptr() == x[1].data_ptr()
    assert [rows for _, rows in runs((4, 5, 0, 1, 3))] == [slice(4, 6), slice(0, 2), slice(3, 4)]
