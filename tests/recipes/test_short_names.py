"""Names of folders beside each other."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastpeft.errors import UserError
from fastpeft.recipes.short_names import short_names


def test_names_are_as_short_as_they_can_be():
    paths = [Path("/runs/a/adapter"), Path("/runs/b/adapter"), Path("/runs/c/checkpoint-2")]
    assert short_names(paths, "x") == ["a/adapter", "b/adapter", "c/checkpoint-2"]
    assert short_names([Path("/x/tea"), "/x/coffee"], "x") == ["tea", "coffee"]
    assert short_names([Path("/adapter"), Path("/x/adapter")], "x") == ["//adapter", "x/adapter"]
    assert short_names([], "x") == []


def test_names_that_are_taken_are_left_alone():
    assert short_names([Path("/x/untuned")], "x", taken=["untuned"]) == ["x/untuned"]


def test_a_folder_given_twice():
    with pytest.raises(UserError, match=r"^plot: the run /x/\.\./x/tea is given twice; give each folder once$"):
        short_names([Path("/x/tea"), Path("/x/../x/tea")], "plot: the run")
