"""The routes of other hosts. Those that call one wait for it, and so may take as long as it does."""

from typing import Any

from sysctr.api import upgrade
from sysctr.api.fields import Array, Boolean, Field, Nullable, Number, Text
from sysctr.api.route import BYTES, Call, Route

_NAME = Text(63)
_ADDRESSES = Field("addresses", Array(Text(300), 16), "HOST:PORT where it is reached; [IPV6]:PORT", False)
_FORCE = Field("force", Boolean(), "here alone, if it cannot be reached")


def _list(engine: Any, call: Call) -> Any:
    return {"peers": engine.peers.list(), "here": engine.peers.status()}


async def _show(api: Any, _request: Any, call: Call) -> Any:
    return {"peer": await api.run_waiting(_calling(api, "show", call.path["name"]))}


async def _join(api: Any, _request: Any, call: Call) -> Any:
    return {"peer": await api.run_waiting(_calling(api, "join", **call.given))}


async def _rotate(api: Any, _request: Any, call: Call) -> Any:
    return await api.run_waiting(_calling(api, "rotate"))


async def _remove(api: Any, _request: Any, call: Call) -> Any:
    await api.run_waiting(_calling(api, "remove", call.path["name"], **call.body))
    return {}


def _calling(api: Any, method: str, *arguments: Any, **options: Any) -> Any:
    """Return what an executor runs: a method of the peers with what it is given."""
    return lambda: getattr(api.engine.peers, method)(*arguments, **options)


def _change(engine: Any, call: Call) -> Any:
    changes = call.given
    name, new = call.path["name"], changes.pop("name", None)
    peer = engine.peers.restrict(name, **changes)
    if new is not None:
        peer = engine.peers.rename(name, new)
    return {"peer": peer}


PEER_ROUTES: tuple[Route, ...] = (
    Route("GET", "/1/peers", _list, "hosts that this one trusts, and who it is", answer="peers here"),
    Route(
        "POST", "/1/peers/token",
        lambda engine, call: engine.peers.token(**call.given), "make a token with which a host can join",
        (
            Field("expires_s", Nullable(Number(1, 30 * 86400)), "until when it holds, in seconds (3600)"),
            _ADDRESSES,
            Field("listen", Nullable(Text(300)), "ADDRESS:PORT to listen at from now on"),
        ),
        answer="token expires fingerprint addresses",
    ),
    Route(
        "POST", "/1/peers/join", _join, "trust the host that made a token, and be trusted by it",
        (
            Field("token", Text(8192), "the token", required=True),
            Field("name", Nullable(_NAME), "what it is called here; without it as it calls itself"),
            _ADDRESSES,
        ),
        answer="peer",
    ),
    Route(
        "POST", "/1/peers/rotate", _rotate, "get a new key and tell all peers",
        answer="fingerprint next waits_for",
    ),
    Route(
        "GET", "/1/peers/{name}/api", upgrade.peer_api,
        "the API of a peer that lets this host manage it: upgrade to sysctr-api", status=101, media=BYTES,
    ),
    Route("GET", "/1/peers/{name}", _show, "a peer, and whether it can be reached now", answer="peer"),
    Route(
        "PATCH", "/1/peers/{name}", _change, "change the name of a peer, what it may do, and where it is",
        (
            Field("name", Nullable(_NAME), "its new name"),
            Field("may_send", Nullable(Boolean()), "whether it may send containers here"),
            Field("may_receive", Nullable(Boolean()), "whether containers may be sent to it"),
            Field("may_pull", Nullable(Boolean()), "whether it may fetch templates here"),
            Field("may_manage", Nullable(Boolean()), "whether it may do here all that root may"),
            Field("pools", Nullable(Array(_NAME, 64)), "pools that its containers may be kept in; none: all"),
            _ADDRESSES,
        ),
        answer="peer",
    ),
    Route(
        "DELETE", "/1/peers/{name}", _remove, "end the trust between this host and another", (_FORCE,)
    ),
)  # fmt: skip
