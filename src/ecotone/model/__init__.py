"""torch.nn.Module <-> Graph and runnable segments: capture, cutting, and the checked form in which a segment travels."""

from ecotone.model.capture import Captured, capture
from ecotone.model.errors import ModelError
from ecotone.model.segment import Segment, TensorSpec

__all__ = ["Captured", "ModelError", "Segment", "TensorSpec", "capture"]
