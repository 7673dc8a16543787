"""Fault scripts as TOML: what happens to which device or link, and when. Reads and writes them; does nothing itself.

    [[fault]]                       verbs and their options (times and rates are text with units; `for` undoes it later):
    at = "1.2 s"                    kill = DEVICE (detect)          restart = DEVICE
    kill = "edge1"                  stall = DEVICE                  resume = DEVICE
    for = "2 s"                     cut = [A, B] (detect, one_way)  heal = [A, B] or "all"
                                    partition = [A, ...] (detect)   link = [A, B] (rate, latency, one_way)
    trace = [A, B] (file, one_way)  frames = [A, B] (drop, duplicate, truncate: shares; late; one_way)
    slow = DEVICE (factor)          clock = DEVICE (step, drift)    disk_full = DEVICE (on)
    fail_work = DEVICE (kinds)      garble = DEVICE (on)            prepare = DEVICE (takes, error)
    replan = FILE                   switch = EPOCH

Every violation of a file is named at once, by number of fault.
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ecotone import schema
from ecotone.cluster import DeviceId, Link
from ecotone.linktrace import LinkTrace, load_trace
from ecotone.plan import Plan
from ecotone.planset import PlanSet
from ecotone.simulator import faults as ft
from ecotone.simulator.faults import Fault
from ecotone.units import EcotoneError, parse_quantity

__all__ = ["read_faults", "read_script", "write_script"]

_S, _RATE = "s", "bytes_per_s"
_OPTIONS: dict[str, dict[str, str]] = {  # verb -> option -> unit, or "number", "bool", "text", "texts"
    "kill": {"detect": _S, "for": _S},
    "restart": {},
    "stall": {"for": _S},
    "resume": {},
    "cut": {"detect": _S, "one_way": "bool", "for": _S},
    "heal": {},
    "partition": {"detect": _S, "for": _S},
    "link": {"rate": _RATE, "latency": _S, "one_way": "bool"},
    "trace": {"file": "text", "one_way": "bool"},
    "frames": {"drop": "number", "duplicate": "number", "truncate": "number", "late": _S, "one_way": "bool", "for": _S},
    "slow": {"factor": "number", "for": _S},
    "clock": {"step": _S, "drift": "number", "for": _S},
    "disk_full": {"on": "bool", "for": _S},
    "fail_work": {"kinds": "texts", "for": _S},
    "garble": {"on": "bool", "for": _S},
    "prepare": {"takes": _S, "error": "text", "for": _S},
    "replan": {},
    "switch": {},
}
_NEEDED = {"link": ("rate", "latency"), "trace": ("file",), "slow": ("factor",)}
_PAIRS = ("cut", "link", "trace", "frames")
LoadPlan = Callable[[str], Plan | PlanSet]


@dataclass(frozen=True, slots=True)
class _Entry:
    verb: str
    subject: Any
    at_s: float
    options: Mapping[str, Any]

    @property
    def pair(self) -> tuple[DeviceId, DeviceId]:
        return DeviceId(self.subject[0]), DeviceId(self.subject[1])

    @property
    def pairs(self) -> list[tuple[DeviceId, DeviceId]]:
        """Both directions, or the one that is meant."""
        one, other = self.pair
        return [(one, other)] if self.options.get("one_way") else [(one, other), (other, one)]


def read_script(
    text: str,
    devices: tuple[str, ...],
    where: str = "script of faults",
    *,
    load: Callable[[str], LinkTrace] = load_trace,
    load_plan: LoadPlan | None = None,
) -> tuple[Fault, ...]:
    """The faults of a TOML text, in order of time; raises SchemaError that names every violation."""
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise schema.SchemaError(where, [f"not TOML: {error}"]) from None
    entries = document.pop("fault", [])
    schema.check(where, [f'unknown key "{key}"; a script holds [[fault]] tables' for key in document])
    return read_faults(entries, devices, where, load=load, load_plan=load_plan)


def read_faults(
    entries: Any,
    devices: tuple[str, ...],
    where: str,
    *,
    load: Callable[[str], LinkTrace] = load_trace,
    load_plan: LoadPlan | None = None,
) -> tuple[Fault, ...]:
    """The faults of [[fault]] tables, in order of time; raises SchemaError that names every violation."""
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise schema.SchemaError(where, ["write each fault as a table [[fault]]"])
    violations: list[str] = []
    script: list[Fault] = []
    for number, table in enumerate(entries, 1):
        try:
            for fault in _faults(_entry(table), load, load_plan):
                violations += [f"fault {number}: {found}" for found in ft.violations_of(fault, devices)]
                script.append(fault)
        except EcotoneError as error:
            violations.append(f"fault {number}: {error}")
    schema.check(where, violations)
    return tuple(sorted(script, key=lambda fault: fault.at_s))


def _entry(table: Mapping[str, Any]) -> _Entry:
    verbs = [key for key in table if key in _OPTIONS]
    if len(verbs) != 1:
        found = " and ".join(verbs) or f"none in {', '.join(table) or 'an empty table'}"
        raise EcotoneError(f"needs one verb, found {found}; verbs are {', '.join(_OPTIONS)}")
    verb = verbs[0]
    known = {"at": _S, **_OPTIONS[verb]}
    for key in table:
        if key != verb and key not in known:
            raise EcotoneError(f'{verb} has no option "{key}"; options are {", ".join(known)}')
    missing = [key for key in ("at", *_NEEDED.get(verb, ())) if key not in table]
    if missing:
        raise EcotoneError(f"{verb} needs {' and '.join(missing)}")
    options = {key: _value(table[key], kind, key) for key, kind in known.items() if key in table}
    at_s = options.pop("at")
    if options.get("for", 1.0) <= 0:
        raise EcotoneError(f"for is {options['for']} s, must be above zero")
    return _Entry(verb, _subject(verb, table[verb]), at_s, options)


def _value(value: Any, kind: str, key: str) -> Any:
    if kind in (_S, _RATE):
        if not isinstance(value, str):
            raise EcotoneError(f'{key} is {value!r}; write it with its unit, for example {key} = "1.5 s"')
        return parse_quantity(value, kind, key)
    right = {"number": (int, float), "bool": bool, "text": str, "texts": list}[kind]
    if not isinstance(value, right) or (kind == "number" and isinstance(value, bool)):  # type: ignore[arg-type]
        raise EcotoneError(f"{key} is {value!r}, must be {kind}")
    return value


def _subject(verb: str, value: Any) -> Any:
    texts = isinstance(value, list) and all(isinstance(item, str) for item in value)
    if verb in _PAIRS or (verb == "heal" and value != "all"):
        right, wanted = texts and len(value) == 2, "two devices"
    elif verb == "partition":
        right, wanted = texts and bool(value), "a list of devices"
    elif verb == "switch":
        right, wanted = isinstance(value, int) and not isinstance(value, bool), "the number of an epoch"
    else:
        right, wanted = isinstance(value, str), "a name"
    if not right:
        raise EcotoneError(f"{verb} is {value!r}, must be {wanted}")
    return value


def _faults(entry: _Entry, load: Callable[[str], LinkTrace], load_plan: LoadPlan | None) -> list[Fault]:
    if entry.verb in _PAIRS or entry.verb in ("heal", "partition"):
        return _link_faults(entry, load)
    if entry.verb == "replan":
        if load_plan is None:
            raise EcotoneError("replan: plans cannot be read here")
        return [ft.Replan(at_s=entry.at_s, plan=load_plan(entry.subject))]
    if entry.verb == "switch":
        return [ft.Switch(at_s=entry.at_s, epoch=entry.subject)]
    return _device_faults(entry)


def _link_faults(entry: _Entry, load: Callable[[str], LinkTrace]) -> list[Fault]:
    at_s, options = entry.at_s, entry.options
    until_s = at_s + options["for"] if "for" in options else None
    made: list[Fault] = []
    match entry.verb:
        case "heal" if entry.subject == "all":
            return [ft.HealAll(at_s=at_s)]
        case "heal":
            return [ft.HealLink(at_s=at_s, source=entry.pair[0], target=entry.pair[1])]
        case "partition":
            devices = tuple(map(DeviceId, entry.subject))
            made = [ft.Partition(at_s=at_s, devices=devices, detect_s=options.get("detect", 1.0))]
            return made + ([ft.HealAll(at_s=until_s)] if until_s is not None else [])
        case "cut":
            one, other = entry.pair
            if options.get("one_way"):
                made = [ft.CutOneWay(at_s=at_s, source=one, target=other)]
            else:
                made = [ft.CutLink(at_s=at_s, source=one, target=other, detect_s=options.get("detect", 1.0))]
            return made + ([ft.HealLink(at_s=until_s, source=one, target=other)] if until_s is not None else [])
        case "link":
            latency_s, rate = options["latency"], options["rate"]
            links = [
                Link(source=one, target=other, latency_s=latency_s, bandwidth_bytes_per_s=rate) for one, other in entry.pairs
            ]
            return [ft.SetLink(at_s=at_s, link=link) for link in links]
        case "trace":
            trace = load(options["file"])
            return [ft.FollowTrace(at_s=at_s, source=one, target=other, trace=trace) for one, other in entry.pairs]
    for one, other in entry.pairs:
        shares = {key: float(options.get(key, 0.0)) for key in ("drop", "duplicate", "truncate")}
        made.append(ft.SpoilLink(at_s=at_s, source=one, target=other, late_s=options.get("late", 0.0), **shares))
        if until_s is not None:
            made.append(ft.SpoilLink(at_s=until_s, source=one, target=other))
    return made


def _device_faults(entry: _Entry) -> list[Fault]:
    at_s, device, options = entry.at_s, DeviceId(entry.subject), entry.options
    is_on = options.get("on", True)
    first: Fault
    undo: Fault | None = None
    match entry.verb:
        case "kill":
            first = ft.KillNode(at_s=at_s, device=device, detect_s=options.get("detect", 0.05))
            undo = ft.RestartNode(at_s=at_s, device=device)
        case "restart":
            first = ft.RestartNode(at_s=at_s, device=device)
        case "stall":
            first, undo = ft.StallNode(at_s=at_s, device=device), ft.ResumeNode(at_s=at_s, device=device)
        case "resume":
            first = ft.ResumeNode(at_s=at_s, device=device)
        case "slow":
            first = ft.SlowDevice(at_s=at_s, device=device, factor=float(options["factor"]))
            undo = ft.SlowDevice(at_s=at_s, device=device, factor=1.0)
        case "clock":
            drift = float(options.get("drift", 1.0))
            first = ft.BendClock(at_s=at_s, device=device, step_s=options.get("step", 0.0), drift=drift)
            undo = ft.BendClock(at_s=at_s, device=device)
        case "disk_full":
            first = ft.FillDisk(at_s=at_s, device=device, is_full=is_on)
            undo = ft.FillDisk(at_s=at_s, device=device, is_full=not is_on)
        case "fail_work":
            kinds = tuple(map(str, options.get("kinds", ["compute"])))
            first, undo = (
                ft.SpoilWork(at_s=at_s, device=device, kinds=kinds),
                ft.SpoilWork(at_s=at_s, device=device, kinds=()),
            )
        case "garble":
            first = ft.GarbleNode(at_s=at_s, device=device, is_garbling=is_on)
            undo = ft.GarbleNode(at_s=at_s, device=device, is_garbling=not is_on)
        case _:
            takes_s, error = options.get("takes", 0.0), options.get("error", "")
            first = ft.SetPrepare(at_s=at_s, device=device, takes_s=takes_s, error=error)
            undo = ft.SetPrepare(at_s=at_s, device=device)
    if undo is None or "for" not in options:
        return [first]
    return [first, replace(undo, at_s=at_s + options["for"])]


def write_script(script: tuple[Fault, ...], remark: str = "") -> str:
    """The TOML text that read_script reads as the same faults; traces by name. Raises EcotoneError for a Replan."""
    lines = [f"# {line}" for line in remark.splitlines()]
    for fault in script:
        verb, options = _written(fault)
        lines += ["", "[[fault]]", f'at = "{fault.at_s!r} s"']
        lines += [f"{key} = {_toml(value)}" for key, value in {**verb, **options}.items()]
    return "\n".join(lines) + "\n"


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return repr(value)


def _seconds(value: float) -> str:
    return f"{value!r} s"


def _written(fault: Fault) -> tuple[dict[str, Any], dict[str, Any]]:
    match fault:
        case ft.KillNode(device=device, detect_s=detect_s):
            return {"kill": device}, {"detect": _seconds(detect_s)}
        case ft.RestartNode(device=device):
            return {"restart": device}, {}
        case ft.StallNode(device=device):
            return {"stall": device}, {}
        case ft.ResumeNode(device=device):
            return {"resume": device}, {}
        case ft.SlowDevice(device=device, factor=factor):
            return {"slow": device}, {"factor": factor}
        case ft.BendClock(device=device, step_s=step_s, drift=drift):
            return {"clock": device}, {"step": _seconds(step_s), "drift": drift}
        case ft.FillDisk(device=device, is_full=is_full):
            return {"disk_full": device}, {"on": is_full}
        case ft.SpoilWork(device=device, kinds=kinds):
            return {"fail_work": device}, {"kinds": kinds}
        case ft.GarbleNode(device=device, is_garbling=is_garbling):
            return {"garble": device}, {"on": is_garbling}
        case ft.SetPrepare(device=device, takes_s=takes_s, error=error):
            return {"prepare": device}, {"takes": _seconds(takes_s), "error": error}
        case ft.Switch(epoch=epoch):
            return {"switch": epoch}, {}
        case ft.Replan():
            raise EcotoneError("a script with a new plan is not written as TOML; give the plan as a file (replan = FILE)")
    return _written_link(fault)


def _written_link(
    fault: ft.CutLink | ft.CutOneWay | ft.HealLink | ft.Partition | ft.HealAll | ft.SetLink | ft.FollowTrace | ft.SpoilLink,
) -> tuple[dict[str, Any], dict[str, Any]]:
    match fault:
        case ft.HealAll():
            return {"heal": "all"}, {}
        case ft.Partition(devices=devices, detect_s=detect_s):
            return {"partition": devices}, {"detect": _seconds(detect_s)}
        case ft.SetLink(link=link):
            rate = f"{link.bandwidth_bytes_per_s!r} B/s"
            options = {"rate": rate, "latency": _seconds(link.latency_s), "one_way": True}
            return {"link": [link.source, link.target]}, options
    ends = [fault.source, fault.target]
    match fault:
        case ft.CutLink(detect_s=detect_s):
            return {"cut": ends}, {"detect": _seconds(detect_s)}
        case ft.CutOneWay():
            return {"cut": ends}, {"one_way": True}
        case ft.HealLink():
            return {"heal": ends}, {}
        case ft.FollowTrace(trace=trace):
            return {"trace": ends}, {"file": trace.name, "one_way": True}
    shares = {"drop": fault.drop, "duplicate": fault.duplicate, "truncate": fault.truncate}
    return {"frames": ends}, {**shares, "late": _seconds(fault.late_s), "one_way": True}
