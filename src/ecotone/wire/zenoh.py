"""Eclipse Zenoh behind Wire: peer to peer on loopback or a LAN, through routers by configuration, under mutual TLS.

Keys: node N of cluster C takes frames on `ecotone/C/N/in/<sender>` and is announced by the liveliness token
`ecotone/C/N/alive/<session>`; nothing else is published. PeerUp and PeerDown come from the tokens, so a killed process is
seen at once and a frozen or cut one after `lease_s`. Zenoh keeps order and reliability per hop only and forgets what was
under way when a link dies: ecotone.protocol's link numbers, acknowledges and resends above it, and its credit keeps Zenoh's
own Block (5 s, then the transport is closed) from ever being reached.

Safe by default: it listens on one loopback address; elsewhere only with an identity, and then nothing but mutual TLS is
spoken.
"""

from __future__ import annotations

import contextlib
import ipaddress
import json
import re
import socket
import threading
import time
from dataclasses import dataclass, field
from typing import Any

import zenoh

from ecotone.trust.identity import Identity
from ecotone.wire.outbox import Outbox
from ecotone.wire.wire import Frame, Handler, NodeId, PeerDown, PeerUp, Priority, Received, WireError

__all__ = ["ZenohSettings", "ZenohWire", "endpoint", "lan_address"]

PRIORITIES = {
    Priority.CONTROL: zenoh.Priority.INTERACTIVE_HIGH,
    Priority.DATA: zenoh.Priority.DATA,
    Priority.BACKGROUND: zenoh.Priority.BACKGROUND,
}
MAX_MESSAGE_BYTES = 2 * 1024 * 1024  # a chunk of 1 MiB and its header: a peer cannot make us allocate more
LISTEN_ATTEMPTS = 5
# Batches of 64 KiB that wait per priority. A chunk fits whole, or sender and link would take turns 16 times for each of
# them (half the CPU time of the sender, measured); control has its own queue and does not wait behind these.
QUEUE_BATCHES = dict.fromkeys(
    ("control", "real_time", "interactive_high", "interactive_low", "data_high", "data_low"), 2
) | {
    "data": 16,
    "background": 16,
}
_NAME = re.compile(r"^[A-Za-z0-9_.\-]{1,64}$")
_ENDPOINT = re.compile(r"^(?:(?P<protocol>[a-z]+)/)?(?P<host>\[[0-9a-fA-F:.]+\]|[^/:#?\[\]]+):(?P<port>\d{1,5})$")


@dataclass(frozen=True, slots=True, kw_only=True)
class ZenohSettings:
    """How one node takes part. Endpoints are "HOST:PORT" or "PROTOCOL/HOST:PORT"; port 0 to listen takes a free one.

    `multicast` looks for peers on the LAN and is for joined clusters. `members`, where given, are the only certificate names
    that may send here, each under its own name alone; without it every certificate of the cluster's authority may. With
    several `connect` endpoints one that answers is enough; without `insist` none has to, they are tried again and again.
    `socket_buffer_bytes` = 65536 keeps control quick beside tensors on slow links. `trust_network` permits plain TCP off
    loopback, for laboratories. Raises WireError for settings that cannot work.
    """

    node: NodeId
    cluster: str = "local"
    listen: tuple[str, ...] = ("127.0.0.1:0",)
    connect: tuple[str, ...] = ()
    multicast: bool = False
    identity: Identity | None = None
    members: tuple[str, ...] = ()
    lease_s: float = 1.5
    connect_timeout_s: float = 5.0
    insist: bool = True
    socket_buffer_bytes: int | None = None
    trust_network: bool = False

    def __post_init__(self) -> None:
        for what, name in (("node", self.node), ("cluster", self.cluster), *(("member", name) for name in self.members)):
            if not _NAME.match(name):
                raise WireError(f'{what} name "{name}": use 1 to 64 letters, digits, "-", "_" or "."')
        for text in (*self.listen, *self.connect):
            endpoint(text, encrypted=self.identity is not None)
        if self.identity is None and not self.trust_network:
            for text in (*self.listen, *self.connect):
                if not _is_loopback(_split(text)[1]):
                    raise WireError(
                        f"{text}: an open node speaks on loopback only; join a cluster first (ecotone up --join CODE)"
                    )
        for text in self.listen:
            if _split(text)[1] in ("0.0.0.0", "[::]", "*"):
                raise WireError(f"{text}: listening on all addresses is refused; give one address of this machine")
        if self.multicast and self.identity is None:
            raise WireError("discovery by multicast is for joined clusters; join one first (ecotone up --join CODE)")
        if self.lease_s < 0.2 or self.connect_timeout_s <= 0:
            raise WireError(f"lease_s is {self.lease_s} and connect_timeout_s {self.connect_timeout_s}: too short to work")


