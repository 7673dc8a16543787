"""Exits on captured models: where they may stand, what heads give, that joined programs are both parts, files, training."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import zoo
from learnable import CLASSES, bars, residual_net, text_encoder, words
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from ecotone.model import Captured, ModelError, Segment, capture
from ecotone.model.confidence import ExitRule
from ecotone.model.exit_file import read_exits, write_exits
from ecotone.model.exit_heads import Head, capture_head, default_rule, fold_temperature, make_head
from ecotone.model.exit_places import exit_places, flop_share
from ecotone.model.exit_training import Sample, TrainOptions, train_exits
from ecotone.schema import SchemaError

pytestmark = pytest.mark.torch


class Chain(nn.Module):
    def __init__(self, blocks: int = 8, width: int = 16) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(blocks - 1))
        self.last = nn.Linear(width, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        made: torch.Tensor = self.last(x)
        return made


@pytest.fixture(scope="module")
def chain() -> Captured:
    torch.manual_seed(2)
    return capture(Chain().eval(), (torch.randn(2, 16),), name="chain")


def exiting(captured: Captured, *positions: int) -> Captured:
    torch.manual_seed(5)
    rule = default_rule(captured.graph)
    heads = [capture_head(captured, f"e{p}", p, make_head(captured.graph, p), rule) for p in positions]
    return captured.with_exits(heads)


# ---- places --------------------------------------------------------------------------------------------------------------


def test_places_are_spread_over_the_flop_and_never_where_several_tensors_cross(chain: Captured) -> None:
    assert exit_places(chain.graph, 3) == (1, 3, 5)  # nearest to 0.133, 0.4 and 0.667 of the FLOP, 7 layers in 8 blocks
    assert exit_places(chain.graph, 99) == (1, 2, 3, 4, 5)  # 82 % of the FLOP lie before 6: that saves too little
    for name in ("resnet", "vit"):
        module, args, kwargs = zoo.build(name)
        graph = capture(module, args, kwargs, name=name).graph
        places = exit_places(graph, 3)
        assert set(places) <= set(graph.single_tensor_cuts())
        assert all(flop_share(graph, p) <= 0.8 for p in places)


def test_a_position_that_is_no_frontier_of_one_tensor_is_refused_with_the_nearest_that_are() -> None:
    module, args, kwargs = zoo.build("resnet")
    graph = capture(module, args, kwargs, name="resnet").graph
    assert graph.single_tensor_cuts() == (1, 3, 5, 8)
    with pytest.raises(
        ModelError, match=r"position 2 of resnet has no single-tensor frontier \(2 tensors .*nearest are 1, 3"
    ):
        exit_places(graph, at=(1, 2))
    with pytest.raises(ModelError, match=r"position 10 .*it is no cut inside.*nearest are 5, 8"):
        exit_places(graph, at=(10,))
    masked, args, kwargs = zoo.build("sentence_encoder")
    with pytest.raises(ModelError, match="it has none; capture it so that one tensor crosses, masks left out"):
        exit_places(capture(masked, args, kwargs, name="masked").graph, at=(3,))


# ---- heads ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["resnet", "vit", "swin", "mamba", "unet"])
def test_a_head_for_any_kind_of_tensor_gives_just_the_outputs_of_the_model(name: str) -> None:
    module, args, kwargs = zoo.build(name)
    captured = capture(module, args, kwargs, name=name)
    found = exiting(captured, *exit_places(captured.graph, 2))
    inputs, last = captured.example_inputs, captured.graph.num_blocks
    for head in found.exits:
        base = captured.segment(0, head.position)
        both = found.segment(0, head.position, head.name)
        frontier, *outputs = both.module()(*inputs)
        assert torch.equal(frontier, base.module()(*inputs)[0])
        alone = head.segment.module()(frontier)
        assert all(torch.equal(a, b) for a, b in zip(outputs, alone, strict=True))
        assert [(t.shape, t.dtype) for t in outputs] == [(t.shape, t.dtype) for t in captured.reference(inputs)]
        assert [t.name for t in both.outputs[1:]] == [found.graph.tensors[i].name for i in found.graph.frontier(last)]
        blobs = {sha: both.blob(weight) for weight, (sha, _) in both.manifest().items()}
        assert Segment.from_parts(both.program_json(), blobs.__getitem__).program == both.program
        variant = found.until_exit(head.name)
        assert all(torch.equal(a, b) for a, b in zip(variant.reference(inputs), outputs, strict=True))
        assert type(variant.unflatten_outputs(variant.reference(inputs))) is type(
            captured.unflatten_outputs(captured.reference(inputs))
        )


def test_flop_weights_and_hashes_of_exits_are_counted(chain: Captured) -> None:
    class Line(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.line = nn.Linear(16, 5)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
            return (self.line(x),)

    head = capture_head(chain, "line", 3, Line(), default_rule(chain.graph))
    found = chain.with_exits([head])
    (place,) = found.graph.exits
    assert (place.name, place.position, place.flop) == ("line", 3, 2 * 2 * 16 * 5)
    assert sum(found.graph.parameters[p].size_bytes for p in place.parameters) == 4 * (16 * 5 + 5)
    assert place.working_bytes == 4 * 2 * (16 + 5)  # its input and its output
    assert found.graph.segment_parameter_bytes(0, 3, "line") == found.graph.segment_parameter_bytes(0, 3) + 4 * 85
    assert found.graph.content_hash() != chain.graph.content_hash() == found.backbone.content_hash()
    assert chain.with_exits([]).graph == chain.graph
    assert {t.dtype for t in head.segment.weights.values()} == {torch.float32}
    assert all(torch.equal(t, t.half().float()) for t in head.segment.weights.values())


def test_early_heads_have_more_layers_and_stay_within_their_budget(chain: Captured) -> None:
    from ecotone.cli.demo_model import example_inputs, tilenet

    captured = capture(tilenet(), example_inputs(), name="TileNet")
    whole = captured.graph.segment_flop(0, captured.graph.num_blocks)
    layers = []
    for position in (2, 6, 8):
        for budget in (0.01, 0.05):
            head = make_head(captured.graph, position, budget)
            made = captured.with_exits([capture_head(captured, "e", position, head, default_rule(captured.graph))])
            assert made.graph.exits[0].flop <= 1.05 * budget * whole  # norms and activations beside the products
        layers.append(len(head.branches[0]))  # type: ignore[arg-type]
    assert layers == sorted(layers, reverse=True)


def test_a_head_that_does_not_fit_is_refused(chain: Captured) -> None:
    rule = default_rule(chain.graph)
    with pytest.raises(ModelError, match=r"its head gives \[2, 16\] float32, the model \[2, 5\] float32"):
        capture_head(chain, "x", 3, Head([nn.Sequential(nn.Linear(16, 16))]), rule)
    with pytest.raises(ModelError, match="exit name 'a b'"):
        capture_head(chain, "a b", 3, make_head(chain.graph, 3), rule)
    found = exiting(chain, 3)
    with pytest.raises(ModelError, match="exit e3 stands at 3; end the segment there"):
        found.segment(0, 4, "e3")
    with pytest.raises(ModelError, match="has no exit 'e9'; its exits are e3 at 3"):
        found.segment(0, 3, "e9")
    module, args, kwargs = zoo.build("lstm")
    with pytest.raises(ModelError, match="no head is known for a tensor"):
        make_head(capture(module, args, kwargs, name="lstm").graph, 1)


def test_exits_of_one_size_of_input_serve_another_where_the_model_does() -> None:
    from ecotone.cli.demo_model import example_inputs, tilenet

    frames = capture(tilenet(), example_inputs(), name="TileNet")
    tiles = capture(tilenet(), (torch.rand(1, 3, 32, 32),), name="tiles", dynamic_batch=True)
    found = exiting(frames, 2, 6)
    moved = tiles.with_exits(found.exits)
    for there, here in zip(found.graph.exits, moved.graph.exits, strict=True):
        assert there.flop == pytest.approx(49 * here.flop)
    assert moved.segment(0, 6, "e6").module()(torch.rand(3, 3, 32, 32))[1].shape == (3, 10, 1, 1)


# ---- how sure ------------------------------------------------------------------------------------------------------------


def test_confidence_by_hand() -> None:
    p = torch.tensor([[0.5, 0.25, 0.25], [0.7, 0.2, 0.1]])
    logits = p.log().T[None]  # [1, 3 classes, 2 decisions]
    entropy = [1 + sum(x * math.log(x) for x in row) / math.log(3) for row in p.tolist()]
    for measure, each in (("top", [0.5, 0.7]), ("margin", [0.25, 0.5]), ("entropy", entropy)):
        mean = ExitRule(measure=measure, over="mean")
        least = ExitRule(measure=measure, over="min")
        assert mean.of_request([logits]) == pytest.approx(sum(each) / 2, abs=1e-6)
        assert least.of_request([logits]) == pytest.approx(min(each), abs=1e-6)
    two = torch.cat([logits, torch.zeros(1, 3, 2)])  # a request of two samples is as sure as its least sure one
    assert ExitRule().of_request([two]) == pytest.approx(1 / 3)
    assert ExitRule().of_request([logits * torch.nan]) == 0.0
    with pytest.raises(SchemaError, match="measures are top, entropy, margin"):
        ExitRule(measure="luck")


def test_a_program_whose_exit_has_no_classes_is_refused(chain: Captured) -> None:
    segment = exiting(chain, 3).segment(0, 3, "e3")
    document = json.loads(segment.program_json())
    for change in ({"dim": 3}, {"num_outputs": 2}, {"output": 4}, {"over": "all"}):
        text = json.dumps(document | {"exit": document["exit"] | change})
        with pytest.raises(ModelError, match=r"exit|does not exist|over"):
            Segment.from_parts(text, lambda sha: b"")


# ---- files ---------------------------------------------------------------------------------------------------------------


def test_a_file_gives_the_same_exits_and_refuses_another_model(chain: Captured, tmp_path: Path) -> None:
    found, path = exiting(chain, 2, 4), tmp_path / "chain.exits.safetensors"
    write_exits(path, found, data={"seen": torch.arange(3)})
    read = read_exits(path)
    again = read.attach(chain)
    assert again.graph == found.graph
    assert again.segment(2, 4, "e4").content_hash() == found.segment(2, 4, "e4").content_hash()
    assert read.data["seen"].tolist() == [0, 1, 2]
    with safe_open(path, "pt") as file:
        assert {str(file.get_tensor(name).dtype) for name in file.keys() if name.startswith("head")} == {"torch.float16"}  # noqa: SIM118
    torch.manual_seed(99)
    other = capture(Chain().eval(), (torch.randn(2, 16),), name="other")
    with pytest.raises(ModelError, match=r"is for a model with weights [0-9a-f]{12}, not for other .*train anew"):
        read.attach(other)


def test_damaged_files_are_refused_by_name(chain: Captured, tmp_path: Path) -> None:
    path = tmp_path / "x.exits.safetensors"
    with pytest.raises(ModelError, match="no such file; make one with ecotone exits"):
        read_exits(path)
    path.write_bytes(b"nonsense")
    with pytest.raises(ModelError, match="is not a file of exits"):
        read_exits(path)
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(ModelError, match="is not a file of exits of this version"):
        read_exits(path)
    write_exits(path, exiting(chain, 3))
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    name = next(n for n in tensors if n.startswith("head/e3/"))
    save_file(tensors | {name: tensors[name] + 1}, path, metadata)
    with pytest.raises(ModelError, match="is not the one that its program names"):
        read_exits(path)
    save_file({n: t for n, t in tensors.items() if n != name}, path, metadata)
    with pytest.raises(ModelError, match="lacks its weight"):
        read_exits(path)
    save_file(tensors, path, metadata | {"heads": "{"})
    with pytest.raises(ModelError, match="its heads cannot be read"):
        read_exits(path)


# ---- training ------------------------------------------------------------------------------------------------------------


def batches(made: tuple[torch.Tensor, torch.Tensor], size: int = 50) -> list[Sample]:
    return [((x,), y) for x, y in zip(made[0].split(size), made[1].split(size), strict=True)]


def right(captured: Captured, made: tuple[torch.Tensor, torch.Tensor]) -> list[float]:
    """Accuracy of each exit alone, and of the end."""
    x, y = made
    answers = [captured.segment(0, h.position, h.name).module()(x)[1] for h in captured.exits]
    answers.append(captured.segment(0, captured.graph.num_blocks).module()(x)[0])
    return [float((a.argmax(1) == y).float().mean()) for a in answers]


@pytest.mark.parametrize(("net", "make"), [(residual_net, bars), (text_encoder, words)])
def test_exits_of_a_residual_network_and_of_a_text_encoder_learn(net: object, make: object) -> None:
    assert callable(net)
    assert callable(make)
    captured, fresh = net(), make(1000, 3)
    learnt = train_exits(
        captured, batches(make(1500, 1)), count=2, options=TrainOptions(epochs=6, batch=50), held_out=batches(make(500, 2))
    )
    *exits, end = right(learnt, fresh)
    assert end > 0.8  # of four classes
    assert min(exits) > end - 0.1
    assert learnt.graph.exits[0].position < learnt.graph.exits[1].position
    assert learnt.backbone == captured.backbone  # the model's own answers stay as they are


def test_the_same_seed_gives_the_same_exits_and_another_seed_others() -> None:
    data, options = batches(bars(300, 1)), TrainOptions(epochs=1, batch=50)
    once, again = (train_exits(residual_net(), data, at=(3,), options=options) for _ in range(2))
    other = train_exits(residual_net(), data, at=(3,), options=replace(options, seed=1))
    assert once.graph.content_hash() == again.graph.content_hash() != other.graph.content_hash()


def test_without_labels_exits_learn_the_model_s_own_answers_also_from_a_stream() -> None:
    captured, (x, _) = residual_net(), bars(1000, 3)
    calls = []

    def stream() -> list[Sample]:
        calls.append(len(calls))
        return [((a,), None) for a in bars(900, 10 + len(calls))[0].split(45)]

    learnt = train_exits(captured, stream, at=(6,), options=TrainOptions(epochs=5, batch=45))
    early, end = (captured_answers(learnt, "e6", x), captured.reference((x,))[0])
    assert float((early.argmax(1) == end.argmax(1)).float().mean()) > 0.85
    assert len(calls) >= 6  # once to look, then once an epoch


def captured_answers(captured: Captured, name: str, x: torch.Tensor) -> torch.Tensor:
    made: torch.Tensor = captured.until_exit(name).reference((x,))[0]
    return made


def test_joint_training_changes_the_model_and_its_file_says_so(tmp_path: Path) -> None:
    captured, data = residual_net(), batches(bars(1500, 1))
    options = TrainOptions(epochs=4, batch=50, joint=True)
    learnt = train_exits(captured, data, at=(3,), options=options, held_out=batches(bars(300, 2)))
    assert learnt.backbone.weights_hash != captured.backbone.weights_hash
    before, after = right(captured, bars(1000, 3)), right(learnt, bars(1000, 3))
    assert after[-1] > before[-1] - 0.03  # it forgets little
    path = tmp_path / "joint.exits.safetensors"
    write_exits(path, learnt, original=captured)
    again = read_exits(path).attach(captured)
    assert again.graph.content_hash() == learnt.graph.content_hash()
    with pytest.raises(ModelError, match="has no weight"):
        captured.with_weights({"nothing": torch.zeros(1)})


def test_samples_and_labels_that_do_not_fit_are_refused(chain: Captured) -> None:
    x = torch.randn(2, 16)
    for labels, words_ in (
        (torch.zeros(2, 5), r"labels \[2, 5\] float32: the model decides \[2\] times"),
        (torch.zeros(3, dtype=torch.int64), r"labels \[3\] int64: the model decides \[2\] times"),
        (torch.tensor([0, 7]), r"labels from 0 to 7: the model has classes 0 to 4"),
    ):
        with pytest.raises(ModelError, match=words_):
            train_exits(chain, [((x,), labels)], count=1)
    with pytest.raises(ModelError, match="no samples to learn from"):
        train_exits(chain, [], count=1)
    with pytest.raises(ModelError, match="2 weights for 1 exits"):
        train_exits(chain, [((x,), None)], count=1, options=TrainOptions(weights=(1.0, 0.5)))
    with pytest.raises(SchemaError, match="distil is 2"):
        TrainOptions(distil=2)


def test_a_temperature_is_folded_into_the_last_layer_and_mends_overconfidence() -> None:
    torch.manual_seed(1)
    head = Head([nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, CLASSES))])
    x = torch.randn(5, 8)
    before = head(x)[0]
    fold_temperature(head, 0, 2.5)
    torch.testing.assert_close(head(x)[0], before / 2.5)
    # A head made ten times too sure is brought back: its cross-entropy on new samples falls to what a grid finds best.
    captured, data = residual_net(), batches(bars(900, 1))
    module = make_head(captured.graph, 6)
    train_exits(captured, data, heads={6: module}, options=TrainOptions(epochs=3, batch=45))
    with torch.no_grad():
        for parameter in module.branches[0][-1].parameters():  # type: ignore[index]
            parameter.mul_(10.0)
    vx, vy = bars(600, 5)
    (feature,) = captured.segment(0, 6).module()(vx)
    logits = module(feature)[0].detach()
    grid = min(float(nn.functional.cross_entropy(logits / t, vy)) for t in (2 ** (i / 8) for i in range(-24, 34)))
    from ecotone.model.exit_training import _best_temperature

    heat = _best_temperature(logits, vy)
    assert float(nn.functional.cross_entropy(logits / heat, vy)) <= grid + 1e-6
    assert heat > 3
