"""One nft table of our own, forwarding, and what other people's filters on the host mean for containers.

An accept in our table ends our chain only: a drop in anybody else's chain on the same hook still holds.
So where Docker filters the host, our rules are also put into DOCKER-USER, the chain it keeps for the
admin, each tagged with a comment by which exactly they are found again. Other filters are the admin's own
and are not changed; problems() says what to add to them.
"""

import contextlib
import errno
import json
import os
import re
import socket
import struct
from dataclasses import dataclass
from ipaddress import IPv4Network

from sysctr.errors import SysctrError
from sysctr.linux.process import ProgramFailed, run

IP_FORWARD = "/proc/sys/net/ipv4/ip_forward"

_FAMILY = "inet"
_DOCKER_CHAIN = {"family": "ip", "table": "filter", "chain": "DOCKER-USER"}
# Docker calls a network of the user's br- and twelve digits; br-lan and the like are somebody else's.
_DOCKER_BRIDGE = re.compile(r"docker0|docker_gwbridge|br-[0-9a-f]{12}")
# Whoever has tables or chains of these names needs forwarding as we do, and may rely on it being on.
_FORWARDERS = re.compile(r"sysctr|docker|libvirt|incus|lxd|lxc|cni|kube", re.IGNORECASE)

_NFT_GETGEN = 10 << 8 | 16  # NFNL_SUBSYS_NFTABLES, NFT_MSG_GETGEN
_NETLINK_NETFILTER = 12


@dataclass(frozen=True)
class Problem:
    """What does not work, and what the admin can do about it."""

    detail: str
    hint: str


