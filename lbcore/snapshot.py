"""The whole state of a balancer as JSON values, and a balancer made of them that goes on exactly as the first would.

    state = take(balancer)                 # values that `json` can write
    balancer = load(json.loads(text))      # same commands from here on

Written by a generic encoder over the classes named below and nothing else; only these can come back, so that a file
cannot make anything of its own. Requests, attempts and servers refer to each other: each is written once, where it is
met first, with a number that stands for it everywhere else. What a server said in its own words is left out
(`lbcore.redaction`); so are caches, which fill again.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from enum import Enum
from operator import attrgetter
from random import Random
from types import MappingProxyType
from typing import Any, Final

from lbcore import commands, config, events, ollama, provision, records, states, timers
from lbcore.admission import AdmissionQueue, RaceBudget, RetryBudget
from lbcore.balancer import LoadBalancer
from lbcore.errors import CoreError
from lbcore.placement import Placement
from lbcore.redaction import cut_detail, cut_text


class SnapshotError(CoreError):
    """A state cannot be written, or what is to be loaded is none of this version."""


VALUES: tuple[type, ...] = (
    config.Alias,
    config.Config,
    config.HealthSettings,
    config.ModelSettings,
    config.PlacementSettings,
    config.ProbeSettings,
    config.QueueSettings,
    config.RaceSettings,
    config.RetrySettings,
    config.SelectionSettings,
    config.TimeoutSettings,
    events.ActiveModel,
    events.ModelInfo,
    events.RequestArrived,
    provision.Job,
    provision.Setback,
    records.Failure,
)
"""Frozen: one that is referred to twice may be written twice."""

_SHARED: tuple[type, ...] = (
    config.RouteSettings,
    config.ServerSettings,
    AdmissionQueue,
    RaceBudget,
    RetryBudget,
    records.AliasUse,
    records.Attempt,
    records.ModelStats,
    records.Quantile,
    records.Request,
    records.Server,
    records.ServerModel,
)
"""Changed in place, or the same for many: written once, whoever refers to it."""

ENUMS: tuple[type[Enum], ...] = (
    commands.AttemptKind,
    commands.Work,
    config.Policy,
    config.Strategy,
    config.Winner,
    events.Reason,
    ollama.RequestKind,
    states.AttemptState,
    states.Reliability,
    states.RequestState,
    states.ServerState,
    timers.TimerKind,
)

CLASSES: Mapping[str, type] = {cls.__name__: cls for cls in (*VALUES, *_SHARED, *ENUMS)}
"""All that can stand in a snapshot beside the types of JSON, tuples, deques and generators."""

_PARTS = ("timers", "fleet", "ledger", "placement", "provision", "_broadcast", "_requests", "_attempts")
"""The parts of a balancer that hold state; a new balancer makes them anew, and they are filled."""

_CACHES = frozenset({("Fleet", name) for name in ("pools", "touched", "moved", "_outcasts")})
"""(class, attribute) of what fills again by itself."""

PLAIN: Final = frozenset({type(None), bool, int, float, str})
_REDACTED: Mapping[type, Callable[[Any], Any]] = {
    events.ActiveModel: lambda model: dataclasses.replace(model, entry=""),
    events.ModelInfo: lambda model: dataclasses.replace(model, digest="", modified_at="", entry=""),
    provision.Setback: lambda setback: dataclasses.replace(setback, why=cut_text(setback.why)),
    records.Failure: lambda failure: dataclasses.replace(failure, detail=cut_detail(failure.reason, failure.detail)),
}


def fields_of(cls: type) -> tuple[str, ...]:
    """Return the names of what instances of a class hold, in an order that does not change."""
    if dataclasses.is_dataclass(cls):
        return tuple(field.name for field in dataclasses.fields(cls))
    names = getattr(cls, "__mypyc_attrs__", None)  # a compiled class has these in the place of its slots
    if names is None:
        names = [name for base in cls.__mro__ for name in vars(base).get("__slots__", ())]
    return tuple(sorted(names))


def attributes(part: object) -> Iterator[tuple[str, Any]]:
    """Yield all that an object holds, by name, in the order of the names."""
    for name in sorted({*fields_of(type(part)), *getattr(part, "__dict__", ())}):
        yield name, getattr(part, name)


def _is_dispatch_table(value: object) -> bool:
    return isinstance(value, dict) and bool(value) and all(callable(item) for item in value.values())


def state_of(part: object, wiring: Iterable[object]) -> Iterator[tuple[str, Any]]:
    """Yield the attributes of a part that are its state: neither other parts, nor functions, nor caches."""
    for name, value in attributes(part):
        wired = any(value is other for other in wiring) or callable(value) or _is_dispatch_table(value)
        if not wired and (type(part).__name__, name) not in _CACHES:
            yield name, value


def parts_of(balancer: LoadBalancer) -> Iterator[tuple[str, object]]:
    """Yield what holds the state of a balancer, by name: itself and its parts."""
    yield "", balancer
    for name in _PARTS:
        yield name, getattr(balancer, name)


def wiring_of(balancer: LoadBalancer) -> list[object]:
    """Return what the parts of a balancer refer to each other by, which is no state."""
    return [balancer.config, balancer._out, *(part for _, part in parts_of(balancer))]  # noqa: SLF001


# --- writing -----------------------------------------------------------------------------------------------


def take(balancer: LoadBalancer) -> dict[str, Any]:
    """Return the state of a balancer, between two calls, as values that JSON can write.

    Raises SnapshotError for what is not known here: somebody has given the core state of a new kind.
    """
    encoder = _Encoder()
    settings = encoder.encode(balancer.config)
    wiring = wiring_of(balancer)
    parts = {}
    for name, part in parts_of(balancer):
        parts[name] = {key: encoder.encode(value) for key, value in state_of(part, wiring)}
    return {"classes": encoder.classes, "config": settings, "parts": parts}


class _Encoder:
    """Writes values; remembers which objects it has met."""

    def __init__(self) -> None:
        self.classes: dict[str, list[str]] = {}
        self._numbers: dict[object, int] = {}
        self._stats: list[records.ModelStats] = []  # equal ones are not the same one
        self._kinds: dict[type, Callable[[Any], Any]] = {
            list: self._items,
            tuple: lambda value: {"t": self._items(value)},
            dict: self._dict,
            MappingProxyType: self._dict,
            deque: lambda value: {"q": [value.maxlen, self._items(value)]},
            Random: lambda value: {"random": self.encode(value.getstate())},
        }

    def encode(self, value: Any) -> Any:
        """Return a value as JSON can write it."""
        kind = type(value)
        if kind in PLAIN:
            return value
        known = self._kinds.get(kind)
        if known is None:
            known = self._kinds[kind] = self._meet(kind)
        return known(value)

    def _items(self, values: Iterable[Any]) -> list[Any]:
        encode, plain = self.encode, PLAIN
        return [value if type(value) in plain else encode(value) for value in values]

    def _dict(self, value: Mapping[Any, Any]) -> dict[str, Any]:
        return {"d": [self._items(pair) for pair in value.items()]}

    def _meet(self, kind: type) -> Callable[[Any], Any]:
        """Return what writes the instances of a class that was not met before."""
        name = kind.__name__
        if CLASSES.get(name) is not kind:
            raise SnapshotError(f"a {kind.__module__}.{name} in the state of the core is not known to snapshots")
        if issubclass(kind, Enum):
            return {member: {"e": [name, member.name]} for member in kind}.__getitem__
        names = self.classes[name] = list(fields_of(kind))
        get = attrgetter(*names)  # of two or more: one alone would come without a tuple
        if len(names) < 2:
            raise SnapshotError(f"{name} holds less than two values")
        if kind in VALUES:
            redacted = _REDACTED.get(kind, _as_it_is)
            return lambda value: {"v": [name, self._items(get(redacted(value)))]}
        if kind is records.Server:
            return lambda value: self._shared(value, name, lambda server: _without_words(get(server), names))
        return lambda value: self._shared(value, name, get)

    def _shared(self, value: Any, name: str, get: Callable[[Any], tuple[Any, ...]]) -> Any:
        key = value
        if isinstance(value, records.ModelStats):
            index = next((i for i, known in enumerate(self._stats) if known is value), len(self._stats))
            if index == len(self._stats):
                self._stats.append(value)
            key = ("stats", index)
        number = self._numbers.get(key)
        if number is not None:
            return {"r": number}
        number = self._numbers[key] = len(self._numbers)
        return {"n": [name, number, self._items(get(value))]}


def _as_it_is(value: Any) -> Any:
    return value


def _without_words(values: tuple[Any, ...], names: list[str]) -> tuple[Any, ...]:
    index = names.index("last_error")
    words = values[index]
    return (*values[:index], cut_text(words) if isinstance(words, str) else words, *values[index + 1 :])


# --- reading -----------------------------------------------------------------------------------------------


def load(state: Any, placement_type: Callable[[config.Config, Any, Random], Placement] = Placement) -> LoadBalancer:
    """Return the balancer whose state was taken.

    Raises SnapshotError for what is not such a state, or is one of a version with other fields.
    """
    try:
        decoder = _Decoder(state["classes"])
        balancer = LoadBalancer(decoder.decode(state["config"]), Random(0), placement_type)
        parts = state["parts"]
        for name, part in parts_of(balancer):
            known = dict(attributes(part))
            for key, value in parts[name].items():
                if key not in known:
                    raise SnapshotError(f"{type(part).__name__} has no {key!r} in this version")
                put(part, key, decoder.decode(value, known[key]))
    except (AttributeError, IndexError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise SnapshotError(f"it is no state of a balancer ({type(error).__name__}: {error})") from error
    return balancer


def blank(cls: Any) -> Any:
    """Return an instance of a class that holds nothing yet."""
    return cls.__new__(cls)  # `object.__new__` makes none of a compiled class


def put(owner: object, name: str, value: object) -> None:
    """Set an attribute, whatever its owner says."""
    object.__setattr__(owner, name, value)  # settings and events are frozen for all others


class _Decoder:
    """Reads what `_Encoder` wrote.

    What a new balancer has already is filled, not replaced: its parts may have it from each other.
    """

    def __init__(self, classes: Mapping[str, list[str]]) -> None:
        self._fields: dict[str, list[str]] = {}
        for name, fields in classes.items():
            cls = CLASSES.get(name)
            if cls is None or set(fields) != set(fields_of(cls)):
                raise SnapshotError(f"{name} has other fields in this version")
            self._fields[name] = fields
        self._objects: dict[int, object] = {}

    def decode(self, encoded: Any, existing: Any = None) -> Any:
        """Return a value; `existing` is filled with it where that can be."""
        if type(encoded) in PLAIN:
            return encoded
        if isinstance(encoded, list):
            items = [self.decode(item) for item in encoded]
            if isinstance(existing, list):
                existing[:] = items
                return existing
            return items
        ((tag, body),) = encoded.items()
        return self._decoders[tag](self, body, existing)

    def _tuple(self, body: Any, existing: Any) -> tuple[Any, ...]:
        if isinstance(existing, tuple) and len(existing) == len(body):
            return tuple([self.decode(item, old) for item, old in zip(body, existing, strict=True)])
        return tuple([self.decode(item) for item in body])

    def _dict(self, body: Any, existing: Any) -> dict[Any, Any]:
        result: dict[Any, Any] = existing if isinstance(existing, dict) else {}
        result.clear()
        for key, value in body:
            result[self.decode(key)] = self.decode(value)
        return result

    def _deque(self, body: Any, _: Any) -> deque[Any]:
        maxlen, items = body
        return deque([self.decode(item) for item in items], maxlen)

    def _random(self, body: Any, existing: Any) -> Random:
        result = existing if isinstance(existing, Random) else Random(0)
        result.setstate(self.decode(body))
        return result

    def _enum(self, body: Any, _: Any) -> Enum:
        name, member = body
        cls = CLASSES[name]
        if not issubclass(cls, Enum):
            raise SnapshotError(f"{name} is no enumeration")
        return cls[member]

    def _value(self, body: Any, _: Any) -> object:
        name, fields = body
        value = blank(CLASSES[name])
        self._fill(value, name, fields)
        return value

    def _numbered(self, body: Any, existing: Any) -> object:
        name, number, fields = body
        value = existing if type(existing) is CLASSES[name] else blank(CLASSES[name])
        self._objects[number] = value
        self._fill(value, name, fields)
        return value

    def _fill(self, value: Any, name: str, fields: list[Any]) -> None:
        for key, field in zip(self._fields[name], fields, strict=True):
            put(value, key, self.decode(field, getattr(value, key, None)))

    def _reference(self, number: Any, _: Any) -> object:
        return self._objects[number]

    _decoders: Mapping[str, Callable[[_Decoder, Any, Any], Any]] = {
        "t": _tuple,
        "d": _dict,
        "q": _deque,
        "random": _random,
        "e": _enum,
        "v": _value,
        "n": _numbered,
        "r": _reference,
    }
