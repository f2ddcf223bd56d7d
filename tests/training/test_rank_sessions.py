"""What processes agree on, and who of them tells of a failure: one process, or two forks of it."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed import TCPStore

from efft_kernels.training import ranks as module
from efft_kernels.training.ranks import ALONE, OtherRankError, Ranks, first_to_fail, session

SILENT = "another process ended without a word, killed or out of memory"


@pytest.fixture
def torchrun(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int, int], None]]:
    """Sets (rank, world) as torchrun does, which holds the store that the processes share."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    port = str(store.port)
    monkeypatch.setattr(module, "_session", None)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)

    def start(rank: int, world: int) -> None:
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", str(world))
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", port)
        monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")

    yield start


def test_alone() -> None:
    value = torch.tensor([3.0])
    assert ALONE.first and not ALONE.together
    assert (ALONE.rank, ALONE.world, ALONE.local_rank, ALONE.fsdp) == (0, 1, 0, False)
    assert ALONE.sum(value) is value and value == 3
    assert ALONE.gather("a") == ["a"]
    assert ALONE.from_first(lambda: "b") == "b"
    assert ALONE.device("cpu") == torch.device("cpu")
    assert Ranks(world=2).together and Ranks(fsdp=True).together
    assert not Ranks(rank=1, world=2).first


