"""What a compiler of the core must be told about its classes. Plain Python takes no notice of it.

`allow_interpreted_subclasses` is for classes of which others are derived outside of the compiled modules, and for those
that snapshots and forks make without `__init__`. mypyc knows `mypyc_attr` by its name in mypy_extensions, and finds it
there by way of `compiling.pyi`: nothing of it is needed at run time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

_ClassT = TypeVar("_ClassT", bound=type)


def mypyc_attr(**_: bool) -> Callable[[_ClassT], _ClassT]:
    """Return a decorator that leaves a class as it is."""
    return _as_it_is


def _as_it_is(cls: _ClassT) -> _ClassT:
    return cls
