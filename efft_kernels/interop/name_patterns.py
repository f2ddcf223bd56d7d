"""The regular expressions by which a PEFT configuration names modules, matched in bounded time.

Python's matcher goes back and tries again, so that a short expression can take it years. It cannot
be told to stop, so what it could have to try is counted before it is started.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

try:  # the standard library's own parser, which re.compile uses
    from re import _parser  # type: ignore[attr-defined]
except ImportError:  # until Python 3.10
    import sre_parse as _parser  # type: ignore[no-redef]

MOST_WAYS = 10**8  # a few seconds
MOST_CHARACTERS = 10**5  # compiled in as many; a long name for each of 1,000 linears
_TOO_MANY = MOST_WAYS + 1


class NamePatterns:
    """rank_pattern or alpha_pattern: the value of the first key that fits a module's name.

    Args:
        patterns: a regular expression to its value.

    Raises:
        ValueError: a key that is no regular expression, or keys that take too long to compile.
    """

    def __init__(self, patterns: Mapping[str, float]):
        if (characters := sum(map(len, patterns))) > MOST_CHARACTERS:
            raise ValueError(
                f"rank_pattern and alpha_pattern must have keys of at most {MOST_CHARACTERS:,}"
                f" characters together, got {characters:,}"
            )
        self._expressions = [(key, *_compile(key), value) for key, value in patterns.items()]
        self._ways_left = MOST_WAYS

    def value_of(self, module: str, default: float) -> float:
        """PEFT's rule: the first key that, as a regular expression, fits the name or its dotted
        end; `default` where none does.

        Raises:
            ValueError: the names asked for until now may take more than `MOST_WAYS` tries.
        """
        ends = 1 + module.count(".")
        for key, expression, choices, repeats, value in self._expressions:
            self._ways_left -= ends * choices * math.comb(len(module) + repeats, repeats)
            if self._ways_left < 0:
                raise ValueError(
                    "rank_pattern and alpha_pattern must have simple regular expressions as keys,"
                    f" got {_shown(key)}, which may take more than {MOST_WAYS:,} tries: write the"
                    " modules' names out"
                )
            if expression.match(module):
                return value
        return default


def _compile(key: str) -> tuple[re.Pattern[str], int, int]:
    """(the expression for names and their ends, and what `_ways` counts in the key)."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of future meanings of a doubtful expression
            return re.compile(rf"(.*\.)?({key})$"), *_ways(_parser.parse(f"()({key})"))
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(
            "rank_pattern and alpha_pattern must have regular expressions as keys, got"
            f" {_shown(key)}: {error or type(error).__name__}"
        ) from None


def _ways(parsed: Iterable[tuple[Any, Any]]) -> tuple[int, int]:
    """How many ways there are to match a text of n characters, at most choices·C(n+repeats, n).

    A repeat of what matches in one way ends anywhere in the text, and those of a sequence share its
    characters. A repeat of what has several ways has so many in each round.

    Returns:
        (choices, repeats).
    """
    choices, repeats = 1, 0
    for operation, operand in parsed:
        name = str(operation)
        if name in ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT"):
            low, high, body = operand
            inner, inside = _ways(body)
            if high == 1:
                choices, repeats = choices * (inner + 1 - low), repeats + inside
            elif (inner, inside) == (1, 0):
                repeats += low != high
            elif low == high and high * inside <= 8 and inner ** min(high, 64) <= MOST_WAYS:
                choices, repeats = choices * inner**high, repeats + high * inside
            else:
                choices = _TOO_MANY
        elif name == "BRANCH":
            branches = [_ways(branch) for branch in operand[1]]
            choices *= sum(inner for inner, _ in branches)
            repeats += max(inside for _, inside in branches)
        else:  # a group, a look ahead or behind, a condition: all that is parsed in it
            for body in operand if isinstance(operand, tuple) else (operand,):
                if isinstance(body, _parser.SubPattern):
                    inner, inside = _ways(body)
                    choices, repeats = choices * inner, repeats + inside
        choices = min(choices, _TOO_MANY)
    return choices, repeats


def _shown(key: str, most: int = 60) -> str:
    return repr(key) if len(key) <= most else f"{key[:most]!r}..."
