"""A model by name: `package.module:callable`, `path/file.py:callable`, a local `.pt2`, a Hugging Face directory or hub id.

The callable (or attribute) gives a torch.nn.Module, or (module, example args) or (module, example args, example kwargs),
or an object with `.module`, `.example_inputs` and, if it likes, `.labels`, `.preprocess` and `.exits` (a file).

Trust: naming a Python file runs it, and a `.pt2` is read by torch.export.load, so both are for your own files; nothing here
is ever called with a name that came over the network. Hugging Face weights are read as safetensors only, and remote code is
never run.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import inspect
import json
import logging
import os
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from ecotone.model.errors import ModelError

__all__ = ["LoadedModel", "Preprocess", "load_model", "parse_shape"]

TEXT_LENGTH = 32  # tokens of an example text


@dataclass(frozen=True, slots=True, kw_only=True)
class Preprocess:
    """How a picture becomes an input: resized to (height, width), scaled to 0..1, then (x - mean) / std per channel."""

    height: int
    width: int
    mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    std: tuple[float, ...] = (1.0, 1.0, 1.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel:
    """A module in eval mode and what it takes; `args` and `kwargs` are example inputs, () and {} where unknown."""

    name: str
    module: torch.nn.Module
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    labels: tuple[str, ...] = ()
    preprocess: Preprocess | None = None
    tokenizer: str = ""  # directory or hub id to load a tokenizer from
    exits: str = ""  # file of early exits that the model brings


def load_model(name: str, *, input_shape: str | tuple[int, ...] = ()) -> LoadedModel:
    """Load the model that `name` names; `input_shape` ("3x224x224", one item without the batch) replaces its example inputs.

    Raises ModelError, one line with the remedy, for whatever is missing or does not fit.
    """
    shape = parse_shape(input_shape) if isinstance(input_shape, str) else tuple(input_shape)
    path = Path(name)
    if name.endswith(".pt2"):
        loaded = _load_exported(path)
    elif ":" in name:
        source, _, attribute = name.rpartition(":")
        loaded = _load_python(name, source, attribute)
    elif name.endswith(".py"):
        raise ModelError(f"{name}: names no callable in the file; write for example {name}:model")
    elif path.is_dir() or _looks_like_hub(name):
        loaded = _load_hugging_face(name)
    else:
        raise ModelError(
            f"{name}: no such model; write package.module:callable, file.py:callable, file.pt2, or a model directory"
        )
    with contextlib.suppress(NotImplementedError):  # a module out of a .pt2 has no modes
        loaded.module.eval()
    if shape:
        return LoadedModel(
            name=loaded.name, module=loaded.module, args=(torch.rand(1, *shape),), labels=loaded.labels,
            preprocess=loaded.preprocess, tokenizer=loaded.tokenizer, exits=loaded.exits,
        )  # fmt: skip
    return loaded


def parse_shape(text: str) -> tuple[int, ...]:
    """ "3x224x224" -> (3, 224, 224); "" -> (); raises ModelError for anything else."""
    if not text:
        return ()
    parts = re.split(r"[x×,]", text.lower())
    if not all(part.strip().isdigit() and int(part) > 0 for part in parts) or len(parts) > 6:
        raise ModelError(f'input shape "{text}" is not one; write one item without the batch, for example 3x224x224')
    return tuple(int(part) for part in parts)


def _load_python(name: str, source: str, attribute: str) -> LoadedModel:
    module = _import_file(source) if source.endswith(".py") else _import_name(source)
    found: Any = module
    for part in attribute.split("."):
        if not hasattr(found, part):
            known = sorted(key for key, value in vars(module).items() if callable(value) and not key.startswith("_"))
            raise ModelError(f"{name}: {source} has no {attribute!r}; it has {', '.join(known[:12]) or 'nothing callable'}")
        found = getattr(found, part)
    if not isinstance(found, torch.nn.Module) and callable(found):
        if _needs_arguments(found):
            raise ModelError(f"{name}: needs arguments; name a function without any that returns the model")
        found = _running(name, found)
    return _understand(name, found)


def _needs_arguments(function: Any) -> bool:
    try:
        inspect.signature(function).bind()
    except TypeError:
        return True
    except ValueError:  # a builtin that does not tell
        return False
    return False


def _understand(name: str, found: Any) -> LoadedModel:
    """What a callable gave, in the forms of the convention."""
    module, args, kwargs = found, (), {}  # type: Any, Any, dict[str, Any]
    labels: tuple[str, ...] = ()
    preprocess: Any = None
    if isinstance(found, tuple) and 2 <= len(found) <= 3:
        module, args, kwargs = found[0], found[1], (dict(found[2]) if len(found) == 3 else {})
    elif hasattr(found, "module") and hasattr(found, "example_inputs"):
        module, args = found.module, found.example_inputs
        labels, preprocess = tuple(getattr(found, "labels", ()) or ()), getattr(found, "preprocess", None)
    if not isinstance(module, torch.nn.Module):
        kind = type(module).__name__
        raise ModelError(f"{name}: gives a {kind}, not a torch.nn.Module; return a module, or (module, example args)")
    if isinstance(args, dict):
        args, kwargs = (), dict(args)
    args = (args,) if isinstance(args, torch.Tensor) else tuple(args)
    if isinstance(preprocess, dict):
        fields = preprocess
        preprocess = _running(name, lambda: Preprocess(**fields))
    return LoadedModel(
        name=name, module=module, args=args, kwargs=kwargs, labels=labels, preprocess=preprocess,
        exits=str(getattr(found, "exits", "") or ""),
    )  # fmt: skip


def _import_file(source: str) -> ModuleType:
    path = Path(source)
    if not path.is_file():
        raise ModelError(f"{source}: no such file; give the path of a Python file, as in models/net.py:build")
    unique = f"ecotone_user_{path.stem}_{abs(hash(str(path.resolve())))}"
    spec = importlib.util.spec_from_file_location(unique, path)
    if spec is None or spec.loader is None:
        raise ModelError(f"{source}: cannot be read as a Python file; check its name")
    module = importlib.util.module_from_spec(spec)
    sys.modules[unique] = module  # dataclasses and pickling of its classes look it up
    with _search_path(str(path.resolve().parent)):
        _running(source, lambda: spec.loader.exec_module(module))  # type: ignore[union-attr]
    return module


def _import_name(source: str) -> ModuleType:
    if not all(part.isidentifier() for part in source.split(".")):
        raise ModelError(
            f"{source}: is neither a module name nor a Python file; write package.module:callable or file.py:callable"
        )
    with _search_path(os.getcwd()):
        try:
            missing = importlib.util.find_spec(source) is None
        except (ImportError, ValueError, AttributeError):
            missing = True
        if missing:
            raise ModelError(
                f"{source}: no such module; check its name, or install it beside ecotone, or give a file.py:callable"
            )
        return _running(source, lambda: importlib.import_module(source))  # type: ignore[no-any-return]


@contextlib.contextmanager
def _search_path(folder: str) -> Iterator[None]:
    if folder in sys.path:
        yield
        return
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(folder)


def _running(name: str, action: Callable[[], Any]) -> Any:
    """The result of the user's own code; its exceptions become one line with their place."""
    try:
        return action()
    except ModelError:
        raise
    except (Exception, SystemExit) as error:
        mismatched = _mismatched(str(error))
        if mismatched:
            raise ModelError(f"{name}: {mismatched}") from error
        frame = traceback.extract_tb(error.__traceback__)[-1]
        text = " ".join(str(error).split())[:200]
        place = f"{Path(frame.filename).name}:{frame.lineno}"
        if isinstance(error, SyntaxError):
            place = f"{Path(error.filename or name).name}:{error.lineno}"
        raise ModelError(f"{name}: raised {type(error).__name__} at {place}: {text}; mend it, then try again") from error


