"""torch.nn.Module <-> Graph and runnable segments: capture, cutting, and the checked form in which a segment travels."""

from ecotone.model.capture import Captured, capture
from ecotone.model.errors import ModelError
from ecotone.model.load import LoadedModel, Preprocess, load_model, parse_shape
from ecotone.model.segment import Segment, TensorSpec

__all__ = [
    "Captured", "LoadedModel", "ModelError", "Preprocess", "Segment", "TensorSpec", "capture", "load_model", "parse_shape",
]  # fmt: skip
