"""What is stuck: frames that do not come back, nodes that say nothing. Detected by deadlines, never a silent hang.

Frames return in the order in which they were sent, so only the time since the last return matters. After a quiet time (a
floor, or three times the longest gap of late) all nodes are probed; they answer at once, whatever their shards compute.
A node that does not answer in time is lost, and so is one whose answer lacks a shard: it began anew. If all answer, the
oldest frame lies with one stage: that one is lost when it has computed a single thing for too long, or when the frame does
not reach it from a stage that has long sent it on. Any progress that the answers show starts the waiting anew: slow is not
lost. Where a node that was called lost for its silence answers after all, silence is borne twice as long from then on, up
to a bound, until a while has passed without that: on overloaded machines every loss would make the next one likelier.
"""

from __future__ import annotations

from collections.abc import Callable

from ecotone.decoding.messages import Alive, Message, Peer, Probe, ShardState
from ecotone.decoding.state import Mode, State
from ecotone.decoding.words import Say

__all__ = ["Watch"]

_GAP_FADE = 0.98
_MOST_PATIENCE, _CALM_S = 8.0, 120.0


class Watch:
    """Calls `lose(nodes, reason)` when nodes of the pipeline count as lost."""

    def __init__(self, state: State, lose: Callable[[tuple[str, ...], str], None]):
        self._state, self._lose = state, lose
        self._down: dict[str, float] = {}  # since when a node's link is down
        self._nonce = 0
        self._probed_s: float | None = None  # the first probe of this round
        self._asked_s = 0.0  # the last one
        self._unanswered: dict[str, float] = {}  # node -> when the oldest probe was sent that it did not answer
        self._emptied: set[str] = set()  # nodes that answered, and have not all of their shards
        self._states: dict[int, ShardState] = {}
        self._stuck: tuple[int, int, float] | None = None  # frame, stage it does not reach, since
        self._silenced: set[str] = set()  # nodes called lost for silence and not heard of since
        self._patience, self._alarmed_s = 1.0, 0.0  # times silent_s; the last false alarm

    def node(self, node: str, *, is_up: bool) -> None:
        """A node's link went up or down."""
        if is_up:
            self._down.pop(node, None)
        else:
            self._down.setdefault(node, self._state.now_s)

    def heard(self, node: str) -> None:
        self._unanswered.pop(node, None)
        now_s = self._state.now_s
        if node in self._silenced:
            self._silenced.discard(node)
            self._patience, self._alarmed_s = min(2 * self._patience, _MOST_PATIENCE), now_s

    def _silent_s(self) -> float:
        if self._state.now_s - self._alarmed_s > _CALM_S:
            self._patience = 1.0
        return self._state.settings.silent_s * self._patience

    def progressed(self) -> None:
        """A frame came back."""
        state = self._state
        gap_s = state.now_s - state.progress_s
        state.pace.gap_s = max(_GAP_FADE * state.pace.gap_s, gap_s)
        self._calm()

    def message(self, node: str, message: Message) -> None:
        """An answer to a probe."""
        if not isinstance(message, Alive) or message.nonce != self._nonce or self._probed_s is None:
            return
        moved = False
        for shard in message.shards:
            before = self._states.get(shard.shard)
            counts = (shard.epoch, shard.received, shard.finished, shard.works)
            moved = moved or (
                before is not None and counts != (before.epoch, before.received, before.finished, before.works)
            )
            self._states[shard.shard] = shard
        there = {shard.shard for shard in message.shards}
        if any(stage.peer.node == node and stage.peer.shard not in there for stage in self._state.pipeline):
            self._emptied.add(node)
        if moved:
            self._state.progress_s = self._state.now_s
            self._probed_s, self._stuck = None, None

    def run(self) -> None:
        """Find what is lost now."""
        state = self._state
        mine = state.nodes()
        gone = [n for n, since in self._down.items() if n in mine and state.now_s >= since + state.settings.grace_s]
        if gone:
            for node in gone:
                del self._down[node]
            self._lose(tuple(gone), "the link to it went down")
        if state.mode not in (Mode.RUNNING, Mode.DRAINING) or not (state.flights or state.replays):
            self._probed_s = None
            return
        if state.now_s < self._quiet_end():
            return
        self._probe()
        self._judge()

    def wake_s(self) -> float | None:
        """When to look again at the latest; None where nothing is watched."""
        state = self._state
        mine = state.nodes()
        times = [since + state.settings.grace_s for node, since in self._down.items() if node in mine]
        if state.mode in (Mode.RUNNING, Mode.DRAINING) and (state.flights or state.replays):
            next_s = self._asked_s + state.settings.probe_s if self._probed_s is not None else 0.0
            times.append(max(self._quiet_end(), next_s))
        return min(times, default=None)

    def _quiet_end(self) -> float:
        state = self._state
        oldest = next(iter(state.flights.values()), None)
        expected_s = 0.0
        if oldest is not None:
            expected_s = state.pace.loop_s(oldest.num_tokens, is_few=oldest.kind != "prefill")
        return state.progress_s + max(state.settings.quiet_s, 3 * max(state.pace.gap_s, expected_s))

    def _calm(self) -> None:
        self._state.progress_s = self._state.now_s
        self._probed_s, self._stuck = None, None
        self._states.clear()
        self._emptied.clear()
        self._unanswered.clear()

    def _probe(self) -> None:
        state = self._state
        if self._probed_s is None:
            self._nonce += 1
            self._probed_s, self._asked_s = state.now_s, -1.0
            self._states.clear()
            self._emptied.clear()
        if state.now_s >= self._asked_s + state.settings.probe_s:
            self._asked_s = state.now_s
            for node in state.nodes():
                self._unanswered.setdefault(node, state.now_s)
                state.out.append(Say(Peer(node=node), Probe(nonce=self._nonce)))

    def _judge(self) -> None:
        state = self._state
        if self._emptied:
            emptied = tuple(self._emptied)
            self._calm()
            self._lose(emptied, "it lost its stage: it was started anew")
            return
        silent_s = self._silent_s()
        since_s = state.now_s - silent_s
        silent = [node for node in state.nodes() if self._unanswered.get(node, state.now_s) <= since_s]
        if silent:
            self._calm()
            self._silenced |= set(silent)
            self._lose(tuple(silent), f"nothing was heard of it for {silent_s:g} s")
            return
        oldest = next(iter(state.flights.values()), None)
        if oldest is None or any(stage.peer.shard not in self._states for stage in state.pipeline):
            return
        for index, stage in enumerate(state.pipeline):
            at = self._states[stage.peer.shard]
            if at.epoch == state.epoch and at.finished >= oldest.number:
                continue
            if at.epoch == state.epoch and at.received >= oldest.number:
                self._is_stalled(index, at, oldest.num_tokens, oldest.kind != "prefill")
            else:
                self._is_cut_off(index, oldest.number, oldest.size_bytes)
            return
        self._is_cut_off(len(state.pipeline), oldest.number, 4096)

    def _is_stalled(self, index: int, at: ShardState, tokens: int, is_few: bool) -> None:
        state = self._state
        limit_s = max(state.settings.stall_s, 10 * state.pace.stage_s(tokens, is_few=is_few))
        if at.busy_s > limit_s:
            node = state.pipeline[index].peer.node
            self._calm()
            self._lose((node,), f"stage {index} has worked on one step for {at.busy_s:.1f} s")

    def _is_cut_off(self, index: int, frame: int, size_bytes: int) -> None:
        """The frame left the stage before `index` and is not there; index = number of stages: the result is not here."""
        state = self._state
        if self._stuck is None or self._stuck[:2] != (frame, index):
            self._stuck = (frame, index, state.now_s)
            return
        ends = [state.settings.rates.get(pair, state.settings.default_rate_bytes_per_s) for pair in self._ends(index)]
        if state.now_s - self._stuck[2] > state.settings.reach_s + 3 * size_bytes / min(ends):
            node = state.pipeline[min(index, len(state.pipeline) - 1)].peer.node
            self._calm()
            self._lose(
                (node,), f"frames do not reach stage {index}" if index < len(state.pipeline) else "results do not come"
            )

    def _ends(self, index: int) -> list[tuple[str, str]]:
        nodes = [stage.peer.node for stage in self._state.pipeline]
        return [(nodes[index - 1] if index else "", nodes[index] if index < len(nodes) else "")]