def _mismatched(text: str) -> str:
    """ "mismatched weights: ..." naming the tensors, out of what load_state_dict says; "" for other errors."""
    if "size mismatch for" not in text and "key(s) in state_dict" not in text:
        return ""
    shapes = re.findall(r"size mismatch for ([\w.]+)", text)
    keys = [key for line in re.findall(r"key\(s\) in state_dict: ([^\n]*)", text) for key in re.findall(r'"([\w.]+)"', line)]
    return _name_tensors([*shapes, *keys])


def _name_tensors(names: list[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return f"mismatched weights: {', '.join(names[:5])}{more}; load the weights that belong to this model and configuration"


def _load_exported(path: Path) -> LoadedModel:
    if not path.is_file():
        raise ModelError(f"{path}: no such file; make one with torch.export.save(torch.export.export(model, args), path)")
    try:
        with warnings.catch_warnings(), _silent("torch.export"):
            warnings.simplefilter("ignore")
            program = torch.export.load(path)
    except Exception as error:
        text = " ".join(str(error).split())[:160]
        remedy = "export the model again with this version of torch"
        raise ModelError(f"{path}: is not an exported program ({type(error).__name__}: {text}); {remedy}") from error
    args, kwargs = program.example_inputs or ((), {})
    return LoadedModel(name=path.stem, module=program.module(), args=tuple(args), kwargs=dict(kwargs))


def _looks_like_hub(name: str) -> bool:
    return re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) is not None and not name.startswith((".", "/"))


def _load_hugging_face(name: str) -> LoadedModel:
    try:
        transformers = importlib.import_module("transformers")
    except ImportError:
        raise ModelError(
            f"{name}: Hugging Face models need transformers; install it with: pip install 'ecotone[hub]'"
        ) from None
    if Path(name).is_dir() and not (Path(name) / "config.json").is_file():
        raise ModelError(f"{name}: the directory has no config.json; save the model there with model.save_pretrained")
    with _quiet(transformers):
        config = _from_hub(name, lambda: transformers.AutoConfig.from_pretrained(name, trust_remote_code=False))
        architecture = (getattr(config, "architectures", None) or [""])[0]
        maker = getattr(transformers, architecture, None) or transformers.AutoModel
        for key in ("use_cache", "output_attentions", "output_hidden_states"):
            if hasattr(config, key):
                setattr(config, key, False)
        model, report = _from_hub(
            name, lambda: maker.from_pretrained(
                name, config=config, use_safetensors=True, output_loading_info=True, dtype=torch.float32,
                ignore_mismatched_sizes=True,  # to be named below
            ),
        )  # fmt: skip
    broken = sorted(
        {
            str(key[0] if isinstance(key, tuple) else key)
            for kind in ("mismatched_keys", "missing_keys")
            for key in report.get(kind) or ()
        }
    )
    if broken:
        raise ModelError(f"{name}: {_name_tensors(broken)}")
    args, kwargs = _example_call(model, config)
    labels = _labels(config)
    text = getattr(model, "main_input_name", "") == "input_ids"
    return LoadedModel(
        name=Path(name).name, module=model, args=args, kwargs=kwargs, labels=labels,
        preprocess=_preprocess(name, config), tokenizer=name if text else "",
    )  # fmt: skip


@contextlib.contextmanager
def _quiet(transformers: ModuleType) -> Iterator[None]:
    """Loading writes reports and bars on the terminal; ours is one line or nothing."""
    log = transformers.utils.logging
    level, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity(50)
    log.disable_progress_bar()
    with warnings.catch_warnings(), _silent("huggingface_hub"):
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            log.set_verbosity(level)
            if bars:
                log.enable_progress_bar()


@contextlib.contextmanager
def _silent(logger: str) -> Iterator[None]:
    """No records of this logger and those below it."""
    loggers = [logging.getLogger(name) for name in (logger, *logging.root.manager.loggerDict) if name.startswith(logger)]
    levels = [(log, log.level) for log in loggers]
    try:
        for log in loggers:
            log.setLevel(logging.CRITICAL + 1)
        yield
    finally:
        for log, level in levels:
            log.setLevel(level)


def _from_hub(name: str, action: Callable[[], Any]) -> Any:
    try:
        return action()
    except (Exception, SystemExit) as error:
        text = " ".join(str(error).split())
        mismatched = _mismatched(str(error))
        if mismatched:
            raise ModelError(f"{name}: {mismatched}") from error
        if Path(name).is_dir():
            raise ModelError(
                f"{name}: cannot be loaded ({text[:200]}); it must hold config.json and model.safetensors"
            ) from error
        remedy = "check the id and the connection, or give a local directory, file.py:callable or package.module:callable"
        raise ModelError(f"{name}: no such local model, and the hub did not give it ({text[:160]}); {remedy}") from error


def _example_call(model: Any, config: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Example inputs of the shapes that the configuration states."""
    main = getattr(model, "main_input_name", "input_ids")
    if main == "pixel_values":
        height, width = _image_size(config)
        return (torch.rand(1, getattr(config, "num_channels", 3), height, width),), {}
    if main != "input_ids":
        return (), {}
    vocabulary = int(getattr(config, "vocab_size", 100))
    length = min(TEXT_LENGTH, int(getattr(config, "max_position_embeddings", TEXT_LENGTH)) - 2)
    ids = torch.arange(3, 3 + length).remainder(vocabulary).unsqueeze(0)
    kwargs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if getattr(config, "is_encoder_decoder", False):
        kwargs["decoder_input_ids"] = ids[:, : max(1, length // 2)]
    return (), kwargs


def _image_size(config: Any) -> tuple[int, int]:
    size = getattr(config, "image_size", None) or 224
    return (int(size[0]), int(size[1])) if isinstance(size, list | tuple) else (int(size), int(size))


def _labels(config: Any) -> tuple[str, ...]:
    table = getattr(config, "id2label", None) or {}
    return tuple(str(table[key]) for key in sorted(table, key=int))


def _preprocess(name: str, config: Any) -> Preprocess | None:
    """From the directory's preprocessor_config.json; None where there is none or it says something else."""
    path = Path(name) / "preprocessor_config.json"
    if not path.is_file():
        return None
    try:
        document = json.loads(path.read_text())
        size = document.get("crop_size") or document.get("size") or {}
        size = {"height": size, "width": size} if isinstance(size, int) else size
        edge = size.get("shortest_edge")
        height, width = _image_size(config)
        return Preprocess(
            height=int(size.get("height", edge or height)), width=int(size.get("width", edge or width)),
            mean=tuple(map(float, document.get("image_mean") or (0.0, 0.0, 0.0))),
            std=tuple(map(float, document.get("image_std") or (1.0, 1.0, 1.0))),
        )  # fmt: skip
    except (ValueError, TypeError, AttributeError) as error:
        raise ModelError(f"{path}: cannot be read ({str(error)[:100]}); mend or remove it") from None
