"""Random scenes by seed: small worlds of two to five unequal machines, a set of plans, requests, and several faults.

Links lie between 1 kbit/s and 1 Gbit/s, blocks take 0.5 to 50 ms. Same seed, same scene. `draw_faults` alone makes a random
script for any world.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from ecotone.cluster import DeviceId
from ecotone.simulator import faults as ft
from ecotone.simulator.faults import Fault
from ecotone.simulator.scene import Deployment, Scene, SceneLink, plan_of, predicted_s, trace_of

__all__ = ["KINDS", "TOPOLOGIES", "draw_faults", "draw_scene"]

TOPOLOGIES = ("none", "T1", "T2a", "T2b", "T2b+T1")
_SLOWEST_S = 4.0  # a plan that takes longer alone is not drawn
Random = np.random.Generator


def draw_scene(seed: int) -> Scene:
    """The scene of this seed."""
    random = np.random.default_rng(seed)
    count = int(random.integers(2, 6))
    devices = tuple("abcde"[:count])
    blocks = int(random.integers(2, 6))
    sizes = tuple(int(x) for x in np.exp(random.uniform(math.log(100), math.log(2e5), blocks + 1)))
    scene = Scene(
        devices=devices,
        block_s=tuple(round(float(x), 6) for x in np.exp(random.uniform(math.log(5e-4), math.log(0.05), count))),
        size_bytes=sizes,
        links=_links(random, devices),
        deployments=(),
        asks=(),
        ordered=bool(random.random() < 0.5),
        max_in_flight=int(random.integers(1, 5)),
        record=bool(random.random() < 0.4),
        seed=seed,
    )
    scene = replace(scene, record_s=_log(random, 1e-4, 0.05) if scene.record else 0.0)
    deployments = [_deployment(random, scene, 0.0)]
    span_s = float(random.uniform(1.0, 6.0))
    if random.random() < 0.15:
        deployments.append(_deployment(random, scene, round(float(random.uniform(0, span_s)), 3)))
    scene = replace(scene, deployments=tuple(_with_exits(np.random.default_rng((seed, 1)), scene, d) for d in deployments))
    in_flight, asks = _asks(random, scene, span_s)
    scene = replace(scene, in_flight=in_flight, asks=asks)
    faults = draw_faults(random, devices, scene.record, span_s, int(random.integers(1, 5)))
    if len(deployments[0].plans) > 1 and random.random() < 0.1:
        faults = (*faults, ft.Switch(at_s=_time(random, span_s), epoch=1))
    return replace(scene, faults=tuple(sorted(faults, key=lambda f: f.at_s)))


def _log(random: Random, low: float, high: float) -> float:
    return float(f"{math.exp(random.uniform(math.log(low), math.log(high))):.4g}")


def _time(random: Random, span_s: float) -> float:
    return round(float(random.uniform(0, span_s)), 4)


def _links(random: Random, devices: Sequence[str]) -> tuple[SceneLink, ...]:
    """Pairs alike both ways or not; one pair in eight is thin (down to 1 kbit/s)."""
    made = []
    for i, one in enumerate(devices):
        for other in devices[i + 1 :]:
            low, high = (125.0, 1.25e4) if random.random() < 0.125 else (1.25e4, 1.25e8)
            rates = [_log(random, low, high)] * 2
            if random.random() < 0.3:
                rates[1] = _log(random, low, high)
            latency_s = _log(random, 1e-4, 0.1)
            for (a, b), rate in zip(((one, other), (other, one)), rates, strict=True):
                made.append(SceneLink(source=a, target=b, latency_s=latency_s, rate_bytes_per_s=rate))
    return tuple(made)


def _deployment(random: Random, scene: Scene, at_s: float) -> Deployment:
    """A topology and plans for it: the preferred plan over servers, a twin elsewhere, the asker alone as the last resort."""
    blocks, asker, servers = len(scene.size_bytes) - 1, scene.asker, scene.devices[1:]
    kind = TOPOLOGIES[int(random.integers(len(TOPOLOGIES)))]
    plans = [_plan(random, scene, servers)]
    active: tuple[int, ...] = ()
    if kind.startswith("T2"):
        others = [d for d in servers if d not in plans[0]] or [asker]
        twin = _twin(random, scene, plans[0], others)
        if twin not in plans:
            plans.append(twin)
            active = (1,) if kind == "T2a" else ()
    if kind in ("T1", "T2b+T1") and f"{asker}:{blocks}" not in plans:
        plans.append(f"{asker}:{blocks}")
    return Deployment(at_s=at_s, plans=tuple(plans), active=active)


def _plan(random: Random, scene: Scene, servers: Sequence[str]) -> str:
    blocks, asker = len(scene.size_bytes) - 1, scene.asker
    for _ in range(8):
        cuts = sorted({int(c) for c in random.integers(1, blocks + 1, int(random.integers(0, 3)))} | {blocks})
        names = [str(random.choice(list(servers))) for _ in cuts]
        if len(cuts) > 1 and random.random() < 0.5:
            names[0] = asker
        text = " ".join(f"{name}:{cut}" for name, cut in zip(names, cuts, strict=True))
        if predicted_s(scene, plan_of(text, asker, 0)) < _SLOWEST_S:
            return text
    return f"{asker}:{blocks}"


def _twin(random: Random, scene: Scene, primary: str, others: Sequence[str]) -> str:
    """The same cuts with one other machine in place of the primary's servers."""
    other = str(random.choice(list(others)))
    parts = [part.partition(":") for part in primary.split()]
    text = " ".join(f"{name if name == scene.asker else other}:{stop}" for name, _, stop in parts)
    return text if predicted_s(scene, plan_of(text, scene.asker, 0)) < _SLOWEST_S else f"{scene.asker}:{parts[-1][2]}"