@dataclass(slots=True)
class _Open:
    """What exists while a session is open."""

    session: Any
    token: Any = None
    subscribers: list[Any] = field(default_factory=list)
    publishers: dict[tuple[NodeId, Priority], Any] = field(default_factory=dict)


class ZenohWire:
    """One node's end of a Zenoh network; see Wire. Every method may be called from any thread."""

    def __init__(self, settings: ZenohSettings):
        self._settings = settings
        self._lock = threading.Lock()
        self._open: _Open | None = None
        self._handler: Handler | None = None
        self._sessions: dict[NodeId, str] = {}
        self._known: set[NodeId] = {settings.node}
        self._listening: tuple[str, ...] = ()
        self._outbox = Outbox(self._put)

    @property
    def listening(self) -> tuple[str, ...]:
        """The endpoints that peers can connect to, with real ports; empty before `start`."""
        return self._listening

    def start(self, handler: Handler) -> None:
        """Open the session, bounded by `connect_timeout_s`; raises WireError naming the endpoint that failed."""
        if self._handler is not None:
            raise WireError(f'node "{self._settings.node}": its wire has been started already')
        self._handler = handler
        opened = self._open = _Open(self._session())
        own = f"ecotone/{self._settings.cluster}/{self._settings.node}"
        everyone = f"ecotone/{self._settings.cluster}/*"
        opened.subscribers.append(opened.session.declare_subscriber(f"{own}/in/*", self._on_sample))
        liveliness = opened.session.liveliness()
        self._refuse_twin(liveliness, own)
        opened.subscribers.append(liveliness.declare_subscriber(f"{everyone}/alive/*", self._on_token, history=True))
        opened.token = liveliness.declare_token(f"{own}/alive/{opened.session.info.zid()}")

    def _refuse_twin(self, liveliness: Any, own: str) -> None:
        """Raise where another process bears this name; one that has just died may be seen until its lease runs out."""
        end = time.monotonic() + 1.5 * self._settings.lease_s
        while any(True for _ in liveliness.get(f"{own}/alive/*", timeout=0.5)):
            if time.monotonic() > end:
                self.close()
                raise WireError(
                    f'node "{self._settings.node}" of cluster "{self._settings.cluster}" is up already, in another process; '
                    "stop that one (a command on the source device plays that device itself, without ecotone up)"
                )
            time.sleep(0.1)

    def send(self, peer: NodeId, frame: Frame, priority: Priority) -> None:
        """Queue `frame` for `peer`; see Wire.send. Never waits for a slow link."""
        if self._open is None:
            raise WireError(f'node "{self._settings.node}": its wire is closed')
        if peer not in self._known:
            raise WireError(f'no node "{peer}" was seen in cluster "{self._settings.cluster}"; is it up and reachable?')
        self._outbox.send(peer, frame, priority)

    def _put(self, peer: NodeId, frame: Frame, priority: Priority) -> None:
        opened = self._open
        if opened is None:
            raise WireError(f'node "{self._settings.node}": its wire is closed')
        publisher = opened.publishers.get((peer, priority)) or self._publisher(opened, peer, priority)
        try:
            publisher.put(frame)
        except zenoh.ZError as error:
            raise WireError(f'sending to "{peer}" failed: {_plain(error)}') from None

    def close(self) -> None:
        """Leave: the peers see PeerDown at once. Closing twice does nothing."""
        with self._lock:
            opened, self._open = self._open, None
        self._outbox.close()
        if opened is not None:
            with contextlib.suppress(zenoh.ZError):
                if opened.token is not None:
                    opened.token.undeclare()
                opened.session.close()

    def _publisher(self, opened: _Open, peer: NodeId, priority: Priority) -> Any:
        with self._lock:
            try:
                publisher = opened.session.declare_publisher(
                    f"ecotone/{self._settings.cluster}/{peer}/in/{self._settings.node}",
                    priority=PRIORITIES[priority],
                    congestion_control=zenoh.CongestionControl.BLOCK,
                    express=priority is Priority.CONTROL,
                )
            except zenoh.ZError as error:
                raise WireError(f'sending to "{peer}" failed: {_plain(error)}') from None
            opened.publishers[peer, priority] = publisher
            return publisher

    def _on_sample(self, sample: Any) -> None:
        handler = self._handler
        if handler is not None and self._open is not None:
            peer = NodeId(str(sample.key_expr).rpartition("/")[2])
            handler(Received(peer, sample.payload.to_bytes()))

    def _on_token(self, sample: Any) -> None:
        parts = str(sample.key_expr).split("/")
        peer, session = NodeId(parts[2]), parts[4]
        if peer == self._settings.node or self._handler is None:
            return
        events: list[PeerUp | PeerDown] = []
        with self._lock:
            before = self._sessions.get(peer)
            if sample.kind == zenoh.SampleKind.PUT and before != session:
                # A restarted process announces itself before the lease of its forerunner has run out.
                events = [PeerDown(peer), PeerUp(peer)] if before else [PeerUp(peer)]
                self._sessions[peer] = session
                self._known.add(peer)
            elif sample.kind == zenoh.SampleKind.DELETE and before == session:
                del self._sessions[peer]
                events = [PeerDown(peer)]
        for event in events:
            if isinstance(event, PeerDown):
                self._outbox.forget(peer)
            self._handler(event)

    def _session(self) -> Any:
        settings = self._settings
        problem = ""
        for _ in range(LISTEN_ATTEMPTS):
            listen = tuple(_with_port(endpoint(text, encrypted=settings.identity is not None)) for text in settings.listen)
            try:
                session = zenoh.open(_config(settings, listen))
            except zenoh.ZError as error:
                problem = _plain(error)
                free = any(text.endswith(":0") for text in settings.listen)
                if free and "in use" in problem:  # somebody took the port between our choice and Zenoh's use of it
                    continue
                break
            if settings.insist and len(settings.connect) > 1 and not _connected(session, settings.connect_timeout_s):
                session.close()  # type: ignore[no-untyped-call]
                problem = "unable to connect"
                break
            self._listening = listen
            return session
        raise WireError(self._explain(problem))

    def _explain(self, problem: str) -> str:
        settings = self._settings
        if "nable to connect" in problem or "imeout" in problem:
            unsure = " or it refused our certificate" if settings.identity else ""
            return (
                f"no node answers at {', '.join(settings.connect)} within {settings.connect_timeout_s:g} s{unsure}; "
                f"start it there (ecotone up) or mend the address"
            )
        if "in use" in problem:
            return f"{', '.join(settings.listen)}: the address is in use; stop the other program or choose another port"
        if "assign requested" in problem:
            return f"{', '.join(settings.listen)}: this machine has no such address; give one of its own"
        return f'node "{settings.node}": the network did not open: {problem}'


