"""Training of learned bottlenecks: it learns, repeats itself, meets its rate, and refuses what does not fit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from ecotone import codec
from ecotone.model import Captured, capture
from ecotone.profiling import (
    BottleneckOptions,
    MeasureOptions,
    candidate_cuts,
    check_bottleneck,
    payloads,
    profile_codecs,
    train_bottleneck,
    trainable_cuts,
)
from ecotone.profiling.bottleneck import _spec, head_hash
from ecotone.profiling.bottleneck_training import Work, about
from ecotone.units import EcotoneError

pytestmark = pytest.mark.torch

CUT = 2
QUICK = BottleneckOptions(latents=4, hidden=8, epochs=3, batch=4, learning_rate=1e-2, validation=0.25, price=0.1)


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1),
        nn.ReLU(), nn.AvgPool2d(4), nn.Flatten(), nn.Linear(72, 5),
    ).eval()  # fmt: skip


def pictures(count: int, side: int = 12) -> list[tuple[torch.Tensor, ...]]:
    """Smooth random pictures, each its own."""
    coarse = torch.randn(count, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    smooth = nn.functional.interpolate(coarse, size=(side, side), mode="bilinear")
    return [(picture[None].contiguous(),) for picture in smooth]


@pytest.fixture(scope="module")
def captured() -> Captured:
    return capture(network(), pictures(1)[0], name="Small Net")


def error_of(captured: Captured, options: BottleneckOptions, **more: object) -> float:
    return train_bottleneck(captured, CUT, pictures(24), options=options, **more).relative_error  # type: ignore[arg-type]


def test_training_makes_the_answers_better_and_repeats_itself(captured: Captured) -> None:
    seen: list[tuple[int, int, str]] = []
    made = train_bottleneck(captured, CUT, pictures(24), options=QUICK, progress=lambda *step: seen.append(step))
    again = train_bottleneck(captured, CUT, pictures(24), options=QUICK)
    other = train_bottleneck(captured, CUT, pictures(24), options=replace(QUICK, seed=1))
    assert made.codec.data == again.codec.data != other.codec.data
    assert [done for done, _, _ in seen] == list(range(1, (3 + 1) * 5 + 1))  # of 18 samples, 4 a step
    assert made.num_validation == 6
    longer = train_bottleneck(captured, CUT, pictures(24), options=replace(QUICK, epochs=20))
    assert longer.relative_error < 0.8 * made.relative_error
    assert longer.codec.spec.relative_error == pytest.approx(longer.relative_error, abs=1e-3)
    assert longer.codec.id.startswith("learned:small-net-2@")


def test_figures_are_those_of_the_codec_itself(captured: Captured) -> None:
    """Measured again, by the profiler's own way, on the same held-out samples."""
    made = train_bottleneck(captured, CUT, pictures(24), options=QUICK)
    with codec.holding([made.codec]):
        (payload,) = (
            p for p in payloads(captured, pictures(24)[18:], (0, CUT, captured.graph.num_blocks), (made.codec.id,))
        )
    assert payload.position == CUT
    assert payload.relative_error == pytest.approx(made.relative_error, rel=1e-4)
    assert payload.disagreement == made.disagreement
    assert payload.size_bytes == pytest.approx(made.bytes_per_sample, abs=8)  # the tensor's name is longer


def test_a_higher_price_makes_it_smaller_and_worse(captured: Captured) -> None:
    made = [train_bottleneck(captured, CUT, pictures(24), options=replace(QUICK, price=p, epochs=20)) for p in (0.003, 3.0)]
    assert made[1].bytes_per_sample < made[0].bytes_per_sample - 20
    assert made[1].relative_error > 1.5 * made[0].relative_error


@pytest.mark.parametrize("coding", ["int8", "int6+rans"])
def test_the_plain_autoencoder(captured: Captured, coding: str) -> None:
    """MAHPPO's: 1x1 convolutions, channels over a factor, integers of a range per item; the rate follows from the factor."""
    errors = []
    for latents in (2, 8):
        options = replace(QUICK, latents=latents, stride=1, kernel=1, hidden=0, coding=coding, epochs=20)
        made = train_bottleneck(captured, CUT, pictures(24), options=options)
        assert made.codec.spec.shapes()["up.weight"] == (8, latents, 1, 1)
        assert made.bytes_per_sample < latents * 12 * 12 + 130
        errors.append(made.relative_error)
    assert errors[1] < 0.5 * errors[0] < 0.5


def test_the_second_order_is_that_of_the_divergence() -> None:
    """Behind a cut of a network whose rest works pixel by pixel, small errors cost what the information says they do."""
    torch.manual_seed(3)
    layers = [nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 8, 1), nn.Tanh(), nn.Conv2d(8, 5, 1)]
    captured = capture(nn.Sequential(*layers).eval(), pictures(1)[0])
    work = Work(captured, _spec(captured, 1, "", QUICK), pictures(40), None, QUICK)
    maps = work.maps(range(30))
    error = 0.03 * torch.randn(maps.shape, generator=torch.Generator().manual_seed(4)) @ torch.eye(12)
    with torch.no_grad():
        true = float(work.truly(maps + error, range(30)))
    information = work.information()
    assert float(about(error, information)) / 30 == pytest.approx(true, rel=0.15)
    assert float(about(error, work.corrected(information, maps + error, maps, range(30)))) / 30 == pytest.approx(
        true, rel=1e-3
    )


