"""Launch configs, and the files that hold them: tuned/defaults.json and measured tables.

`defaults.json` comes with the package and holds, for each architecture family, candidates that are
predicted, not measured. A measured table is written by tools/tune_triton.py for one device:
tuned/<device>.json here, or the file that EFFT_KERNELS_TUNED names, whose rows come first.
"""

from __future__ import annotations

import json
import logging
import os
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from .device import SMEM_BYTES, family

logger = logging.getLogger(__name__)

ENVIRONMENT_VARIABLE = "EFFT_KERNELS_TUNED"
FOLDER = Path(__file__).parent / "tuned"


class GemmConfig(NamedTuple):
    """Of the GEMM: out [m, c] is summed over i."""

    block_m: int
    block_c: int
    block_i: int
    group_m: int  # row tiles that share a column's tile of w in L2
    num_warps: int
    num_stages: int
    tma: bool = False  # tiles are loaded by TMA: sm_90 and later, aligned rows
    persistent: bool = False  # one program per multiprocessor walks over the tiles


class PassConfig(NamedTuple):
    """Of `thin` (`programs`: at most so many) and `tall_grad` (`programs`: splits of the rows)."""

    block_m: int
    block_c: int
    programs: int
    num_warps: int
    num_stages: int


def gemm_candidates(arch: int, form: str, rank: int) -> tuple[GemmConfig, ...]:
    """The shipped GEMM configs of an architecture, best first on paper.

    Args:
        arch: 10 * major + minor.
        form: as `tuning.operand_form` names it.
        rank: padded.
    """
    return tuple(GemmConfig(*config) for config in _default("gemm", arch, form, rank))


def pass_defaults(kernel: str, arch: int, form: str, rank: int) -> PassConfig:
    """The shipped config of `thin`, `thin_grad` or `tall_grad`; `programs` is still to be set."""
    return PassConfig(*_default(kernel, arch, form, rank))


def _default(kernel: str, arch: int, form: str, rank: int) -> Any:
    for limit, found in defaults()[kernel][f"sm_{family(arch)}"][form]:
        if rank <= limit:
            return found
    raise AssertionError(f"defaults.json has no {kernel} entry for {form} at rank {rank}")


def gemm_smem_bytes(
    config: GemmConfig, rank: int, a_bytes: int, w_bytes: int, compute_p: bool
) -> int:
    """Bytes of shared memory for the pipelined operands; tools/compile_triton.py shows the total.

    A persistent program holds the next tile's operands while it stores this one, so the output's
    way through shared memory and the last product's operands come on top (as much as compiled
    kernels show).

    Args:
        config: the block shape.
        rank: padded.
        a_bytes: of one element of a, thin_in and thin_out.
        w_bytes: of one element of w as stored.
        compute_p: P is accumulated in the same loop.
    """
    a = config.block_m * config.block_i * a_bytes
    w = config.block_i * config.block_c * w_bytes
    d = config.block_i * rank * a_bytes if compute_p else 0
    pipelined = config.num_stages * (a + w + d)
    if not config.persistent:
        return pipelined
    last = (config.block_c + (0 if compute_p else config.block_m)) * rank * a_bytes
    return pipelined + max(32 * 1024, last)


def persistent_candidates(
    arch: int, form: str, rank: int, compute_p: bool
) -> tuple[GemmConfig, ...]:
    """The shipped configs as persistent programs: to be measured, never taken unmeasured.

    Only on sm_90, where the loop over tiles becomes one with the loop inside, and only those that
    fill a multiprocessor alone: where two programs share one, each hides the other's first loads
    and last stores already. Shared memory has to hold one stage less for it.
    """
    if arch != 90:
        return ()
    found = []
    for config in gemm_candidates(arch, form, rank):
        persistent = config._replace(tma=True, persistent=True)
        if config.num_warps < 8:
            continue
        if rank > 16 and config.block_c > 128:  # spills at ranks of 17 to 31
            continue
        while gemm_smem_bytes(persistent, rank, 2, 2, compute_p) > SMEM_BYTES[arch]:
            persistent = persistent._replace(num_stages=persistent.num_stages - 1)
        if persistent.num_stages >= 2:
            found.append(persistent)
    return tuple(found)