def endpoint(text: str, *, encrypted: bool = False) -> str:
    """`text` as Zenoh writes it ("tcp/127.0.0.1:7447"), TLS where `encrypted`; raises WireError for anything unclear."""
    protocol, host, port = _split(text)
    wanted = "tls" if encrypted else "tcp"
    if protocol not in ("", wanted):
        reason = "a member of a cluster speaks only tls/" if encrypted else "without an identity only tcp/ can be spoken"
        raise WireError(f"{text}: {reason}; write {wanted}/{host}:{port}")
    return f"{wanted}/{host}:{port}"


def lan_address() -> str | None:
    """The address of this machine on its default network, None without one; sends nothing."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # documentation range; a datagram socket only looks up the route
            return str(probe.getsockname()[0])
        except OSError:
            return None


def _split(text: str) -> tuple[str, str, int]:
    match = _ENDPOINT.match(text)
    if match is None or int(match["port"]) > 65535:
        raise WireError(f'endpoint "{text}" is not understood; write HOST:PORT, for example 192.168.1.5:7447')
    return match["protocol"] or "", match["host"], int(match["port"])


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _with_port(text: str) -> str:
    """Choose a free port where `text` asks for one: Zenoh's Python interface does not tell which one it took."""
    protocol, host, port = _split(text)
    if port:
        return text
    bare = host.strip("[]")
    family = socket.AF_INET6 if ":" in bare else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.bind((bare, 0))
            return f"{protocol}/{host}:{probe.getsockname()[1]}"
    except OSError as error:
        raise WireError(f"{text}: cannot listen there: {error.strerror or error}; give an address of this machine") from None


def _connected(session: Any, timeout_s: float) -> bool:
    """Wait until the session has a transport to anybody."""
    found = threading.Event()
    listener = session.info.declare_transport_events_listener(lambda _event: found.set(), history=True)
    try:
        return found.wait(timeout_s)
    finally:
        listener.undeclare()


def _plain(error: Exception) -> str:
    """Zenoh's message without the places in its source."""
    return re.sub(r"\s+at \S+:\d+\.?", "", str(error)).strip()


