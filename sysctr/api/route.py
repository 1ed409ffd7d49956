"""One route of the API, the request that it is given, and how a path leads to it."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from sysctr.api.fields import Field, Object

JSON = "application/json"
BYTES = "application/octet-stream"
STREAM = "text/event-stream"


@dataclass(frozen=True)
class Call:
    """One request, with everything in it checked."""

    path: dict[str, str]
    query: dict[str, Any]
    body: dict[str, Any]

    @property
    def ref(self) -> str:
        """The container's id or name."""
        return self.path["ref"]

    @property
    def given(self) -> dict[str, Any]:
        """The body without the fields that are null."""
        return {name: value for name, value in self.body.items() if value is not None}


@dataclass(frozen=True)
class Route:
    """One method of one path. `answer` names the fields of the answer; a task is {"task": {…}}."""

    method: str
    path: str
    action: Callable[..., Any]
    summary: str
    body: tuple[Field, ...] = ()
    query: tuple[Field, ...] = ()
    answer: str = ""
    status: int = 200
    media: str = JSON
    # The action reads the body itself, which may be of any length.
    streams: bool = False
    waits: bool = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "waits", inspect.iscoroutinefunction(self.action))

    @property
    def fields(self) -> Object:
        """The body as one type."""
        return Object(self.body)


class Node:
    """One segment of the paths, with what follows it."""

    def __init__(self) -> None:
        self.routes: dict[str, Route] = {}
        self.fixed: dict[str, Node] = {}
        self.variable: tuple[str, Node] | None = None


def tree(routes: tuple[Route, ...]) -> Node:
    """Return the routes as a tree by segment; a fixed segment goes before a variable one."""
    root = Node()
    for route in routes:
        node = root
        for segment in route.path.split("/")[1:]:
            if segment.startswith("{"):
                if node.variable is None:
                    node.variable = (segment[1:-1], Node())
                assert node.variable[0] == segment[1:-1], f"{route.path} names a segment in another way"
                node = node.variable[1]
            else:
                node = node.fixed.setdefault(segment, Node())
        assert route.method not in node.routes, f"{route.method} {route.path} is there twice"
        node.routes[route.method] = route
    return root


def find(root: Node, segments: list[str]) -> tuple[dict[str, Route], dict[str, str]]:
    """Return the routes of a path by method, none if there is no such path, and its variable segments."""
    node, variables = root, {}
    for segment in segments:
        following = node.fixed.get(segment)
        if following is None and node.variable is not None and segment:
            variables[node.variable[0]] = segment
            following = node.variable[1]
        if following is None:
            return {}, {}
        node = following
    return node.routes, variables