def _with_exits(random: Random, scene: Scene, deployment: Deployment) -> Deployment:
    """In every other deployment requests leave early: 5 to 70 % of those that are left, at one or two positions."""
    blocks = len(scene.size_bytes) - 1
    if random.random() >= 0.5:
        return deployment
    left, shares = 1.0, dict[int, float]()
    for position in sorted({int(p) for p in random.integers(1, blocks, int(random.integers(1, 3)))}):
        shares[position] = round(left * float(random.uniform(0.05, 0.7)), 3)
        left -= shares[position]

    def leaving(text: str) -> str:
        """The plan with these exits, its stages split where they are; now and then without them."""
        if random.random() < 0.2:
            return text
        parts = [(name, int(stop)) for name, _, stop in (part.partition(":") for part in text.split())]
        stops = sorted({stop for _, stop in parts} | set(shares))
        names = [next(name for name, end in parts if stop <= end) for stop in stops]
        marks = [f"?{shares[stop]:g}" if stop in shares else "" for stop in stops]
        again = " ".join(f"{name}:{stop}{mark}" for name, stop, mark in zip(names, stops, marks, strict=True))
        return again if predicted_s(scene, plan_of(again, scene.asker, 0)) < _SLOWEST_S else text

    plans = tuple(leaving(text) for text in deployment.plans)
    return replace(deployment, plans=plans) if len(set(plans)) == len(plans) else deployment


def _asks(random: Random, scene: Scene, span_s: float) -> tuple[int, tuple[tuple[float, float], ...]]:
    count = int(random.integers(3, 9))
    plans = [plan_of(text, scene.asker, 0) for d in scene.deployments for text in d.plans]
    slowest_s = max(predicted_s(scene, plan) for plan in plans)
    limits = [-1.0] * count
    if random.random() < 0.75:
        base_s = slowest_s * float(random.uniform(1, 3 * count))
        limits = [round(base_s + float(random.uniform(0.2, 8.0)), 4) for _ in range(count)]
    if random.random() < 0.4:
        return int(random.integers(1, 4)), tuple((-1.0, limit) for limit in limits)
    times = sorted(_time(random, span_s) for _ in range(count))
    return 1, tuple(zip(times, limits, strict=True))


