"""From an item of a source (image, array, text) to what the model takes, and from its outputs to named arrays.

Images are resized to the captured size and scaled as the model's Preprocess says (pixels in 0..1 without one). Arrays are
taken as they are, with a batch of one added where it is missing. Texts go through the model's own tokenizer ([hub]).
"""

from __future__ import annotations

import concurrent.futures
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils import _pytree as pytree

from ecotone.codec import ImageSpec
from ecotone.graph import Graph, Tensor
from ecotone.model import Captured, LoadedModel, Preprocess
from ecotone.runtime import Session
from ecotone.serving.oip import InputSpec
from ecotone.serving.sources import Item
from ecotone.units import EcotoneError

__all__ = ["Preparation", "PrepareError", "Prepared", "to_numpy"]

DATATYPE_OF = {
    "float64": "FP64", "float32": "FP32", "float16": "FP16", "bfloat16": "FP32",
    "int64": "INT64", "int32": "INT32", "int16": "INT16", "int8": "INT8", "uint8": "UINT8", "bool": "BOOL",
}  # fmt: skip


class PrepareError(EcotoneError):
    """An item that does not fit the model."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """The arguments of one call."""

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] | None = None


class Preparation:
    """How inputs reach one captured model."""

    def __init__(
        self, captured: Captured, preprocess: Preprocess | None = None, tokenizer: Any = None, labels: Sequence[str] = ()
    ):
        self.captured, self.preprocess, self.tokenizer, self.labels = captured, preprocess, tokenizer, tuple(labels)

    @staticmethod
    def of(loaded: LoadedModel, captured: Captured) -> Preparation:
        """The preparation that the loaded model asks for; its tokenizer is read when the first text comes."""
        return Preparation(captured, loaded.preprocess, loaded.tokenizer or None, loaded.labels)

    @property
    def image(self) -> ImageSpec | None:
        """How pixels became the input, where the model's first input is a picture."""
        inputs = self.captured.graph.inputs
        shape = self.captured.graph.tensors[inputs[0]].shape if len(inputs) == 1 else ()
        if len(shape) != 4 or shape[1] not in (1, 3):
            return None
        return ImageSpec(mean=self.preprocess.mean, std=self.preprocess.std) if self.preprocess else ImageSpec()

    def prepare(self, item: Item) -> Prepared:
        """The call for `item`; raises PrepareError saying what the model takes."""
        if item.kind == "text":
            return Prepared((), self._text(item))
        tensor = self._picture(item) if item.kind == "image" else self._array(item)
        return Prepared(*self.captured.unflatten_inputs((tensor,)))  # by position or by name, as captured

    def flat(self, item: Item) -> tuple[torch.Tensor, ...]:
        """The same as tensors in the order of graph.inputs."""
        prepared = self.prepare(item)
        return self.captured.flatten_inputs(prepared.args, prepared.kwargs)

    def outputs(self, result: Any) -> dict[str, np.ndarray]:
        """The model's return value as named arrays, in the order of graph.outputs."""
        leaves = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        return {spec.name: to_numpy(leaf) for spec, leaf in zip(self.output_specs(), leaves, strict=True)}

    def input_specs(self) -> tuple[InputSpec, ...]:
        """The model's inputs as the HTTP protocol names them."""
        return _specs(self.captured.graph, self.captured.graph.inputs)

    def output_specs(self) -> tuple[InputSpec, ...]:
        """The model's outputs likewise."""
        return _specs(self.captured.graph, self.captured.graph.outputs)

    def submit(
        self, session: Session, tensors: Sequence[torch.Tensor], deadline_s: float | None, request_id: str | None = None
    ) -> concurrent.futures.Future[Any]:
        """Hand flat tensors to `session`; the future ends with flat outputs in the order of graph.outputs."""
        args, kwargs = self.captured.unflatten_inputs(tensors)
        inner = session.submit(args, kwargs, deadline_s=deadline_s, request_id=request_id)
        outer: concurrent.futures.Future[Any] = concurrent.futures.Future()
        outer.session_future = inner  # type: ignore[attr-defined]  # what cancel needs

        def finish(done: concurrent.futures.Future[Any]) -> None:
            error = done.exception()
            if error is not None:
                outer.set_exception(error)
            else:
                outer.set_result([x for x in pytree.tree_leaves(done.result()) if isinstance(x, torch.Tensor)])

        inner.add_done_callback(finish)
        return outer

    def _only_input(self, item: Item) -> Tensor:
        inputs = self.captured.graph.inputs
        if len(inputs) != 1:
            names = ", ".join(self.captured.graph.tensors[i].name for i in inputs)
            raise PrepareError(
                f"input {item.name}: one {item.kind} for a model of {len(inputs)} inputs ({names}); use Python or HTTP"
            )
        return self.captured.graph.tensors[inputs[0]]

    def _picture(self, item: Item) -> torch.Tensor:
        """(height, width, 3) uint8 -> [1, channels, H, W] float32."""
        spec = self._only_input(item)
        if len(spec.shape) != 4 or spec.shape[1] not in (1, 3):
            raise PrepareError(f"input {item.name}: is an image, the model takes {list(spec.shape)}")
        image = Image.fromarray(np.asarray(item.value)).convert("RGB" if spec.shape[1] == 3 else "L")
        size = (spec.shape[3], spec.shape[2])
        if image.size != size:
            image = image.resize(size, Image.Resampling.BILINEAR)
        pixels = torch.from_numpy(np.array(image)).reshape(size[1], size[0], spec.shape[1])
        x = pixels.permute(2, 0, 1).float().div_(255.0)
        if self.preprocess is not None:
            mean, std = (
                torch.tensor(v)[: spec.shape[1]].reshape(-1, 1, 1) for v in (self.preprocess.mean, self.preprocess.std)
            )
            x = (x - mean) / std
        return x.contiguous()[None].to(getattr(torch, spec.dtype))

    def _array(self, item: Item) -> torch.Tensor:
        spec = self._only_input(item)
        array = np.asarray(item.value)
        if array.ndim == len(spec.shape) - 1:
            array = array[None]
        same = array.ndim == len(spec.shape) and all(
            i in spec.dynamic_dims or a == b for i, (a, b) in enumerate(zip(array.shape, spec.shape, strict=True))
        )
        kind = "f" if spec.dtype.startswith(("float", "bfloat")) else "b" if spec.dtype == "bool" else "iu"
        if not same or array.dtype.kind not in kind:
            wanted = f"{list(spec.shape)} {spec.dtype}"
            raise PrepareError(f"input {item.name}: array {list(array.shape)} {array.dtype}, the model takes {wanted}")
        return torch.from_numpy(np.array(array)).to(getattr(torch, spec.dtype))

    def _text(self, item: Item) -> dict[str, Any]:
        """The tokenizer's tensors that the model takes, padded or cut to the captured length."""
        tokenizer = self._load_tokenizer(item)
        names = [self.captured.graph.tensors[i].name for i in self.captured.graph.inputs]
        length = self.captured.graph.tensors[self.captured.graph.inputs[0]].shape[-1]
        made = tokenizer(item.value, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
        _, wanted = self.captured.unflatten_inputs(self.captured.example_inputs)
        missing = [name for name in wanted if name not in made]
        if missing or not wanted:
            raise PrepareError(
                f"input {item.name}: the tokenizer gives {', '.join(made)}, the model takes {', '.join(names)}"
            )
        return {name: made[name] for name in wanted}

    def _load_tokenizer(self, item: Item) -> Any:
        if self.tokenizer is None:
            raise PrepareError(
                f"input {item.name}: is text, but the model brings no tokenizer; give arrays (.npy), or a model directory"
            )
        if isinstance(self.tokenizer, str):
            try:
                from transformers import AutoTokenizer
            except ImportError:
                raise PrepareError('texts need tokenizers; install them with  pip install "ecotone[hub]"') from None
            try:
                self.tokenizer = AutoTokenizer.from_pretrained(self.tokenizer)
            except (OSError, ValueError) as error:
                raise PrepareError(f"tokenizer of {self.tokenizer}: {' '.join(str(error).split())[:200]}") from None
        return self.tokenizer


def _specs(graph: Graph, indices: Sequence[int]) -> tuple[InputSpec, ...]:
    specs, seen = [], dict[str, int]()
    for index in indices:
        tensor = graph.tensors[index]
        count = seen[tensor.name] = seen.get(tensor.name, 0) + 1
        name = tensor.name if count == 1 else f"{tensor.name}#{count}"
        shape = tuple(-1 if i in tensor.dynamic_dims else size for i, size in enumerate(tensor.shape))
        specs.append(InputSpec(name=name, datatype=DATATYPE_OF[tensor.dtype], shape=shape))
    return tuple(specs)


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    """The tensor as an array; bfloat16, which numpy lacks, as float32."""
    tensor = tensor.detach().cpu()
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
