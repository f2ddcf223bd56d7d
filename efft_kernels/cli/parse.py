"""The text of an option as numbers and ranges; each raises ValueError, naming the option."""

from __future__ import annotations


def rank(text: str) -> int | tuple[int, int]:
    """ "16" -> 16, "8,16" -> (8, 16)."""
    try:
        ranks = [int(part) for part in text.split(",")]
    except ValueError:
        ranks = []
    if len(ranks) not in (1, 2):
        raise ValueError(f"rank must be a number R or two, R1,R2, got {text!r}")
    return ranks[0] if len(ranks) == 1 else (ranks[0], ranks[1])


def integers(text: str, name: str) -> tuple[int, ...]:
    """ "0,10" -> (0, 10)."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"{name} must be whole numbers such as 0,10,100, got {text!r}") from None


def floats(text: str, name: str) -> tuple[float, ...]:
    """ "0.1,1" -> (0.1, 1.0)."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"{name} must be numbers such as 0.1,1,10, got {text!r}") from None


def _range(text: str) -> tuple[int, int] | None:
    """ "3" -> (3, 3), "0-2" -> (0, 2); None for anything else."""
    first, dash, last = text.strip().partition("-")
    if not first.isdecimal() or (dash and not last.isdecimal()):
        return None
    return int(first), int(last if dash else first)


def blocks(text: str) -> tuple[int, ...]:
    """ "0-3,11" -> (0, 1, 2, 3, 11)."""
    numbers: list[int] = []
    for part in text.split(","):
        span = _range(part)
        if span is None:
            raise ValueError(f"layers must be numbers and ranges such as 0-3,11, got {text!r}")
        numbers += range(span[0], span[1] + 1)
    return tuple(numbers)


def block_ranges(text: str) -> list[tuple[int, int] | None]:
    """ "all,0-2,5" -> [None, (0, 2), (5, 5)]."""
    ranges: list[tuple[int, int] | None] = []
    for part in text.split(","):
        span = _range(part)
        if span is None and part.strip() != "all":
            raise ValueError(f"layers must be ranges such as all,0-2,5-8, got {text!r}")
        ranges.append(span)
    return ranges
