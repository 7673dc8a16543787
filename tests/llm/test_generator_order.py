"""What the engine says to send goes out in its order, also where text that came meanwhile ends a request."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from ecotone.decoding.answer import Piece
from ecotone.decoding.frame import Frame
from ecotone.decoding.messages import Peer
from ecotone.decoding.params import SamplingParams
from ecotone.decoding.words import Emit, Ended, Ending, Settings, Stop, Tick, Tokens
from ecotone.llm.generator import Generator

pytestmark = pytest.mark.torch


class Engine:
    """Frame 1 follows tokens that end a text, frame 2 frees the slot: the second must not overtake the first."""

    def __init__(self) -> None:
        self.stages = ()

    def handle(self, event: Any, now_s: float) -> list[Any]:
        to = Peer(node="one", shard=1)
        if isinstance(event, Tick):
            return [Tokens(1, 5, (7,)), Emit(to, Frame(epoch=1, number=1))]
        if isinstance(event, Stop):
            return [Emit(to, Frame(epoch=1, number=2)), Ended(1, Ending.STOP)]
        return []


class Stopped:
    is_stopped = True

    def take(self, effect: Tokens | Ended) -> Piece | None:
        return Piece(tokens=(7,)) if isinstance(effect, Tokens) else Piece(ending=effect.ending)


@pytest.mark.parametrize("is_broken", [False, True])
def test_a_stop_found_in_text_does_not_overtake_frames(is_broken: bool) -> None:
    sent: list[int] = []
    service = SimpleNamespace(name="driver", send=lambda node, name, shard, item: sent.append(item.number))
    generator = Generator(service, None, None, None, Settings(context=64), lambda params: Stopped())  # type: ignore[arg-type]
    generator._engine = Engine()  # type: ignore[assignment]
    pieces: list[Piece] = []

    def take(piece: Piece) -> None:
        pieces.append(piece)
        if is_broken and piece.ending is None:
            raise RuntimeError("the asker broke")

    generator.submit([1, 2], SamplingParams(temperature=0.0), take)
    generator._handle(Tick())
    assert sent == [1]
    while not generator._inbox.empty():
        job = generator._inbox.get()
        assert job is not None
        job()
    assert sent == ([1] if is_broken else [1, 2])
    assert pieces[-1].ending is (Ending.FAILED if is_broken else Ending.STOP)