def _config(settings: ZenohSettings, listen: tuple[str, ...]) -> zenoh.Config:
    encrypted = settings.identity is not None
    values: dict[str, object] = {
        "mode": "peer",
        "listen/endpoints": list(listen),
        "listen/exit_on_failure": True,
        "listen/timeout_ms": 0,
        "connect/endpoints": [endpoint(text, encrypted=encrypted) for text in settings.connect],
        # Of several, Zenoh would insist on every one; where it does not insist it goes on trying in the background.
        "connect/exit_on_failure": settings.insist and len(settings.connect) == 1,
        "connect/timeout_ms": round(settings.connect_timeout_s * 1000),
        "connect/retry": {"period_init_ms": 100, "period_max_ms": 1000, "period_increase_factor": 2},
        "scouting/multicast/enabled": settings.multicast,
        "scouting/gossip/enabled": True,
        "transport/unicast/open_timeout": round(settings.connect_timeout_s * 1000),
        "transport/link/tx/lease": round(settings.lease_s * 1000),
        "transport/link/rx/max_message_size": MAX_MESSAGE_BYTES,
        "transport/link/tx/queue/size": QUEUE_BATCHES,
        "transport/link/protocols": ["tls"] if encrypted else ["tcp"],
        "transport/shared_memory/enabled": False,
        "transport/unicast/compression/enabled": False,
    }
    if settings.socket_buffer_bytes:
        for option in ("so_sndbuf", "so_rcvbuf"):
            values[f"transport/link/{'tls' if encrypted else 'tcp'}/{option}"] = settings.socket_buffer_bytes
    if settings.identity is not None:
        values |= _tls(settings.identity) | {"access_control": _access(settings)}
    config = zenoh.Config()
    for key, value in values.items():
        config.insert_json5(key, json.dumps(value))
    return config


def _tls(identity: Identity) -> dict[str, object]:
    files = {
        "root_ca_certificate": identity.authority,
        "listen_certificate": identity.certificate,
        "listen_private_key": identity.key,
        "connect_certificate": identity.certificate,
        "connect_private_key": identity.key,
    }
    flags = {"enable_mtls": True, "verify_name_on_connect": True, "close_link_on_expiration": True}
    return {f"transport/link/tls/{name}": str(path) for name, path in files.items()} | {
        f"transport/link/tls/{name}": value for name, value in flags.items()
    }


def _access(settings: ZenohSettings) -> dict[str, object]:
    """Access rules, default deny: the cluster's keys and no others; with `members`, each under its own name alone."""
    root = f"ecotone/{settings.cluster}"
    own, everything = settings.node, ["put", "declare_subscriber", "liveliness_token", "declare_liveliness_subscriber"]
    tokens = [f"{root}/*/alive/*"]
    if not settings.members:
        keys = [f"{root}/*/in/*", *tokens]
        rules = [_rule("cluster", keys, ["ingress", "egress"], [*everything, "liveliness_query"])]
        return _policies(rules, [("cluster", None)])
    rules = [
        _rule("watch", tokens, ["ingress", "egress"], ["declare_liveliness_subscriber", "liveliness_query"]),
        _rule("speak", [f"{root}/*/in/{own}"], ["egress"], ["put"]),
        _rule("listen", [f"{root}/{own}/in/*"], ["egress"], ["declare_subscriber"]),
        _rule("live", [f"{root}/{own}/alive/*"], ["egress"], ["liveliness_token"]),
    ]
    grants: list[tuple[str, str | None]] = [(rule["id"], None) for rule in rules]
    for name in settings.members:
        rules.append(_rule(f"put {name}", [f"{root}/{own}/in/{name}"], ["ingress"], ["put"]))
        rules.append(_rule(f"sub {name}", [f"{root}/{name}/in/*"], ["ingress"], ["declare_subscriber"]))
        rules.append(_rule(f"live {name}", [f"{root}/{name}/alive/*"], ["ingress"], ["liveliness_token"]))
        grants += [(f"{kind} {name}", name) for kind in ("put", "sub", "live")]
    return _policies(rules, grants)


def _rule(name: str, keys: list[str], flows: list[str], messages: list[str]) -> dict[str, Any]:
    return {"id": name, "permission": "allow", "flows": flows, "messages": messages, "key_exprs": keys}


def _policies(rules: list[dict[str, Any]], grants: list[tuple[str, str | None]]) -> dict[str, object]:
    """`grants` are (rule, certificate name); None is every certificate that mutual TLS let in."""
    names = sorted({name for _, name in grants if name})
    subjects: list[dict[str, Any]] = [
        {"id": "everyone"},
        *({"id": f"cn {name}", "cert_common_names": [name]} for name in names),
    ]
    return {
        "enabled": True,
        "default_permission": "deny",
        "rules": rules,
        "subjects": subjects,
        "policies": [{"rules": [rule], "subjects": [f"cn {name}" if name else "everyone"]} for rule, name in grants],
    }