class Nat:
    """The rules of one bridge."""

    def __init__(self, table: str, bridge: str, subnet: IPv4Network) -> None:
        self.table = table
        self.bridge = bridge
        self.subnet = subnet
        self._generation = -1
        self._loaded: list[dict] | None = None

    def ensure(self) -> None:
        """Load what is missing; costs one message to the kernel while nobody changes any rule."""
        for _attempt in range(5):
            generation = _generation()
            if generation == self._generation:
                return
            changed = self._ensure_table()
            changed |= self._ensure_docker_rules()
            if not changed:
                self._generation = generation
                return
        # Somebody loads rules as fast as we look; ours were there each time, or nft had failed.

    def remove(self) -> None:
        """Take back every rule of ours, wherever it is."""
        self._generation, self._loaded = -1, None
        table = {"family": _FAMILY, "name": self.table}
        # Adding what is there is no error, deleting what is not is one.
        _load([{"add": {"table": table}}, {"delete": {"table": table}}])
        stale = [rule["handle"] for rule in self._docker_rules() or ()]
        if stale:
            _load([_delete_docker_rule(handle) for handle in stale])

    def problems(self) -> list[Problem]:
        """Return what other filters of the host keep from containers."""
        return [*self._nft_problems(), *self._legacy_problems()]

    def _ensure_table(self) -> bool:
        """Load our table unless it is as we loaded it; return whether that was needed."""
        if self._loaded is not None and _list_table(_FAMILY, self.table) == self._loaded:
            return False
        _load(self._commands())
        self._loaded = _list_table(_FAMILY, self.table)
        return True

    def _commands(self) -> list[dict]:
        """Return the commands that replace our table as a whole, in one transaction."""
        table = {"family": _FAMILY, "name": self.table}
        commands = [{"add": {"table": table}}, {"delete": {"table": table}}, {"add": {"table": table}}]

        def add_chain(name: str, kind: str, hook: str, priority: int) -> None:
            chain = {"family": _FAMILY, "table": self.table, "name": name}
            base = {"type": kind, "hook": hook, "prio": priority, "policy": "accept"}
            commands.append({"add": {"chain": chain | base}})

        def add_rule(chain: str, *expression: dict) -> None:
            rule = {"family": _FAMILY, "table": self.table, "chain": chain, "expr": list(expression)}
            commands.append({"add": {"rule": rule}})

        inside, outside = _match_meta("iifname", self.bridge), _match_meta("oifname", self.bridge)
        add_chain("input", "filter", "input", 0)
        add_rule("input", inside, _match_port("udp", {"set": [53, 67]}), {"accept": None})
        add_rule("input", inside, _match_port("tcp", 53), {"accept": None})
        add_chain("forward", "filter", "forward", 0)
        add_rule("forward", inside, {"accept": None})
        add_rule("forward", outside, {"accept": None})
        add_chain("postrouting", "nat", "postrouting", 100)
        network = {"prefix": {"addr": str(self.subnet.network_address), "len": self.subnet.prefixlen}}
        source = {"payload": {"protocol": "ip", "field": "saddr"}}
        add_rule(
            "postrouting",
            {"match": {"op": "==", "left": source, "right": network}},
            _match_meta("oifname", self.bridge, "!="),
            {"masquerade": None},
        )
        return commands

    def _ensure_docker_rules(self) -> bool:
        """Keep our rules at the head of DOCKER-USER, if there is one; return whether it needed a change."""
        present = self._docker_rules()
        if present is None:
            return False
        wanted = self._wanted_docker_rules()
        if [rule["expr"] for rule in present] == wanted:
            return False
        commands = [_delete_docker_rule(rule["handle"]) for rule in present]
        # Each goes to the head of the chain, so the last one first.
        commands += [
            {"insert": {"rule": {**_DOCKER_CHAIN, "comment": self.table, "expr": expression}}}
            for expression in reversed(wanted)
        ]
        _load(commands)
        return True

    def _wanted_docker_rules(self) -> list[list[dict]]:
        """Return what lets our traffic pass Docker's filter, but not into Docker's own networks.

        Accepting all that comes from our bridge would open ports that Docker's containers did not publish.
        """
        inside = _match_meta("iifname", self.bridge)
        docker = sorted(name for _index, name in socket.if_nameindex() if _DOCKER_BRIDGE.fullmatch(name))
        rules = [[inside, _match_meta("oifname", name), {"return": None}] for name in docker]
        rules.append([inside, {"accept": None}])
        rules.append([_match_meta("oifname", self.bridge), {"accept": None}])
        return rules

    def _docker_rules(self) -> list[dict] | None:
        """Return our rules in DOCKER-USER, None where there is no such chain."""
        listed = _list("chain", "ip", "filter", "DOCKER-USER")
        if listed is None:
            return None
        rules = [entry["rule"] for entry in listed if "rule" in entry]
        return [rule for rule in rules if rule.get("comment") == self.table]

    def _nft_problems(self) -> list[Problem]:
        found = []
        chains = [entry["chain"] for entry in _list("chains") or () if "chain" in entry]
        docker = any(_names_docker_user(chain) for chain in chains)
        for chain in chains:
            hook, table = chain.get("hook"), (chain["family"], chain["table"])
            if hook not in ("forward", "input") or chain["family"] not in ("ip", "inet"):
                continue
            if table == (_FAMILY, self.table) or (docker and table == ("ip", "filter") and hook == "forward"):
                continue
            where = f"{chain['family']} {chain['table']} {chain['name']}"
            if table == ("inet", "firewalld"):
                if not self._is_named_in(*table):
                    found.append(self._firewalld_problem())
            elif chain.get("policy") == "drop" and not self._is_named_in(*table):
                found.append(self._drop_problem(where, hook))
        return list(dict.fromkeys(found))

    def _is_named_in(self, family: str, table: str) -> bool:
        """Tell whether an admin has already written a rule for our bridge."""
        return f'"{self.bridge}"' in json.dumps(_list("table", family, table) or ())

    def _drop_problem(self, where: str, hook: str) -> Problem:
        chain = where.rpartition(" ")[2]
        if hook == "forward":
            lost = "containers reach nothing outside"
            rules = [f"iifname {self.bridge} accept", f"oifname {self.bridge} accept"]
            ufw = f"ufw route allow in on {self.bridge} && ufw route allow out on {self.bridge}"
        else:
            lost = "containers get no names and no DHCP"
            ports = ("udp dport { 53, 67 }", "tcp dport 53")
            rules = [f"iifname {self.bridge} {port} accept" for port in ports]
            ufw = f"ufw allow in on {self.bridge}"
        if chain in ("FORWARD", "INPUT"):
            hint = f"with ufw: {ufw}; else: " + "; ".join(f"nft insert rule {where} {rule}" for rule in rules)
        else:
            hint = "add to its configuration: " + "; ".join(rules)
        return Problem(f"the chain {where} drops what it does not know: {lost}", hint)

    def _firewalld_problem(self) -> Problem:
        return Problem(
            f"firewalld does not know {self.bridge}: it rejects what containers send",
            f"firewall-cmd --permanent --zone=trusted --add-interface={self.bridge} && firewall-cmd --reload",
        )

    def _legacy_problems(self) -> list[Problem]:
        """Look at the filter of the old iptables, which nft does not show."""
        with contextlib.suppress(OSError), open("/proc/net/ip_tables_names", encoding="ascii") as file:
            if "filter" in file.read().split():
                try:
                    rules = run(["iptables-legacy", "-S", "FORWARD"]).stdout.decode()
                except ProgramFailed:
                    return []
                if "-P FORWARD DROP" in rules and f" {self.bridge} " not in rules:
                    add = f"iptables-legacy -I FORWARD -i {self.bridge} -j ACCEPT"
                    back = f"iptables-legacy -I FORWARD -o {self.bridge} -j ACCEPT"
                    detail = "iptables-legacy drops what it does not know: containers reach nothing outside"
                    return [Problem(detail, f"{add}; {back}")]
        return []


