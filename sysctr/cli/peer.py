"""Other hosts that containers can be migrated to: trust them, look at them, and end that."""

import sys

from sysctr import errors
from sysctr.cli.command import Command, for_each, json_option, words
from sysctr.cli.output import moment, notice, plain, print_fields, print_json, print_table
from sysctr.cli.table import Column, neutralise
from sysctr.client import field, path

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from typing import Any

    from sysctr.client import Client

# The daemon waits for another host, with time-outs of its own.
_PATIENCE_S = 180.0
# Fields of /proc/self/stat, counted behind the name (proc(5)): arg_start and arg_end.
_ARG_START, _ARG_END = 45, 46
_MAY = (
    ("may_send", "send"), ("may_receive", "receive"), ("may_pull", "pull"), ("may_manage", "manage"),
)  # fmt: skip

_COLUMNS = (
    Column("NAME", flexible=True),
    Column("ADDRESSES", flexible=True, narrowest=16),
    Column("MAY"),
    Column("POOLS", flexible=True, optional=True),
    Column("VERSION", optional=True),
    Column("LAST SEEN"),
)


def may(peer: "dict[str, Any]") -> str:
    """Return what a peer may do here, in words."""
    return ",".join(word for name, word in _MAY if peer[name]) or "nothing"


def _row(peer: "dict[str, Any]") -> "list[str]":
    return [
        peer["name"], plain(peer["addresses"]) or "-", may(peer), plain(peer["pools"]) or "all",
        peer["version"] or "-", moment(peer["last_seen"])[:16] if peer["last_seen"] else "never",
    ]  # fmt: skip


def _list_arguments(parser: "argparse.ArgumentParser") -> None:
    json_option(parser)
    parser.add_argument("-q", "--quiet", action="store_true", help="print names only")


def _list(arguments: "argparse.Namespace", client: "Client") -> None:
    answer = client.get(path("peers"))
    peers = field(answer, "peers")
    if arguments.json:
        print_json(peers)
    elif arguments.quiet:
        for peer in peers:
            print(peer["name"])
    else:
        print_table(
            _COLUMNS,
            [_row(peer) for peer in peers],
            if_empty="no peers; `sysctr peer token` here and `sysctr peer join` there make one",
        )
        if answer["here"]["problem"]:
            notice(f"warning: {answer['here']['problem']}")


def _one_peer(parser: "argparse.ArgumentParser") -> None:
    words(parser.add_argument("peer", metavar="PEER", help="name of the peer"), "peers")


def _show_arguments(parser: "argparse.ArgumentParser") -> None:
    _one_peer(parser)
    json_option(parser)


def _show(arguments: "argparse.Namespace", client: "Client") -> None:
    peer = field(client.get(path("peers", arguments.peer), timeout_s=_PATIENCE_S), "peer")
    if arguments.json:
        print_json(peer)
        return
    print_fields(
        [
            ("name", peer["name"]),
            ("reachable", plain(peer["reachable"])),
            ("problem", peer["error"]),
            ("addresses", plain(peer["addresses"])),
            ("fingerprint", peer["fingerprint"]),
            ("version", peer["version"]),
            ("kernel", plain(peer.get("kernel"))),
            ("architecture", plain(peer.get("arch"))),
            ("may send here", plain(peer["may_send"])),
            ("may receive", plain(peer["may_receive"])),
            ("may pull", plain(peer["may_pull"])),
            ("may manage", plain(peer["may_manage"])),
            ("pools", plain(peer["pools"]) or "all"),
            ("since", moment(peer["created"])),
            ("last seen", moment(peer["last_seen"]) if peer["last_seen"] else "never"),
        ]
    )


def _token_arguments(parser: "argparse.ArgumentParser") -> None:
    parser.add_argument(
        "--expires", metavar="TIME", default="1h", help="until when it holds: 10m, 1h, 7d (default: 1h)"
    )
    parser.add_argument(
        "--address", metavar="HOST:PORT", action="append", dest="addresses",
        help="where this host is reached; repeatable (default: what host.toml says, or all it has)",
    )  # fmt: skip
    parser.add_argument(
        "--listen", metavar="IP:PORT", help="where to listen from now on (default: [::]:8645, all addresses)"
    )
    json_option(parser)


