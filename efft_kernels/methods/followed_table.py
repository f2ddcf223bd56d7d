"""A module's table of parameters or of modules that other objects follow.

What a graph of torch.compile reads it has to reach by one path for all blocks that share it, so not
by a key that differs between them. It reads an object that refers to the entry, and the table keeps
that reference up to date.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_NONE: Any = object()


class FollowedTable(dict[str, Any]):
    """In place of a module's `_parameters` or `_modules`.

    torch exchanges an entry by writing into the table: `to`, `load_state_dict(assign=True)`,
    `torch.func.functional_call` and FSDP2 all do. `copy` gives a plain dict: the exchanges of a
    module that was copied with it are its own.

    Args:
        items: the entries.
        followers: key → objects that follow its entry.
        attribute: the one of theirs that is the entry, or None where there is none any more.
    """

    def __init__(
        self, items: Mapping[str, Any], followers: Mapping[str, Sequence[object]], attribute: str
    ) -> None:
        super().__init__(items)
        self.__setstate__((followers, attribute))

    def _tell(self, key: str) -> None:
        followers, attribute = self._state
        value = self.get(key)
        for follower in followers.get(key, ()):
            if getattr(follower, attribute) is not value:
                setattr(follower, attribute, value)

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key, value)
        self._tell(key)

    def __delitem__(self, key: str) -> None:
        super().__delitem__(key)
        self._tell(key)

    def pop(self, key: str, default: Any = _NONE) -> Any:
        if key not in self and default is not _NONE:
            return default
        value = self[key]
        del self[key]
        return value

    def popitem(self) -> tuple[str, Any]:
        key, value = super().popitem()
        self._tell(key)
        return key, value

    def clear(self) -> None:
        for key in list(self):
            del self[key]

    def update(self, *args: Any, **kwargs: Any) -> None:
        for key, value in dict(*args, **kwargs).items():
            self[key] = value

    def setdefault(self, key: str, default: Any = None) -> Any:
        if key not in self:
            self[key] = default
        return self[key]

    def __ior__(self, other: Any) -> FollowedTable:  # type: ignore[override, misc]
        self.update(other)
        return self

    def __reduce__(self) -> Any:
        return _empty, (), self._state, None, iter(self.items())

    def __setstate__(self, state: tuple[Mapping[str, Sequence[object]], str]) -> None:
        self._state = state
        for key in state[0]:
            self._tell(key)


def _empty() -> FollowedTable:
    return FollowedTable({}, {}, "")
