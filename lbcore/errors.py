"""Errors of the core. Wrong input from the world is an event, not an exception; these are for wrong callers."""

from __future__ import annotations


class CoreError(Exception):
    """Something that only a defect in the driver can cause."""


class UnknownEventError(CoreError):
    """`handle` was given something that is not an event."""


class InvariantError(CoreError):
    """The audit of `lbcore.invariants` found the state inconsistent."""
