"""The machines and the links between them, as the user states them in a TOML file or as discovery found them.

Links are directed and carry latency *and* bandwidth. A device's speed is never here: it is measured (see profile.py).
Where many devices are alike, one KindLink stands for the links between any two devices of two kinds.
`slowdown` and `emulate` are for emulated clusters: a node stretches the time measured in that very execution.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import tomllib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NewType

from ecotone import schema
from ecotone.media import RadioCell, SharedWire
from ecotone.units import EcotoneError

__all__ = ["Cluster", "Device", "DeviceId", "KindLink", "Link", "Power"]

DeviceId = NewType("DeviceId", str)

SCHEMA, VERSION = "ecotone.cluster", 1


def _sane(*values: float) -> bool:
    return all(math.isfinite(v) and v >= 0 for v in values)


@dataclass(frozen=True, slots=True, kw_only=True)
class Power:
    """Watts while computing and while waiting, joules per byte sent. Constants of the machine, so energy is *modelled*."""

    idle_watt: float = 0.0
    busy_watt: float = 0.0
    send_joule_per_byte: float = 0.0

    def __post_init__(self) -> None:
        values = (self.idle_watt, self.busy_watt, self.send_joule_per_byte)
        schema.check("power", ["watts and joules must be finite and not negative"] if not _sane(*values) else [])


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """One machine (or one accelerator of it).

    `executors` are the names this device may use, empty: all that work there. `kind` says which machines are alike and
    may share a profile; empty: only itself. `address` is where its node listens, empty: discovered. `mtbf_s` is the mean
    time that it works between two failures (0: it is not known to fail), `mttr_s` the mean time that a failure lasts.
    `price_money_per_s` ("price = 0.90 /h"): what a second of its work costs, in any one currency.
    """

    name: DeviceId
    memory_bytes: int
    tier: str = ""  # "end", "edge", "cloud": a label for people and policies
    trust_zone: str = "default"
    executors: tuple[str, ...] = ()
    accelerator: str = "cpu"  # "cpu", "cuda", "cuda:1", "mps"
    threads: int = 1
    kind: str = ""
    power: Power = Power()
    address: str = ""
    slowdown: float = 1.0
    mtbf_s: float = 0.0
    mttr_s: float = 60.0
    price_money_per_s: float = 0.0

    def __post_init__(self) -> None:
        schema.check(f"device {self.name}", self._violations())

    def _violations(self) -> Iterator[str]:
        if not self.name or any(c in self.name for c in "/*$#?> "):
            yield f"name {self.name!r} must not be empty or hold any of / * $ # ? > or a space"
        if self.memory_bytes <= 0:
            yield "memory must be above zero"
        if self.threads < 1:
            yield "threads must be at least 1"
        if not (math.isfinite(self.slowdown) and self.slowdown >= 1):
            yield f"slowdown is {self.slowdown}, must be at least 1 (a machine cannot be emulated faster than it is)"
        if not _sane(self.mtbf_s, self.mttr_s):
            yield f"mtbf {self.mtbf_s} and mttr {self.mttr_s} must be finite and not negative"
        if not _sane(self.price_money_per_s):
            yield f"price {self.price_money_per_s} must be finite and not negative"


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """A directed link: a message of b bytes takes latency_s + b / bandwidth_bytes_per_s.

    For emulation only: `jitter_s` (standard deviation of the latency), `loss` (share of packets), and `trace`, the name or
    path of a LinkTrace that rate and latency follow. `mtbf_s`, `mttr_s`: as a Device has them, of this link alone.
    `price_money_per_byte` ("price = 0.09 /GB"): what carrying a byte costs.
    """

    source: DeviceId
    target: DeviceId
    latency_s: float
    bandwidth_bytes_per_s: float
    jitter_s: float = 0.0
    loss: float = 0.0
    trace: str = ""
    mtbf_s: float = 0.0
    mttr_s: float = 10.0
    price_money_per_byte: float = 0.0

    def __post_init__(self) -> None:
        schema.check(f"link {self.source}>{self.target}", self._violations())

    def _violations(self) -> Iterator[str]:
        if self.source == self.target:
            yield "source and target are the same device"
        if not (math.isfinite(self.latency_s) and self.latency_s >= 0):
            yield f"latency {self.latency_s} must be finite and not negative"
        if not (math.isfinite(self.bandwidth_bytes_per_s) and self.bandwidth_bytes_per_s > 0):
            yield f"bandwidth {self.bandwidth_bytes_per_s} must be finite and above zero"
        if not _sane(self.jitter_s) or not 0 <= self.loss < 1:
            yield f"jitter {self.jitter_s} must be finite and not negative, loss {self.loss} in [0, 1)"
        if not _sane(self.mtbf_s, self.mttr_s):
            yield f"mtbf {self.mtbf_s} and mttr {self.mttr_s} must be finite and not negative"
        if not _sane(self.price_money_per_byte):
            yield f"price {self.price_money_per_byte} must be finite and not negative"

    def transfer_s(self, size_bytes: float) -> float:
        """Seconds for `size_bytes` on an idle link."""
        return self.latency_s + size_bytes / self.bandwidth_bytes_per_s


@dataclass(frozen=True, slots=True, kw_only=True)
class KindLink:
    """The directed link from any device of one kind to any other device of a kind (the same one too).

    Fields as a Link has them. A Link that names the two devices comes before it.
    """

    source_kind: str
    target_kind: str
    latency_s: float
    bandwidth_bytes_per_s: float
    jitter_s: float = 0.0
    loss: float = 0.0
    trace: str = ""
    mtbf_s: float = 0.0
    mttr_s: float = 10.0
    price_money_per_byte: float = 0.0

    def __post_init__(self) -> None:
        where = f"link from kind {self.source_kind} to kind {self.target_kind}"
        try:
            self.between(DeviceId("source"), DeviceId("target"))
        except schema.SchemaError as error:
            raise schema.SchemaError(where, error.violations) from None

    def between(self, source: DeviceId, target: DeviceId) -> Link:
        """The same as the link of two devices."""
        return Link(
            source=source, target=target, latency_s=self.latency_s, bandwidth_bytes_per_s=self.bandwidth_bytes_per_s,
            jitter_s=self.jitter_s, loss=self.loss, trace=self.trace, mtbf_s=self.mtbf_s, mttr_s=self.mttr_s,
            price_money_per_byte=self.price_money_per_byte,
        )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pair:
    """A link as a file states it, of two devices or of two kinds: one direction, or both with `duplex`."""

    latency_s: float
    bandwidth_bytes_per_s: float
    source: DeviceId = DeviceId("")
    target: DeviceId = DeviceId("")
    source_kind: str = ""
    target_kind: str = ""
    duplex: bool = True
    jitter_s: float = 0.0
    loss: float = 0.0
    trace: str = ""
    mtbf_s: float = 0.0
    mttr_s: float = 10.0
    price_money_per_byte: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class _File:
    name: str
    device: tuple[Device, ...]
    link: tuple[_Pair, ...] = ()
    source: str = ""
    sink: str = ""
    emulate: bool = False
    radio: tuple[RadioCell, ...] = ()
    shared: tuple[SharedWire, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """All devices, all directed links: those named in `links`, and those that `kind_links` state for whole kinds.

    Inputs arise at `source`; results are wanted at `sink`. `emulate`: devices are processes of one computer, and rates,
    latencies and slowdowns are imposed in user space. `radios` and `shared`: what several links pass together (media.py).
    """

    name: str
    devices: tuple[Device, ...]
    links: tuple[Link, ...]
    source: DeviceId
    sink: DeviceId
    emulate: bool = False
    radios: tuple[RadioCell, ...] = ()
    shared: tuple[SharedWire, ...] = ()
    kind_links: tuple[KindLink, ...] = ()
    _linked: dict[tuple[str, str], Link] = field(init=False, repr=False, compare=False, default_factory=dict)
    _kinds: dict[str, str] = field(init=False, repr=False, compare=False, default_factory=dict)
    _by_kind: dict[tuple[str, str], KindLink] = field(init=False, repr=False, compare=False, default_factory=dict)

    def __post_init__(self) -> None:
        schema.check(f"cluster {self.name}", self._violations())
        self._linked.update({(k.source, k.target): k for k in self.links})
        self._kinds.update({d.name: d.kind for d in self.devices})
        self._by_kind.update({(k.source_kind, k.target_kind): k for k in self.kind_links})

    def _violations(self) -> Iterator[str]:
        counted = Counter(d.name for d in self.devices)
        if not counted:
            yield "has no device"
        for name in sorted(n for n, times in counted.items() if times > 1):
            yield f"device {name} is given twice"
        for role, name in (("source", self.source), ("sink", self.sink)):
            if name not in counted:
                yield f"{role} {name!r} is not a device; devices are {_some(counted)}"
        pairs = Counter((link.source, link.target) for link in self.links)
        for pair in sorted(p for p, times in pairs.items() if times > 1):
            yield f"link {pair[0]}>{pair[1]} is given twice"
        for end in sorted({e for pair in pairs for e in pair if e not in counted}):
            yield f"a link names device {end!r}; devices are {_some(counted)}"
        kinds = {d.kind for d in self.devices if d.kind}
        by_kind = Counter((k.source_kind, k.target_kind) for k in self.kind_links)
        for both in sorted(p for p, times in by_kind.items() if times > 1):
            yield f"the link from kind {both[0]} to kind {both[1]} is given twice"
        for kind in sorted({k for pair in by_kind for k in pair if k not in kinds}):
            yield f"a link names kind {kind!r}; kinds are {_some(kinds) or 'not stated'}"
        if not self.emulate and any(d.slowdown != 1 for d in self.devices):
            yield "slowdown is for emulated clusters only; set emulate = true or remove it"
        yield from self._media_violations(set(pairs))

    def _media_violations(self, pairs: set[tuple[DeviceId, DeviceId]]) -> Iterator[str]:
        names = [r.name for r in self.radios] + [w.name for w in self.shared]
        for name in sorted({n for n in names if names.count(n) > 1}):
            yield f"{name} names two radios or shared wires"
        uplinks = [pair for radio in self.radios for pair in radio.links]
        for source, target in uplinks:
            if (source, target) not in pairs:
                yield f"a radio has the uplink {source}>{target}, but there is no such link; are both devices there?"
            elif uplinks.count((source, target)) > 1:
                yield f"link {source}>{target} belongs to two radios"
        for wire in self.shared:
            carried = [pair for pair in sorted(pairs) if wire.carries(*pair)]
            if not carried:
                yield f"shared wire {wire.name} carries no link of this cluster"
            for source, target in (pair for pair in carried if pair in uplinks):
                yield f"shared wire {wire.name} carries {source}>{target}, which belongs to a radio"

    def device(self, name: str) -> Device:
        """The device called `name`; raises EcotoneError if there is none."""
        for device in self.devices:
            if device.name == name:
                return device
        known = _some(d.name for d in self.devices)
        raise EcotoneError(f"cluster {self.name}: no device {name!r}; devices are {known}")

    def link(self, source: str, target: str) -> Link | None:
        """The directed link, named or by kind; None where the two cannot talk directly."""
        named = self._linked.get((source, target))
        if named is not None or source == target:
            return named
        kinds = (self._kinds.get(source, ""), self._kinds.get(target, ""))
        found = self._by_kind.get(kinds) if all(kinds) else None
        return found.between(DeviceId(source), DeviceId(target)) if found else None

    def links_among(self, names: Iterable[str]) -> tuple[Link, ...]:
        """Every directed link between two of `names`: those named, in their order, then those by kind."""
        wanted = list(dict.fromkeys(names))
        inside = set(wanted)
        named = [k for k in self.links if k.source in inside and k.target in inside]
        pairs = ((a, b) for a in wanted for b in wanted if (a, b) not in self._linked) if self.kind_links else ()
        by_kind = (self.link(a, b) for a, b in pairs)
        return (*named, *(k for k in by_kind if k is not None))

    def spelled_out(self) -> Cluster:
        """The same cluster with every link by kind written as the links of its devices: one for each pair."""
        if not self.kind_links:
            return self
        return replace(self, links=self.links_among(d.name for d in self.devices), kind_links=())

    def with_link(self, link: Link) -> Cluster:
        """The same cluster with this directed link put in place of the old one."""
        kept = [k for k in self.links if (k.source, k.target) != (link.source, link.target)]
        return replace(self, links=(*kept, link))

    def scaled_links(self, factor: float) -> Cluster:
        """The same cluster with every bandwidth multiplied by `factor`."""
        links = tuple(replace(k, bandwidth_bytes_per_s=k.bandwidth_bytes_per_s * factor) for k in self.links)
        kinds = tuple(replace(k, bandwidth_bytes_per_s=k.bandwidth_bytes_per_s * factor) for k in self.kind_links)
        return replace(self, links=links, kind_links=kinds)

    def content_hash(self) -> str:
        """Hex sha256 of everything here."""
        return hashlib.sha256(json.dumps(schema.write(self), sort_keys=True).encode()).hexdigest()

    def to_json(self) -> str:
        return schema.dump_json(self, SCHEMA, VERSION)

    @staticmethod
    def from_json(text: str | bytes, where: str = "cluster") -> Cluster:
        return schema.load_json(Cluster, text, SCHEMA, VERSION, where)

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Cluster:
        """Read a TOML cluster file; raises EcotoneError (unreadable) or SchemaError naming every violation.

        Format: `schema = "ecotone.cluster"`, `version = 1`, `name`, `source`, `sink`, `emulate`, `[[device]]`, `[[link]]`,
        `[[radio]]` with `[[radio.sender]]` (their uplinks are not stated as links), `[[shared]]`.
        """
        try:
            document = tomllib.loads(Path(path).read_text())
        except OSError as error:
            raise EcotoneError(f"cluster file {path}: {error.strerror or error}; give the path of a TOML file") from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise EcotoneError(f"cluster file {path}: not TOML: {error}") from None
        where = f"cluster file {path}"
        if document.pop("schema", None) != SCHEMA or document.pop("version", None) != VERSION:
            raise schema.SchemaError(where, [f'must begin with schema = "{SCHEMA}" and version = {VERSION}'])
        file = schema.read(_File, document, where)
        first = file.device[0].name if file.device else DeviceId("")
        source = DeviceId(file.source) if file.source else first
        links, kind_links = _links(file.link, where)
        sink = DeviceId(file.sink) if file.sink else source
        try:
            return Cluster(
                name=file.name, devices=file.device, links=(*links, *_uplinks(file.radio)), source=source, sink=sink,
                emulate=file.emulate, radios=file.radio, shared=file.shared, kind_links=kind_links,
            )  # fmt: skip
        except schema.SchemaError as error:
            raise schema.SchemaError(where, error.violations) from None


def _links(pairs: tuple[_Pair, ...], where: str) -> tuple[tuple[Link, ...], tuple[KindLink, ...]]:
    links: list[Link] = []
    kind_links: list[KindLink] = []
    violations: list[str] = []
    for pair in pairs:
        named, by_kind = (str(pair.source), str(pair.target)), (pair.source_kind, pair.target_kind)
        if (any(named) and any(by_kind)) or not (all(named) or all(by_kind)):
            shown = ">".join(by_kind if any(by_kind) else named)
            violations.append(f"link {shown}: give source and target, or source_kind and target_kind")
            continue
        stated = {
            "latency_s": pair.latency_s, "bandwidth_bytes_per_s": pair.bandwidth_bytes_per_s, "jitter_s": pair.jitter_s,
            "loss": pair.loss, "mtbf_s": pair.mtbf_s, "mttr_s": pair.mttr_s,
            "price_money_per_byte": pair.price_money_per_byte,
        }  # fmt: skip
        ends = named if all(named) else by_kind
        try:
            for one, other in dict.fromkeys([ends, ends[::-1]] if pair.duplex else [ends]):
                if all(named):
                    links.append(Link(source=DeviceId(one), target=DeviceId(other), trace=pair.trace, **stated))
                else:
                    kind_links.append(KindLink(source_kind=one, target_kind=other, trace=pair.trace, **stated))
        except schema.SchemaError as error:
            violations.append(str(error))
    schema.check(where, violations)
    return tuple(links), tuple(kind_links)


def _uplinks(radios: tuple[RadioCell, ...]) -> Iterator[Link]:
    for radio in radios:
        for source, target in radio.links:
            yield Link(
                source=DeviceId(source), target=DeviceId(target), latency_s=radio.latency_s,
                bandwidth_bytes_per_s=radio.alone_bytes_per_s(source),
            )  # fmt: skip


def _some(names: Iterable[str], most: int = 20) -> str:
    """The names in a row, not more than `most`."""
    every = list(names)
    return ", ".join(every[:most]) + (f" and {len(every) - most} more" if len(every) > most else "")
