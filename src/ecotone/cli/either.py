"""Two commands under one name: which of them runs is seen from what is given. Their options and helps are put together."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any, get_args

from ecotone.units import EcotoneError

__all__ = ["either"]


def either(
    one: Callable[..., None], other: Callable[..., None], is_other: Callable[[Mapping[str, Any]], bool], what: str
) -> Callable[..., None]:
    """The command `one`, with the options that only `other` has; it is `other` where `is_other(given)` says so.

    Options that one of the two does not have are refused where the other is asked for; `what` names in the refusal what
    makes the difference ("--workload", "a language model").
    """
    ours, theirs = (inspect.signature(f, eval_str=True).parameters for f in (one, other))
    added = {name: p.replace(kind=p.KEYWORD_ONLY) for name, p in theirs.items() if name not in ours}
    for name, p in added.items():
        if p.default is p.empty:
            added[name] = p.replace(default=None)

    @wraps(one)
    def command(**given: Any) -> None:
        is_theirs = is_other(given)
        known = theirs if is_theirs else ours
        foreign = [p for name, p in {**ours, **added}.items() if name not in known and given[name] != p.default]
        if foreign:
            names = ", ".join(_option(p) for p in foreign)
            raise EcotoneError(f"{names}: does not go with {what}" if is_theirs else f"{names}: needs {what}")
        (other if is_theirs else one)(**{name: given[name] for name in known})

    merged = [p.replace(kind=p.KEYWORD_ONLY) for p in {**ours, **added}.values()]
    del command.__wrapped__
    command.__signature__ = inspect.Signature(merged)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in merged}
    command.__doc__ = f"{inspect.getdoc(one) or ''}\n\n{inspect.getdoc(other) or ''}"
    return command


def _option(parameter: inspect.Parameter) -> str:
    """The name of a parameter's option on the command line."""
    stated = [str(getattr(info, "default", "")) for info in get_args(parameter.annotation)[1:]]
    return next((text for text in stated if text.startswith("--")), "--" + parameter.name.replace("_", "-"))
