"""What nodes say to one another, as immutable values. How they become bytes is ecotone.codec.frame and ecotone.wire."""

from __future__ import annotations

import enum
from typing import NewType

__all__ = ["NodeId", "Priority"]

NodeId = NewType("NodeId", str)


class Priority(enum.IntEnum):
    """Control overtakes tensors on every link."""

    CONTROL = 0
    DATA = 1
    BACKGROUND = 2  # weights
