"""Reads YAML that nobody trusts, as texts, lists and mappings, and nothing else of what YAML can be.

What a scalar means is for whoever knows the key. There are no aliases (of which few bytes can become more
than a computer holds), no tags, no second document, and no key twice: what was checked is what is used.
"""

from typing import Any

from sysctr.errors import ConfigError

LIMIT_BYTES = 1 << 20
_DEEPEST = 64
_MOST_NODES = 200_000

Node = str | list["Node"] | dict[str, "Node"]


def read(data: bytes) -> dict[str, Any]:
    r"""Return the mapping that a document is; ConfigError where it is no such document.

    >>> read(b"name: c1\nsnapshots: [one, '2']\noptimized: false\n")
    {'name': 'c1', 'snapshots': ['one', '2'], 'optimized': 'false'}
    """
    # PyYAML takes 12 ms of every start that imports it, and hardly any start needs it.
    import yaml

    if len(data) > LIMIT_BYTES:
        raise ConfigError(f"it has more than {LIMIT_BYTES >> 20} MiB")
    loader = getattr(yaml, "CBaseLoader", yaml.BaseLoader)
    try:
        text = data.decode("utf-8")
        found = _Builder(yaml).document(yaml.parse(text, Loader=loader))
    except (yaml.YAMLError, UnicodeError, RecursionError, ValueError) as error:
        # One line: the second is where, and the rest shows what is there.
        words = " ".join(str(error).split())[:200]
        raise ConfigError(f"it is no YAML: {words}") from error
    if not isinstance(found, dict):
        raise ConfigError("it is no mapping")
    return found


class _Builder:
    """Builds values of the events of a parser."""

    def __init__(self, yaml: Any) -> None:
        self._yaml = yaml
        self._nodes = 0

    def document(self, events: Any) -> "Node | None":
        """Return the only document."""
        # Of each that is open: the list or mapping, and the key that waits for its value.
        open_ones: list[tuple[list[Node] | dict[str, Node], list[str]]] = []
        root: Node | None = None
        for event in events:
            value = self._started(event)
            if isinstance(event, self._yaml.SequenceEndEvent | self._yaml.MappingEndEvent):
                open_ones.pop()
            if value is None:
                continue
            if open_ones:
                _add(*open_ones[-1], value)
            elif root is not None:
                raise ConfigError("it is more than one document")
            else:
                root = value
            if not isinstance(value, str):
                open_ones.append((value, []))
            if len(open_ones) > _DEEPEST:
                raise ConfigError(f"it is nested deeper than {_DEEPEST}")
        return root

    def _started(self, event: Any) -> "Node | None":
        """Return the value that begins with an event, None for one with which none does."""
        yaml = self._yaml
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
            raise ConfigError("it has anchors or aliases")
        if not isinstance(event, yaml.NodeEvent):
            return None
        self._nodes += 1
        if self._nodes > _MOST_NODES:
            raise ConfigError(f"it has more than {_MOST_NODES} values")
        # "!" is that of a quoted text.
        if event.tag not in (None, "!"):
            raise ConfigError("it has tags")
        if isinstance(event, yaml.ScalarEvent):
            return str(event.value)
        return [] if isinstance(event, yaml.SequenceStartEvent) else {}


def _add(into: "list[Node] | dict[str, Node]", waiting: list[str], value: "Node") -> None:
    if isinstance(into, list):
        into.append(value)
    elif waiting:
        into[waiting.pop()] = value
    elif not isinstance(value, str):
        raise ConfigError("it has a key that is no text")
    elif value in into:
        raise ConfigError("it has a key twice")
    else:
        waiting.append(value)
