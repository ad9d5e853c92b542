"""A second balancer that goes on exactly as a first one would: all that changes is copied, and nothing else (pure).

What a snapshot is on disk this is in memory, in a tenth of the time: it is taken while clients wait.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from operator import attrgetter
from random import Random
from types import MappingProxyType
from typing import Any, Final

from lbcore import config, provision, records
from lbcore.balancer import LoadBalancer
from lbcore.snapshot import (
    CLASSES,
    ENUMS,
    PLAIN,
    VALUES,
    SnapshotError,
    blank,
    fields_of,
    parts_of,
    put,
    state_of,
    wiring_of,
)

_FROZEN: Final = frozenset(
    {*PLAIN, *ENUMS, *VALUES, config.RouteSettings, config.ServerSettings, MappingProxyType} - {provision.Job}
)
"""What never changes, and refers to nothing that does: both balancers have the same."""


_EQUAL_BY_VALUE = (records.ModelStats,)
"""Could not be told from others that are equal; but there is one reference to each."""


def fork(balancer: LoadBalancer) -> LoadBalancer:
    """Return a balancer in the state of another one, between two calls. Raises SnapshotError as `snapshot.take`."""
    copier = _Copier()
    other = LoadBalancer(balancer.config, Random(0), type(balancer.placement))
    wiring = wiring_of(balancer)
    for (_, part), (_, its) in zip(parts_of(balancer), parts_of(other), strict=True):
        for name, value in state_of(part, wiring):
            put(its, name, copier.copy(value, getattr(its, name, None)))
    return other


class _Copier:
    """Copies values; what is met twice is copied once. What the other balancer has already is filled, not replaced."""

    def __init__(self) -> None:
        self._copies: dict[object, object] = {}
        self._kinds: dict[type, Callable[[Any, Any], Any]] = {
            list: self._list,
            tuple: self._tuple,
            dict: self._dict,
            deque: lambda value, _: deque(map(self.copy, value), value.maxlen),
            Random: _random,
        }

    def copy(self, value: Any, existing: Any = None) -> Any:
        """Return a copy of a value, or itself if it never changes."""
        kind = type(value)
        if kind in _FROZEN:
            return value
        known = self._kinds.get(kind)
        if known is None:
            known = self._kinds[kind] = self._meet(kind)
        return known(value, existing)

    def _list(self, value: list[Any], existing: Any) -> list[Any]:
        items = [item if type(item) in _FROZEN else self.copy(item) for item in value]
        if isinstance(existing, list):
            existing[:] = items
            return existing
        return items

    def _tuple(self, value: tuple[Any, ...], existing: Any) -> tuple[Any, ...]:
        if all(type(item) in _FROZEN for item in value):
            return value
        its = existing if isinstance(existing, tuple) and len(existing) == len(value) else (None,) * len(value)
        return tuple([self.copy(item, old) for item, old in zip(value, its, strict=True)])

    def _dict(self, value: Mapping[Any, Any], existing: Any) -> dict[Any, Any]:
        result: dict[Any, Any] = existing if isinstance(existing, dict) else {}
        result.clear()
        for key, item in value.items():  # keys are made of what never changes
            result[key] = item if type(item) in _FROZEN else self.copy(item)
        return result

    def _meet(self, kind: type) -> Callable[[Any, Any], Any]:
        """Return what copies the instances of a class that was not met before."""
        if CLASSES.get(kind.__name__) is not kind:
            raise SnapshotError(f"a {kind.__module__}.{kind.__name__} in the state of the core is not known to forks")
        names = fields_of(kind)
        get = attrgetter(*names)
        copies, copy, frozen, assign = self._copies, self.copy, _FROZEN, object.__setattr__
        by_identity = kind not in _EQUAL_BY_VALUE

        def fill(value: Any, existing: Any) -> Any:
            known = copies.get(value) if by_identity else None
            if known is not None:
                return known
            has = type(existing) is kind
            made = existing if has else blank(kind)
            if by_identity:
                copies[value] = made
            for name, item in zip(names, get(value)):  # noqa: B905  strict takes longer, and there are thousands
                if type(item) in frozen:
                    assign(made, name, item)
                else:
                    assign(made, name, copy(item, getattr(made, name) if has else None))
            return made

        return fill


def _random(value: Random, existing: Any) -> Random:
    result = existing if isinstance(existing, Random) else Random(0)
    result.setstate(value.getstate())
    return result