def test_labels_take_the_place_of_distillation(captured: Captured) -> None:
    samples = pictures(24)
    labels = [captured.reference(sample)[0].argmax(1) for sample in samples]
    made = train_bottleneck(captured, CUT, samples, labels, options=replace(QUICK, epochs=10))
    assert made.loss_points is not None
    assert made.loss_points == pytest.approx(100 * made.disagreement)  # here the labels are the model's own answers
    assert made.codec.data != train_bottleneck(captured, CUT, samples, options=replace(QUICK, epochs=10)).codec.data


def test_sequences_of_tokens() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.third = nn.Linear(12, 16), nn.Linear(16, 16), nn.Linear(16, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.third(torch.nn.functional.gelu(self.second(torch.nn.functional.gelu(self.first(x)))))

    torch.manual_seed(0)
    samples = [(torch.randn(1, 7, 12),) for _ in range(16)]
    captured = capture(Tokens().eval(), samples[0])
    made = train_bottleneck(captured, 1, samples, options=replace(QUICK, epochs=20, hidden=0, price=0.01))
    assert made.codec.spec.is_sequence
    assert made.relative_error < 0.9
    check_bottleneck(captured, made.codec)


def test_a_codec_is_of_one_model_and_one_cut(captured: Captured) -> None:
    made = train_bottleneck(captured, CUT, pictures(8), options=QUICK).codec
    check_bottleneck(captured, made)
    with pytest.raises(EcotoneError, match="trained for another model"):
        check_bottleneck(capture(network(seed=1), pictures(1)[0]), made)
    with pytest.raises(EcotoneError, match="nothing single crosses"):
        check_bottleneck(capture(nn.Sequential(nn.Conv2d(3, 2, 3)).eval(), pictures(1)[0]), made)
    longer = capture(nn.Sequential(*network(), nn.Linear(5, 2)).eval(), pictures(1)[0])
    assert head_hash(longer, CUT) == made.spec.head  # what lies behind the cut does not matter
    assert head_hash(captured, CUT + 1) != made.spec.head


def test_what_does_not_fit_is_named(captured: Captured) -> None:
    length = captured.graph.num_blocks
    for cut in (0, length, -1, length + 3):
        with pytest.raises(EcotoneError, match="must lie inside"):
            train_bottleneck(captured, cut, pictures(8), options=QUICK)
    with pytest.raises(EcotoneError, match="at least 4"):
        train_bottleneck(captured, CUT, pictures(3), options=QUICK)
    with pytest.raises(EcotoneError, match="as many labels"):
        train_bottleneck(captured, CUT, pictures(8), [torch.zeros(1)], options=QUICK)
    with pytest.raises(EcotoneError, match="varying"):
        train_bottleneck(
            captured, CUT, [(torch.zeros(1, 3, 12, 12),)] * 0 + [(torch.full((1, 3, 12, 12), float("nan")),)] * 5
        )
    with pytest.raises(EcotoneError, match="coding"):
        train_bottleneck(captured, CUT, pictures(8), options=replace(QUICK, coding="jpeg:90"))
    for wrong in ({"epochs": 0}, {"final_epochs": -1}, {"validation": 1.0}, {"price": 0.0}):
        with pytest.raises(EcotoneError, match="bottleneck options"):
            replace(QUICK, **wrong)


def test_branches_have_no_single_tensor() -> None:
    class Skips(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = torch.relu(self.a(x))
            return self.c(torch.relu(self.b(y))) + y

    captured = capture(Skips().eval(), (torch.randn(1, 4, 8, 8),))
    several = [p for p in range(1, captured.graph.num_blocks) if len(captured.graph.frontier(p)) > 1]
    assert several
    assert not set(several) & set(trainable_cuts(captured.graph))
    with pytest.raises(EcotoneError, match="one float tensor"):
        train_bottleneck(captured, several[0], [(torch.randn(1, 4, 8, 8),) for _ in range(4)])


def test_a_profile_measures_a_learned_codec_at_its_cut_only(captured: Captured) -> None:
    made = train_bottleneck(captured, CUT, pictures(8), options=QUICK).codec
    names = ("fp32", made.id)
    cuts = candidate_cuts(captured.graph, 1, also=[CUT])
    assert CUT in cuts
    values = {cut: [tuple(captured.segment(0, cut).module()(*pictures(1)[0]))] for cut in cuts}
    with codec.holding([made]):
        assert {p.position for p in payloads(captured, pictures(2), cuts, names) if p.codec == made.id} == {CUT}
        timed = {c.codec: c for c in profile_codecs("here", names, rounds=1, frontiers=values)}
        assert "learned" not in " ".join(
            c.codec for c in profile_codecs("here", names, rounds=1)
        )  # no frontier to time it on
    assert timed[made.id].encode_s_per_raw_byte == 0.0
    assert timed[made.id].decode_fixed_s > 0
    with pytest.raises(EcotoneError, match="weights are not here"):
        payloads(captured, pictures(2), cuts, names)
    assert MeasureOptions(codecs=names).codecs == names