# ---- faults --------------------------------------------------------------------------------------------------------------


def draw_faults(random: Random, devices: Sequence[str], record: bool, span_s: float, count: int) -> tuple[Fault, ...]:
    """`count` things that go wrong within `span_s`, most of them mended after a while. devices[0] is the asker."""
    made: list[Fault] = []
    kinds = [kind for kind in KINDS if record or kind not in ("asker", "disk")]
    for _ in range(count):
        kind = kinds[int(random.integers(len(kinds)))]
        at_s = _time(random, span_s)
        until_s = round(at_s + _log(random, 0.02, 4.0), 4) if random.random() < 0.7 else None
        made += KINDS[kind](random, tuple(map(DeviceId, devices)), at_s, until_s)
    return tuple(sorted(made, key=lambda fault: fault.at_s))


_Devices = tuple[DeviceId, ...]
_Drawer = Callable[[Random, _Devices, float, float | None], list[Fault]]


def _server(random: Random, devices: _Devices) -> DeviceId:
    return devices[int(random.integers(1, len(devices)))]


def _pair(random: Random, devices: _Devices) -> tuple[DeviceId, DeviceId]:
    one, other = random.permutation(len(devices))[:2]
    return devices[int(one)], devices[int(other)]


def _kill(random: Random, devices: _Devices, at_s: float, until_s: float | None) -> list[Fault]:
    device, detect_s = _server(random, devices), _log(random, 0.01, 1.0)
    back: list[Fault] = [] if until_s is None else [ft.RestartNode(at_s=until_s, device=device)]
    return [ft.KillNode(at_s=at_s, device=device, detect_s=detect_s), *back]


def _kill_asker(random: Random, devices: _Devices, at_s: float, until_s: float | None) -> list[Fault]:
    back_s = at_s + _log(random, 0.02, 1.0) if until_s is None else until_s
    return [ft.KillNode(at_s=at_s, device=devices[0]), ft.RestartNode(at_s=back_s, device=devices[0])]


def _stall(random: Random, devices: _Devices, at_s: float, until_s: float | None) -> list[Fault]:
    device = devices[int(random.integers(0 if until_s is not None else 1, len(devices)))]
    back: list[Fault] = [] if until_s is None else [ft.ResumeNode(at_s=until_s, device=device)]
    return [ft.StallNode(at_s=at_s, device=device), *back]


def _cut(random: Random, devices: _Devices, at_s: float, until_s: float | None) -> list[Fault]:
    one, other = _pair(random, devices)
    back: list[Fault] = [] if until_s is None else [ft.HealLink(at_s=until_s, source=one, target=other)]
    return [ft.CutLink(at_s=at_s, source=one, target=other, detect_s=_log(random, 0.01, 2.0)), *back]


def _cut_one_way(random: Random, devices: _Devices, at_s: float, until_s: float | None) -> list[Fault]:
    one, other = _pair(random, devices)
    back: list[Fault] = [] if until_s is None else [ft.HealLink(at_s=until_s, source=one, target=other)]
    return [ft.CutOneWay(at_s=at_s, source=one, target=other), *back]


def _partition(random: Random, devices: _Devices, at_s: float, until_s: float | None) -> list[Fault]:
    inside = tuple(d for d in devices[1:] if random.random() < 0.5) or devices[1:2]
    back: list[Fault] = [] if until_s is None else [ft.HealAll(at_s=until_s)]
    return [ft.Partition(at_s=at_s, devices=inside, detect_s=_log(random, 0.01, 2.0)), *back]


def _spoil(random: Random, devices: _Devices, at_s: float, until_s: float | None) -> list[Fault]:
    one, other = _pair(random, devices)
    gentle = random.random() < 0.5
    worse = 0.0 if gentle else 1.0
    first = ft.SpoilLink(
        at_s=at_s, source=one, target=other, duplicate=round(float(random.uniform(0, 0.5)), 3),
        late_s=_log(random, 1e-3, 0.2), drop=worse * round(float(random.uniform(0, 0.4)), 3),
        truncate=worse * round(float(random.uniform(0, 0.2)), 3),
    )  # fmt: skip
    return [first] if until_s is None else [first, ft.SpoilLink(at_s=until_s, source=one, target=other)]


