"""The one error of this folder."""

from __future__ import annotations

from ecotone.units import EcotoneError

__all__ = ["ModelError"]


class ModelError(EcotoneError):
    """A model cannot be loaded, captured, cut or rebuilt: what was wrong, where, and what to do, on one line."""