def forwarding() -> bool:
    """Tell whether this host forwards IPv4."""
    with open(IP_FORWARD, "rb") as file:
        return file.read(1) == b"1"


def set_forwarding(*, on: bool) -> None:
    """Switch forwarding of IPv4."""
    try:
        with open(IP_FORWARD, "w", encoding="ascii") as file:
            file.write("1\n" if on else "0\n")
    except OSError as error:
        raise SysctrError(f"cannot switch forwarding: {error}", "is /proc/sys writable here?") from error


def others_forward(own_table: str) -> bool:
    """Tell whether somebody else on this host has rules for traffic that it forwards."""
    for entry in _list("chains") or ():
        chain = entry.get("chain")
        if chain and chain["table"] != own_table and _FORWARDERS.search(f"{chain['table']} {chain['name']}"):
            return True
    return False


def _match_meta(key: str, value: str, operator: str = "==") -> dict:
    return {"match": {"op": operator, "left": {"meta": {"key": key}}, "right": value}}


def _match_port(protocol: str, port: object) -> dict:
    left = {"payload": {"protocol": protocol, "field": "dport"}}
    return {"match": {"op": "==", "left": left, "right": port}}


def _names_docker_user(chain: dict) -> bool:
    return (chain["family"], chain["table"], chain["name"]) == tuple(_DOCKER_CHAIN.values())


def _delete_docker_rule(handle: int) -> dict:
    return {"delete": {"rule": {**_DOCKER_CHAIN, "handle": handle}}}


def _load(commands: list[dict]) -> None:
    try:
        run(["nft", "-j", "-f", "-"], input=json.dumps({"nftables": commands}).encode())
    except ProgramFailed as error:
        hint = "apt-get install nftables" if "not installed" in error.message else ""
        raise SysctrError(f"cannot load the rules of the network: {error}", hint) from error


def _list(*what: str) -> list[dict] | None:
    """Return what nft lists, None if there is no such thing."""
    done = run(["nft", "-j", "list", *what], accept=(0, 1))
    if done.returncode:
        if os.strerror(errno.ENOENT).encode() in done.stderr:
            return None
        words = done.stderr.decode(errors="replace").strip().partition("\n")[0]
        raise SysctrError(f"cannot list the rules of the host: {words}")
    return json.loads(done.stdout)["nftables"]


def _list_table(family: str, table: str) -> list[dict]:
    return [entry for entry in _list("table", family, table) or () if "metainfo" not in entry]


def _generation() -> int:
    """Return the number of the current rule set of the namespace; every change by anybody raises it."""
    kind = socket.SOCK_RAW | socket.SOCK_CLOEXEC
    with socket.socket(socket.AF_NETLINK, kind, _NETLINK_NETFILTER) as sock:
        # struct nlmsghdr, then struct nfgenmsg: family, version, resource id.
        sock.sendto(struct.pack("=IHHIIBBH", 20, _NFT_GETGEN, 1, 1, 0, 0, 0, 0), (0, 0))
        answer = sock.recv(4096, socket.MSG_DONTWAIT)
    # Behind both headers: struct nlattr of NFTA_GEN_ID, then the number in network order.
    _length, answer_kind = struct.unpack_from("=IH", answer)
    if answer_kind != 10 << 8 | 15:  # NFT_MSG_NEWGEN
        raise SysctrError("cannot ask for the rules of the host: no nf_tables here", "modprobe nf_tables")
    return struct.unpack_from(">I", answer, 24)[0]
