"""The smoke test's own flow on a CPU: a rehearsal, and children that die, hang or never start."""

from __future__ import annotations

import csv
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu import smoke
from efft_kernels.testing.gpu_cases import cases_by_kernel

OK = '{"row": {"verdict": "ok"}}'


def child(*steps: str) -> list[str]:
    """A child that prints these lines of JSON and runs these statements."""
    code = [f"print({s!r}, flush=True)" if s.startswith("{") else s for s in steps]
    return [sys.executable, "-c", "\n".join(["import os, time", *code])]


def verdicts(indices: list[int], *children: list[str]) -> list[str]:
    """Of a lane whose first child is the first of these, and so on."""
    report, waiting = smoke.Report(None, "cpu"), list(children)
    end = time.monotonic() + 60
    smoke.run_lane(indices, "cpu", report, end, lambda *_: waiting.pop(0))
    assert not waiting
    assert set(report.verdicts) == {smoke.CASES[i].name for i in indices}
    assert report.summarise() == (set(report.verdicts.values()) == {"ok"})
    return [report.verdicts[smoke.CASES[i].name] for i in indices]


def begin(index: int) -> str:
    return f'{{"begin": {index}}}'


def test_a_rehearsal_writes_a_row_for_each_case(tmp_path: Path) -> None:
    out = tmp_path / "rows.csv"
    arguments = ["--device", "cpu", "--jobs", "1", "--out", str(out), "--only"]
    assert smoke.main([*arguments, "general 64 split", "triton odd split float16"]) == 0
    rows = list(csv.DictReader(out.open()))
    assert [row["verdict"] for row in rows] == ["ok"] * 3
    first, last = rows[0], rows[-1]
    assert (first["backend"], first["M"], first["Ra"]) == ("cuda", "67", "7")
    assert "sm80-bf16-64-I" in first["expected_plan"] and first["plan_seen"] == ""
    assert (last["backend"], last["expected_plan"]) == ("triton", "")


def test_inline_needs_no_children(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A case that raises does not stop the next; what there is no time for is named."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    monkeypatch.setattr(smoke, "run_lane", None)
    monkeypatch.setattr(smoke, "recorded_launches", None)
    out, taken = tmp_path / "rows.csv", smoke.run_case

    def failing(case: Any, device: str, **options: Any) -> smoke.Row:
        if "r29" in case.name:
            raise RuntimeError("no kernel image")
        return taken(case, device, **options)

    monkeypatch.setattr(smoke, "run_case", failing)
    arguments = ["--device", "cpu", "--inline", "--out", str(out), "--only", "cuda general 64 "]
    assert smoke.main(arguments) == 1
    assert {row["verdict"] for row in csv.DictReader(out.open())} == {"ok", "ERROR"}
    assert smoke.main([*arguments, "--seconds", "0"]) == 1
    assert {row["verdict"] for row in csv.DictReader(out.open())} == {"MISSED"}


def test_a_child_that_dies_costs_one_case() -> None:
    died = child(begin(0), OK, begin(1), "os._exit(7)")
    assert verdicts([0, 1, 2], died, child(begin(2), OK)) == ["ok", "DIED", "ok"]


def test_a_child_that_tells_of_a_hang_is_followed_by_another() -> None:
    hung = child(begin(0), '{"row": {"verdict": "HANG"}}', f"os._exit({smoke.HANG_CODE})")
    assert verdicts([0, 1], hung, child(begin(1), OK)) == ["HANG", "ok"]


def test_a_case_without_an_end_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smoke, "CASE_SECONDS", 0.5)
    endless = child(begin(0), "time.sleep(600)")
    assert verdicts([0, 1], endless, child(begin(1), OK)) == ["LIMIT", "ok"]


def test_a_child_that_never_starts_is_not_started_again() -> None:
    assert verdicts([0, 1], child("raise SystemExit(2)")) == ["MISSED", "MISSED"]


def test_a_gpu_that_does_not_finish_ends_the_process(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Event:
        def record(self) -> None: ...

        def query(self) -> bool:
            return False

    def leave(code: int) -> None:
        raise SystemExit(code)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(smoke.os, "_exit", leave)
    monkeypatch.setattr(smoke, "HANG_SECONDS", 0.0)
    with pytest.raises(SystemExit, match=str(smoke.HANG_CODE)):
        smoke.wait_for_gpu("forward")
    assert "HANG" in capsys.readouterr().out


def test_an_error_is_a_row_and_the_next_case_runs(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    run_case = smoke.run_case

    def fail_first(case: smoke.Case, device: str) -> smoke.Row:
        if case is smoke.CASES[0]:
            raise RuntimeError("out of luck")
        return run_case(case, device)

    monkeypatch.setattr(smoke, "run_case", fail_first)
    smoke.run_child([0, 1], "cpu")
    lines = capfd.readouterr().out.splitlines()
    assert "RuntimeError: out of luck" in lines[1] and '"ok"' in lines[3]


def test_other_kernels_than_expected_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smoke, "plans_are_known", lambda: True)
    row = smoke.run_case(smoke.CASES[0], "cpu")
    assert row["verdict"] == "PLAN"
    plan = "fold-bf16 thin-bf16-16-odd sm80-bf16-64-I"
    assert row["wrong"].startswith(f"took no known kernel, not {plan}")


def test_a_wrong_result_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    results_of = smoke.results_of

    def spoiled(*arguments: Any) -> dict[str, torch.Tensor]:
        results = results_of(*arguments)
        results["core"][1, 2, 3] += 1
        return results

    monkeypatch.setattr(smoke, "results_of", spoiled)
    row = smoke.run_case(smoke.CASES[0], "cpu")
    assert row["verdict"] == "WRONG"
    assert row["wrong"].startswith("core: 1 of 105 wrong, 0 NaN; rows 9..9 (1), cols 3..3 (1)")


def test_differences_say_where() -> None:
    exact = torch.zeros(5, 70, dtype=torch.float64)
    value = exact.half()
    assert smoke.difference("y", value, exact) is None
    value[2, 64:66] = torch.nan
    text = smoke.difference("y", value, exact)
    assert text is not None
    assert "2 of 350 wrong, 2 NaN; rows 2..2 (1), cols 64..65 (2), col % 64 in [0, 1]" in text


def test_lanes_hold_every_case_once_and_keep_shared_kernels_together() -> None:
    lanes = smoke.lanes_of(range(len(smoke.CASES)), 4)
    assert sorted(i for lane in lanes for i in lane) == list(range(len(smoke.CASES)))
    cases = [[smoke.CASES[i] for i in lane] for lane in lanes]
    keys = [{(c.shape, c.dtype, c.density) for c in lane} for lane in cases]
    assert sum(map(len, keys)) == len(set.union(*keys))


def test_the_list_names_every_kernel(capsys: pytest.CaptureFixture[str]) -> None:
    assert smoke.main(["--list"]) == 0
    out = capsys.readouterr().out
    assert [line.split()[0] for line in out.splitlines()] == list(cases_by_kernel())