def _token(arguments: "argparse.Namespace", client: "Client") -> None:
    from sysctr.config.schedule import parse_span

    body: dict[str, Any] = {"expires_s": int(parse_span(arguments.expires))}
    if arguments.addresses:
        body["addresses"] = arguments.addresses
    if arguments.listen:
        body["listen"] = arguments.listen
    made = client.post(path("peers", "token"), body)
    if arguments.json:
        print_json(made)
        return
    print(made["token"])
    sys.stdout.flush()
    notice(f"it holds once, until {moment(made['expires'])}, for who reaches {plain(made['addresses'])}")
    notice("on the other host: `sysctr peer join`, which asks for it")


def _join_arguments(parser: "argparse.ArgumentParser") -> None:
    parser.add_argument(
        "token", metavar="TOKEN", nargs="?", help="the token; - reads it from stdin (default: ask for it)"
    )
    words(
        parser.add_argument("--token-file", metavar="FILE", help="read the token from a file's first line"),
        "files",
    )
    parser.add_argument("--name", metavar="NAME", help="what the other host is called here")
    parser.add_argument(
        "--address", metavar="HOST:PORT", action="append", dest="addresses",
        help="where this host is reached; repeatable (default: what host.toml says, or all it has)",
    )  # fmt: skip
    json_option(parser)


def _join(arguments: "argparse.Namespace", client: "Client") -> None:
    if arguments.token and arguments.token != "-":
        wipe_argument(arguments.token)
    body: dict[str, Any] = {"token": _read_token(arguments)}
    if arguments.name:
        body["name"] = arguments.name
    if arguments.addresses:
        body["addresses"] = arguments.addresses
    peer = field(client.post(path("peers", "join"), body, timeout_s=_PATIENCE_S), "peer")
    if arguments.json:
        print_json(peer)
        return
    print(neutralise(f"joined {peer['name']}, which trusts this host now as this host trusts it"))


def _read_token(arguments: "argparse.Namespace") -> str:
    if arguments.token is not None and arguments.token_file is not None:
        raise errors.UsageError("cannot join: give a token or --token-file, and not both")
    if arguments.token not in (None, "-"):
        return str(arguments.token)
    name = arguments.token_file or arguments.token
    if name is not None:
        from sysctr.cli.settings import read_secret

        return read_secret(name, "token")
    import getpass

    if not sys.stdin.isatty():
        raise errors.UsageError(
            "cannot ask for the token: there is no terminal", "`sysctr peer join -` reads it from stdin"
        )
    token = getpass.getpass("token: ").strip()
    if not token:
        raise errors.UsageError("cannot join: no token was given")
    return token


def wipe_argument(secret: str) -> None:
    """Take a secret out of our command line, which every user of this host can read in /proc."""
    import ctypes

    with open("/proc/self/stat", "rb") as file:
        fields = file.read().rpartition(b")")[2].split()
    start, end = int(fields[_ARG_START]), int(fields[_ARG_END])
    if not 0 < start < end:
        return  # who may not trace us does not see where it is, and then nobody reads it there
    with open("/proc/self/cmdline", "rb") as file:
        line = file.read()
    wanted = secret.encode("utf-8", "surrogateescape")
    at = line.find(wanted)
    while 0 <= at <= end - start - len(wanted):
        ctypes.memset(start + at, ord("x"), len(wanted))
        at = line.find(wanted, at + len(wanted))


def _rename_arguments(parser: "argparse.ArgumentParser") -> None:
    _one_peer(parser)
    parser.add_argument("name", metavar="NAME", help="its new name: lower-case letters, digits, -")
    json_option(parser)


def _rename(arguments: "argparse.Namespace", client: "Client") -> None:
    answer = client.request("PATCH", path("peers", arguments.peer), {"name": arguments.name})
    if arguments.json:
        print_json(answer["peer"])
        return
    print(neutralise(f"renamed {arguments.peer} to {arguments.name}"))


def _remove_arguments(parser: "argparse.ArgumentParser") -> None:
    words(parser.add_argument("peers", metavar="PEER", nargs="+", help="name of a peer"), "peers")
    parser.add_argument("--force", action="store_true", help="on this host alone, if it cannot be reached")


