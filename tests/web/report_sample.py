"""A made-up demonstration for the tests of the report; its numbers are chosen, not measured."""

from dataclasses import replace

from ecotone.web.result import Act, Contender, CurvePoint, LinkPart, Machine, PlanPart, Result, Wire

BLOCKS = 48


def stage(device: str, start: int, stop: int, seconds: float) -> PlanPart:
    share = (stop - start) / BLOCKS
    return PlanPart(
        device=device,
        start=start,
        stop=stop,
        executor="openvino:bf16",
        flop_share=share,
        predicted_s=seconds * 1.03,
        measured_s=seconds,
    )


def link(source: str, target: str, position: int, codec: str, size: float, raw: float, seconds: float) -> LinkPart:
    return LinkPart(
        source=source,
        target=target,
        position=position,
        codec=codec,
        size_bytes=size,
        raw_bytes=raw,
        predicted_s=seconds,
        measured_s=seconds,
    )


def contender(kind: str, name: str, words: str, latency: float, sent: float, right: float, **more: object) -> Contender:
    plain = Contender(
        kind=kind,
        name=name,
        words=words,
        latency_median_s=latency,
        latency_p95_s=latency * 1.2,
        throughput_per_s=1.4 / latency,
        bytes_per_frame=sent,
        accuracy=right,
        energy_joule=latency * 3.1,
        predicted_latency_s=latency * 0.96,
        predicted_throughput_per_s=1.5 / latency,
        predicted_bytes=sent,
        num_frames=40,
    )
    return replace(plain, **more)


def act(title: str, slower: float, cut: int) -> Act:
    stages = (stage("camera", 0, cut, 0.011), stage("gateway", cut, 44, 0.009), stage("server", 44, BLOCKS, 0.001))
    links = (
        link("camera", "gateway", cut, "int4+zstd", 4_100, 50_176, 0.0042 * slower),
        link("gateway", "server", 44, "int4", 2_300, 18_816, 0.012 * slower),
        link("server", "camera", BLOCKS, "fp32", 2_100, 1_960, 0.016),
    )
    contenders = (
        contender("device", "Device only", "every block on the camera", 0.081, 0, 0.861),
        contender("jpeg", "Server only, JPEG", "the picture as jpeg:90 to the server", 0.062 * slower, 41_000, 0.858),
        contender("fixed", "Best fixed cut", "int8 at block 20, camera then server", 0.048 * slower**0.5, 14_100, 0.861),
        contender(
            "ecotone", "Ecotone's plan", "three machines", 0.037 * slower**0.4, 8_500, 0.86, stages=stages, links=links
        ),
    )
    curve = tuple(
        CurvePoint(
            first="camera",
            second=second,
            position=p,
            codec="int4+zstd" if p else "jpeg:90",
            latency_s=0.004 + 0.0016 * p + slower * (0.05 if p == 0 else 0.09 * abs(20 - p) / 20 + 0.006) * rate,
            size_bytes=4_000 + 500 * abs(20 - p),
        )
        for second, rate in (("gateway", 0.6), ("server", 1.0))
        for p in range(0, BLOCKS + 1, 4)
    )
    wires = tuple(
        Wire(source=a, target=b, latency_s=s, bandwidth_bytes_per_s=r / slower)
        for a, b, s, r in (
            ("camera", "gateway", 0.003, 5e6),
            ("gateway", "server", 0.01, 2.5e6),
            ("camera", "server", 0.013, 1.25e6),
        )
    )
    headline = "Ecotone's plan answers in 37.0 ms, 1.30 times faster than the best fixed cut."
    return Act(title=title, headline=headline, links=wires, contenders=contenders, curve=curve)


def result() -> Result:
    return Result(
        network="TileNet",
        num_blocks=BLOCKS,
        flop=1.03e9,
        parameter_bytes=3_000_000,
        block_names=tuple(f"block{i}" for i in range(BLOCKS)),
        machines=(
            Machine(name="camera", tier="end", slowdown=12, whole_network_s=0.081),
            Machine(name="gateway", tier="edge", slowdown=3, whole_network_s=0.02),
            Machine(name="server", tier="cloud", whole_network_s=0.0067),
        ),
        source="camera",
        sink="camera",
        emulated=True,
        reference_accuracy=0.861,
        num_frames=40,
        acts=(act("The links as they are", 1, 20), act("Every link eight times slower", 8, 32)),
        conclusion="Ecotone answers in 37.0 ms. When every link slows eightfold the cut moves from 20 to 32.",
        seconds={"capture": 1.2, "profile": 42.0, "plan": 0.1, "run": 55.0},
        context={"machine": "a test", "torch": "2.13", "seed": "0"},
    )