class TestDevices:
    @pytest.fixture
    def chosen(self, monkeypatch: pytest.MonkeyPatch) -> list[int]:
        """Two GPUs; those that were made the current one."""
        found: list[int] = []
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        monkeypatch.setattr(torch.cuda, "set_device", found.append)
        monkeypatch.setattr(
            module, "resolve_device", lambda name: torch.device(name.replace("auto", "cuda"))
        )
        return found

    @pytest.mark.parametrize("name", ["auto", "cuda"])
    def test_every_process_has_its_own_gpu(self, chosen: list[int], name: str) -> None:
        assert Ranks(5, 6, 1).device(name) == torch.device("cuda", 1)
        assert chosen == [1]

    def test_on_the_cpu(self, chosen: list[int]) -> None:
        assert Ranks(5, 6, 7).device("cpu") == torch.device("cpu")
        assert not chosen

    def test_one_process_takes_any(self, chosen: list[int]) -> None:
        assert ALONE.device("cuda:1") == torch.device("cuda", 1)
        assert not chosen

    def test_one_gpu_for_all(self, chosen: list[int]) -> None:
        with pytest.raises(ValueError, match=r"every process takes a GPU of its own, got cuda:1"):
            Ranks(0, 2, 0).device("cuda:1")

    def test_too_few(self, chosen: list[int]) -> None:
        with pytest.raises(ValueError, match=r"device must be one with a GPU.* got 2 for 3 proc"):
            Ranks(2, 3, 2).device("cuda")
        assert not chosen

    def test_none(self, chosen: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
        monkeypatch.setattr(module, "resolve_device", lambda name: torch.device("cpu"))
        assert Ranks(2, 3, 2).device("auto") == torch.device("cpu")
        assert not chosen


class TestOneProcess:
    def test_without_torchrun(self, torchrun: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        with session() as ranks:
            assert ranks is ALONE and not dist.is_initialized()
        with pytest.raises(ValueError, match="fsdp must be left out without torchrun"):
            session(fsdp=True).__enter__()
        torchrun(0, 1)
        with session() as ranks:
            assert ranks is ALONE
        monkeypatch.delenv("MASTER_PORT")
        with pytest.raises(ValueError, match="left out without torchrun"):
            session(fsdp=True).__enter__()

    def test_a_group_of_one(self, torchrun: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        torchrun(0, 1)
        assert first_to_fail("text") == "text"
        for given, expected in ((None, 0), ("3", 3)):
            if given is not None:
                monkeypatch.setenv("LOCAL_RANK", given)
            with session(fsdp=True) as ranks, warnings.catch_warnings(record=True) as shown:
                assert ranks == Ranks(0, 1, expected, True)
                assert dist.get_backend() and ranks.gather(1) == [1]
                warnings.warn("Grad strides do not match bucket view strides.", stacklevel=1)
            assert not shown and not dist.is_initialized()
            assert first_to_fail("text") == "text"

    @pytest.mark.parametrize(
        ("error", "expected"),
        [
            (ValueError("mine"), ValueError("mine")),
            (ValueError("Broken pipe"), ValueError("Broken pipe")),
            (RuntimeError("mine"), RuntimeError("mine")),
            (RuntimeError("[gloo/transport/tcp/pair.cc] reset"), OtherRankError(SILENT)),
            (RuntimeError("Connection closed by peer"), OtherRankError(SILENT)),
        ],
        ids=repr,
    )
    def test_the_error_of_a_session(self, torchrun: Any, error: Any, expected: Any) -> None:
        torchrun(0, 1)
        with pytest.raises(type(expected)) as caught, session(fsdp=True):
            raise error
        assert repr(caught.value) == repr(expected)
        assert not dist.is_initialized()
        # The command line asks once more, for the line that it prints.
        assert first_to_fail("text") == "rank 0: text"

    def test_another_was_first(self, torchrun: Any) -> None:
        torchrun(0, 1)
        with pytest.raises(OtherRankError, match=r"^rank 1: theirs$"), session(fsdp=True):
            assert module._session is not None
            module._session.store.set(module._session.key, "rank 1: theirs")
            raise ValueError("mine")
        assert first_to_fail("text") is None
        # What was told of one session is no word on the next.
        with pytest.raises(ValueError, match=r"^mine$"), session(fsdp=True):
            raise ValueError("mine")

    def test_the_store_is_gone(self) -> None:
        class Gone:
            def compare_set(self, *_: str) -> bytes:
                raise RuntimeError

        at = module._Session(Ranks(1, 2), Gone(), "key")
        assert module._tell_first(at, "text") == (True, "rank 1: text")


def work(rank: int, ranks: Ranks) -> Any:
    value = torch.tensor([rank + 1.0])
    assert ranks.sum(value) is value
    made: list[int] = []

    def make() -> str:
        made.append(rank)
        return f"of {rank}"

    return value.item(), ranks.gather(rank), ranks.from_first(make), made


def second_fails(rank: int, ranks: Ranks) -> None:
    if rank:
        raise ValueError("mine")


def second_vanishes(rank: int, ranks: Ranks) -> None:
    if rank:
        os._exit(3)
    ranks.gather(None)


def of_rank(rank: int, start: Any, check: Any, answer: Connection) -> None:
    start(rank, 2)
    try:
        with session() as ranks:
            found = check(rank, ranks)
        answer.send(found)
    except Exception as error:
        answer.send((type(error).__name__, str(error), first_to_fail("text")))


@pytest.mark.parametrize(
    ("check", "expected"),
    [
        (work, [(3.0, [0, 1], "of 0", [0]), (3.0, [0, 1], "of 0", [])]),
        (
            second_fails,
            [("OtherRankError", "rank 1: mine", None), ("ValueError", "mine", "rank 1: text")],
        ),
        (second_vanishes, [("OtherRankError", SILENT, "rank 0: text"), None]),
    ],
)
def test_two_processes(torchrun: Any, check: Any, expected: list[Any]) -> None:
    """Forks, so that tools/mutate.py has its faults in both."""
    context, started = get_context("fork"), []
    for rank in range(2):
        received, answer = context.Pipe(duplex=False)
        process = context.Process(target=of_rank, args=(rank, torchrun, check, answer))
        process.start()
        answer.close()
        started.append((process, received))
    try:
        assert [answer_of(received) for _, received in started] == expected
    finally:
        for process, _ in started:
            process.kill()
            process.join()


def answer_of(process: Connection) -> Any:
    """None of one that gave none."""
    assert process.poll(20)
    try:
        return process.recv()
    except EOFError:
        return None