@cache
def defaults() -> dict[str, Any]:
    """The content of defaults.json: {kernel: {"sm_90": {form: [[largest rank, configs], ...]}}}."""
    return json.loads((FOLDER / "defaults.json").read_text())


def gemm_key(c: int, i: int, rank: int, form: str, compute_p: bool) -> str:
    """The row of a measured table that serves a GEMM."""
    return f"gemm|{form}|{'ride' if compute_p else 'given'}|c{c}|i{i}|r{rank}"


def pass_key(kernel: str, c: int, rank: int, form: str) -> str:
    """The row of a measured table that serves `thin`, `thin_grad` or `tall_grad`."""
    return f"{kernel}|{form}|c{c}|r{rank}"


@cache
def measured_table(device_name: str) -> dict[str, dict[str, list[int]]]:
    """Measured rows of one device: {"gemm|half|ride|c2304|i768|r16": {"14": [128, 256, ...]}}.

    Raises:
        ValueError: the file that EFFT_KERNELS_TUNED names is not there; it or the device's own file
            is no such table.
    """
    rows: dict[str, dict[str, list[int]]] = {}
    own, named = FOLDER / f"{device_name}.json", os.environ.get(ENVIRONMENT_VARIABLE)
    for path in (*([own] if own.is_file() else []), *([Path(named)] if named else [])):
        table = _read_table(path, ENVIRONMENT_VARIABLE if path is not own else "the device's file")
        if table["device"] == device_name:
            rows.update(table["rows"])
        else:
            logger.warning(
                "%s was measured on %s, not %s; ignored", path, table["device"], device_name
            )
    return rows


def _read_table(path: Path, named_by: str) -> dict[str, Any]:
    try:
        table = json.loads(path.read_text())
        wrong = _wrong_in(table)
    except (OSError, ValueError, RecursionError) as error:
        wrong = str(error)
    if wrong:
        raise ValueError(
            f"{named_by} must be a table that tools.tune_triton wrote, got {path}: {wrong}"
        )
    return table  # type: ignore[no-any-return]


# How many numbers a row has, and which of them may be 0 and at most 1.
_NUMBERS = {"gemm": ((6, 7, 8), slice(6, None)), "chain": ((1,), slice(None))}


def _wrong_in(table: Any) -> str:
    """What makes it no measured table; empty where it is one."""
    if not isinstance(table, dict) or not isinstance(table.get("device"), str):
        return "it names no device"
    rows = table.get("rows")
    if not isinstance(rows, dict) or not all(isinstance(own, dict) for own in rows.values()):
        return "it has no rows"
    for key, own in rows.items():
        kind = key.partition("|")[0].partition(" ")[0]
        counts, flags = _NUMBERS.get(kind, ((5,), slice(0)))
        for bucket, config in own.items():
            if not _is_bucket(bucket) or not _are_numbers(config, counts, flags):
                return f"row {key!r} has {bucket[:20]!r}: {str(config)[:80]}"
    return ""


def _is_bucket(text: str) -> bool:
    """The bit length of a number of rows."""
    return text.isascii() and text.isdigit() and len(text) <= 2


def _are_numbers(config: Any, counts: tuple[int, ...], flags: slice) -> bool:
    whole = isinstance(config, list) and all(type(n) is int and 0 <= n < 1 << 31 for n in config)
    if not whole or len(config) not in counts:
        return False
    on_or_off = config[flags]
    sizes = config[: len(config) - len(on_or_off)]
    return all(sizes) and all(number <= 1 for number in on_or_off)


def measured(device_name: str, key: str, m: int) -> list[int] | None:
    """The row for `key` whose M bucket (bit length) is nearest, at most one away."""
    by_bucket = measured_table(device_name).get(key)
    if not by_bucket:
        return None
    bucket = min(by_bucket, key=lambda b: abs(int(b) - m.bit_length()))
    return by_bucket[bucket] if abs(int(bucket) - m.bit_length()) <= 1 else None
