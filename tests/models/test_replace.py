"""replace_linear: what it replaces, and that it lets go of each layer in time."""

from __future__ import annotations

import weakref

from torch import nn

from fastpeft.models import replace_linear


def test_replaces_what_is_chosen_and_names_it() -> None:
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Sequential(nn.Linear(2, 3), nn.ReLU())})
    assert replace_linear(model, lambda _: nn.Identity(), lambda name, linear: linear.out_features == 3) == ["b.0"]
    assert isinstance(model["a"], nn.Linear) and isinstance(model["b"][0], nn.Identity)


def test_a_layer_in_two_places_is_made_once() -> None:
    shared = nn.Linear(2, 2)
    model = nn.ModuleDict({"a": shared, "b": nn.ModuleList([shared])})
    assert replace_linear(model, lambda _: nn.Identity()) == ["a", "b.0"]
    assert model["a"] is model["b"][0]


def test_each_layer_is_gone_before_the_next_is_made() -> None:
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(4)))
    made: list[weakref.ref[nn.Linear]] = []

    def make(linear: nn.Linear) -> nn.Module:
        assert all(earlier() is None for earlier in made)
        made.append(weakref.ref(linear))
        return nn.Identity()

    replace_linear(model, make)
    assert len(made) == 4 and made[-1]() is None


def test_the_root_is_never_replaced() -> None:
    assert replace_linear(nn.Linear(2, 2), lambda _: nn.Identity()) == []