def _trace(random: Random, devices: _Devices, at_s: float, until_s: float | None) -> list[Fault]:
    one, other = _pair(random, devices)
    rates = [0.0 if random.random() < 0.25 else _log(random, 1e3, 1e7) for _ in range(4)]
    gaps = np.cumsum([_log(random, 0.05, 1.0) for _ in range(4)])
    steps = " ".join(f"{at:.4g}:{rate:g}" for at, rate in zip([0.0, *gaps[:3]], rates, strict=True))
    return [ft.FollowTrace(at_s=at_s, source=one, target=other, trace=trace_of(f"steps {steps} end:{gaps[3]:.4g}"))]


def _slow(random: Random, devices: _Devices, at_s: float, until_s: float | None) -> list[Fault]:
    device, factor = devices[int(random.integers(len(devices)))], _log(random, 2.0, 20.0)
    back: list[Fault] = [] if until_s is None else [ft.SlowDevice(at_s=until_s, device=device, factor=1.0)]
    return [ft.SlowDevice(at_s=at_s, device=device, factor=factor), *back]


def _clock(random: Random, devices: _Devices, at_s: float, until_s: float | None) -> list[Fault]:
    device = devices[int(random.integers(len(devices)))]
    drift = round(float(random.uniform(0.99, 1.01)), 5)
    step_s = -_log(random, 0.01, 10.0) if random.random() < 0.5 else 0.0
    return [ft.BendClock(at_s=at_s, device=device, step_s=step_s, drift=drift)]


def _disk(random: Random, devices: _Devices, at_s: float, until_s: float | None) -> list[Fault]:
    back: list[Fault] = [] if until_s is None else [ft.FillDisk(at_s=until_s, device=devices[0], is_full=False)]
    return [ft.FillDisk(at_s=at_s, device=devices[0]), *back]


def _fail(random: Random, devices: _Devices, at_s: float, until_s: float | None) -> list[Fault]:
    device = _server(random, devices)
    kind = ("compute", "encode", "decode")[int(random.integers(3))]
    back: list[Fault] = [] if until_s is None else [ft.SpoilWork(at_s=until_s, device=device, kinds=())]
    return [ft.SpoilWork(at_s=at_s, device=device, kinds=(kind,)), *back]


def _garble(random: Random, devices: _Devices, at_s: float, until_s: float | None) -> list[Fault]:
    device = _server(random, devices)
    back: list[Fault] = [] if until_s is None else [ft.GarbleNode(at_s=until_s, device=device, is_garbling=False)]
    return [ft.GarbleNode(at_s=at_s, device=device), *back]


def _prepare(random: Random, devices: _Devices, at_s: float, until_s: float | None) -> list[Fault]:
    """Loading is slow or fails, and then the process has to load again."""
    device = _server(random, devices)
    error = "another version" if random.random() < 0.4 else ""
    takes_s = 0.0 if error else _log(random, 0.05, 3.0)
    first = ft.SetPrepare(at_s=at_s, device=device, takes_s=takes_s, error=error)
    back = round(at_s + _log(random, 0.02, 1.0), 4)
    return [first, ft.KillNode(at_s=at_s, device=device), ft.RestartNode(at_s=back, device=device)]


KINDS: dict[str, _Drawer] = {
    "kill": _kill, "asker": _kill_asker, "stall": _stall, "cut": _cut, "one-way": _cut_one_way, "partition": _partition,
    "frames": _spoil, "trace": _trace, "slow": _slow, "clock": _clock, "disk": _disk, "fail": _fail, "garbage": _garble,
    "prepare": _prepare,
}  # fmt: skip
"""What goes wrong, by name; "asker" and "disk" only where requests are recorded."""
