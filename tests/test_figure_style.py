"""Every picture's series are told apart: in colour, by shape, and in a grey print."""

from __future__ import annotations

import ast
from itertools import combinations, pairwise
from pathlib import Path

import pytest
from matplotlib.colors import to_rgb

from benchmarks import plots
from efft_kernels import figure_style
from efft_kernels.figure_style import Look, look, looks, mark_coinciding, new_figure

ROOT = Path(__file__).parents[1]


def lightness(colour: str) -> float:
    """From 0 to 1 in a grey print (Rec. 601)."""
    red, green, blue = to_rgb(colour)
    return 0.299 * red + 0.587 * green + 0.114 * blue


def assert_told_apart(found: list[Look]) -> None:
    assert len({(own.colour, own.marker, own.dash) for own in found}) == len(found)
    for one, other in combinations(found, 2):
        contrast = abs(lightness(one.colour) - lightness(other.colour))
        assert one.dash != other.dash or contrast > 0.15, (one, other)
        assert one.hatch != other.hatch and one.marker != other.marker, (one, other)


def test_a_dozen_series_differ_in_colour_shape_and_grey() -> None:
    assert_told_apart([look(place) for place in range(figure_style.SERIES)])
    many = [look(place) for place in range(2 * figure_style.SERIES)]
    assert len({(own.colour, own.marker, own.dash) for own in many}) == len(many)


def test_a_light_colour_is_still_seen_on_white() -> None:
    assert all(lightness(colour) < 0.7 for colour in figure_style.COLOURS)


def test_neighbours_differ_in_lightness_too() -> None:
    """They stand side by side as bars."""
    steps = [lightness(colour) for colour in figure_style.COLOURS]
    assert all(abs(a - b) > 0.15 for a, b in pairwise(steps))


def test_a_name_keeps_its_place_and_of_two_the_first_has_it() -> None:
    places = {"a": 3, "b": 0, "c": 3}
    assert looks(["x", "a", "b"], places) == {"x": look(1), "a": look(3), "b": look(0)}
    assert looks(["a", "c", "y"], places) == {"a": look(3), "c": look(0), "y": look(1)}
    assert looks(["p", "q"]) == {"p": look(0), "q": look(1)}


@pytest.mark.parametrize("device", ["cpp", "cuda", "triton"])
def test_no_two_implementations_of_a_picture_look_alike(device: str) -> None:
    names = [name for name in plots.PLACES if name.startswith((device, "torch", "auto", "unfused"))]
    assert len(names) > 4
    assert_told_apart(list(plots._looks([*names, "new, split"]).values()))
    methods = ["EFFT2", *(name for name in plots.PLACES if name in vars(plots.peers).values())]
    assert_told_apart(list(plots._looks(methods).values()))


def test_lines_that_coincide_are_nested_and_named() -> None:
    axes = new_figure(4, 3).subplots()
    for name, ys in (("a (1 %)", [1, 2, 3]), ("b", [1, 2.001, 3]), ("c", [1, 2.2, 3])):
        axes.plot([1, 2, 4], ys, label=name)
    axes.axhline(1)
    assert mark_coinciding(axes) == [["a (1 %)", "b"]]
    first, second = axes.lines[:2]
    assert first.get_linewidth() > second.get_linewidth()
    assert first.get_zorder() < second.get_zorder()
    (note,) = (text.get_text() for artist in axes.artists for text in artist.get_texts())
    assert note == "a and b coincide"


def test_error_bars_that_coincide_are_found_on_a_logarithmic_axis() -> None:
    axes = new_figure(4, 3).subplots()
    axes.set_yscale("log")
    axes.errorbar([1, 2], [1, 1000], yerr=[0.1, 1], label="a")
    axes.errorbar([1, 2], [1.001, 1001], label="b")
    axes.errorbar([1, 2], [2, 1000], label="c")
    assert mark_coinciding(axes) == [["a", "b"]]


def test_every_picture_takes_its_looks_from_here() -> None:
    """No other file has colours of its own."""
    own = {"figure_style.py", Path(__file__).name}
    files = [p for folder in ("efft_kernels", "benchmarks") for p in (ROOT / folder).rglob("*.py")]
    drawing = [p for p in files if "matplotlib" in p.read_text() and p.name not in own]
    assert len(drawing) > 4
    for path in drawing:
        words = [n.value for n in ast.walk(ast.parse(path.read_text()))
                 if isinstance(n, ast.Constant) and isinstance(n.value, str)]  # fmt: skip
        assert not [w for w in words if w.startswith("#") and len(w) == 7], path
