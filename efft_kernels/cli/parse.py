"""The text of an option as numbers and ranges; each raises ValueError, naming the option."""

from __future__ import annotations

from typing import Any

from ..methods.base import Rank

MOST_BLOCKS = 10_000  # no model has so many, and a range of them is made in no time


def rank(text: str, name: str = "rank") -> Rank | list[Rank]:
    """ "16" -> 16, "8,16" -> (8, 16), and with a colon one per stage: "4:8,16" -> [4, (8, 16)]."""
    stages = [_one_rank(part) for part in text.split(":")]
    if None in stages:
        raise ValueError(
            f"{name} must be a number R or two, R1,R2, or one of these per stage, R:R:R:R,"
            f" got {_got(text)}"
        )
    ranks = [each for each in stages if each is not None]
    return ranks if ":" in text else ranks[0]


def _one_rank(text: str) -> Rank | None:
    try:
        ranks = [int(part) for part in text.split(",")]
    except ValueError:
        return None
    if len(ranks) == 1:
        return ranks[0]
    return (ranks[0], ranks[1]) if len(ranks) == 2 else None


def integers(text: str, name: str) -> tuple[int, ...]:
    """ "0,10" -> (0, 10)."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(
            f"{name} must be whole numbers such as 0,10,100, got {_got(text)}"
        ) from None


def floats(text: str, name: str) -> tuple[float, ...]:
    """ "0.1,1" -> (0.1, 1.0)."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"{name} must be numbers such as 0.1,1,10, got {_got(text)}") from None


def setting(text: str, kind: type, name: str) -> Any:
    """A text as a setting of one kind: "true" or "false", a number, or itself."""
    try:
        return {"true": True, "false": False}[text.lower()] if kind is bool else kind(text)
    except (KeyError, ValueError):
        what = {bool: "true or false", int: "a whole number", float: "a number"}[kind]
        raise ValueError(f"{name} must be {what}, got {_got(text)}") from None


def _range(text: str) -> tuple[int, int] | None:
    """ "3" -> (3, 3), "0-2" -> (0, 2); None for anything else, "2-0" and "99999" too."""
    first, dash, last = text.strip().partition("-")
    digits = len(str(MOST_BLOCKS))
    if not all(part.isdecimal() and len(part) <= digits for part in (first, last if dash else "0")):
        return None
    span = int(first), int(last if dash else first)
    return span if span[0] <= span[1] < MOST_BLOCKS else None


def blocks(text: str) -> tuple[int, ...]:
    """ "0-3,11" -> (0, 1, 2, 3, 11), rising and each once, however they are written."""
    numbers: set[int] = set()
    for part in text.split(","):
        span = _range(part)
        if span is None:
            raise ValueError(f"layers must be numbers and ranges such as 0-3,11, got {_got(text)}")
        numbers.update(range(span[0], span[1] + 1))
    return tuple(sorted(numbers))


def block_ranges(text: str) -> list[tuple[int, int] | None]:
    """ "all,0-2,5" -> [None, (0, 2), (5, 5)]."""
    ranges: list[tuple[int, int] | None] = []
    for part in text.split(","):
        span = _range(part)
        if span is None and part.strip() != "all":
            raise ValueError(f"layers must be ranges such as all,0-2,5-8, got {_got(text)}")
        ranges.append(span)
    return ranges


def _got(text: str, most: int = 80) -> str:
    return repr(text) if len(text) <= most else f"{text[:most]!r}..."