def _remove(arguments: "argparse.Namespace", client: "Client") -> int:
    def act(peer: str) -> None:
        body = {"force": arguments.force}
        client.request("DELETE", path("peers", peer), body, timeout_s=_PATIENCE_S)
        print(neutralise(f"removed {peer}"))

    return for_each(dict.fromkeys(arguments.peers), act)


def _restrict_arguments(parser: "argparse.ArgumentParser") -> None:
    _one_peer(parser)
    for name, word, doc in (
        ("may_send", "send", "send containers here"),
        ("may_receive", "receive", "get containers of this host"),
        ("may_pull", "pull", "fetch templates of this host"),
        ("may_manage", "manage", "do here all that root may, as with sysctr --host"),
    ):
        parser.add_argument(
            f"--{word}", metavar="yes|no", choices=("yes", "no"), dest=name, help=f"whether it may {doc}"
        )
    pools = parser.add_argument(
        "--pool", metavar="POOL", action="append", dest="pools",
        help="its containers may be kept in this pool, and those named besides; 'all' ends that; repeatable",
    )  # fmt: skip
    words(pools, "pools")
    parser.add_argument(
        "--address", metavar="HOST:PORT", action="append", dest="addresses",
        help="where it is reached now; repeatable",
    )  # fmt: skip
    json_option(parser)


def _restrict(arguments: "argparse.Namespace", client: "Client") -> None:
    body: dict[str, Any] = {
        name: getattr(arguments, name) == "yes" for name, _ in _MAY if getattr(arguments, name) is not None
    }
    if arguments.pools:
        body["pools"] = [] if arguments.pools == ["all"] else arguments.pools
    if arguments.addresses:
        body["addresses"] = arguments.addresses
    if not body:
        raise errors.UsageError(
            f"cannot restrict {arguments.peer}: nothing is said",
            "give --send, --receive, --pull, --manage, --pool or --address",
        )
    peer = field(client.request("PATCH", path("peers", arguments.peer), body), "peer")
    if arguments.json:
        print_json(peer)
        return
    print(neutralise(f"{peer['name']} may {may(peer)}; pools: {plain(peer['pools']) or 'all'}"))


def _rotate_arguments(parser: "argparse.ArgumentParser") -> None:
    json_option(parser)


def _rotate(arguments: "argparse.Namespace", client: "Client") -> None:
    answer = client.post(path("peers", "rotate"), timeout_s=_PATIENCE_S)
    if arguments.json:
        print_json(answer)
        return
    if answer["waits_for"]:
        print(neutralise(f"a new key is made; it holds when {plain(answer['waits_for'])} can be told"))
    else:
        print("this host has a new key, and its peers know it")


COMMANDS = {
    "peer list": Command(_list_arguments, _list, examples=("sysctr peer list", "sysctr peer list --json")),
    "peer show": Command(_show_arguments, _show, examples=("sysctr peer show paris",)),
    "peer token": Command(
        _token_arguments,
        _token,
        more=(
            "Whoever has the token makes this host trust theirs, once, until it expires. Until there is a",
            "peer or a token nothing listens on this host.",
            "",
        ),
        examples=(
            "sysctr peer token",
            "sysctr peer token --expires 10m --address ct1.example.org:8645",
            "sysctr peer token | ssh paris sysctr peer join -",
        ),
    ),
    "peer join": Command(
        _join_arguments,
        _join,
        more=(
            "A token that is typed as an argument stays in the history of the shell, where it is of no use",
            "to anybody after this.",
            "",
        ),
        examples=("sysctr peer join", "sysctr peer join - --name paris < token"),
    ),
    "peer rename": Command(_rename_arguments, _rename, examples=("sysctr peer rename node2 paris",)),
    "peer remove": Command(
        _remove_arguments, _remove, examples=("sysctr peer remove paris", "sysctr peer remove paris --force")
    ),
    "peer restrict": Command(
        _restrict_arguments,
        _restrict,
        examples=(
            "sysctr peer restrict paris --send no",
            "sysctr peer restrict paris --pool fast --pool big",
            "sysctr peer restrict paris --pool all --address 192.0.2.7:8645",
        ),
    ),
    "peer rotate": Command(
        _rotate_arguments,
        _rotate,
        more=("Tokens that were not used yet hold no more.", ""),
        examples=("sysctr peer rotate",),
    ),
}
