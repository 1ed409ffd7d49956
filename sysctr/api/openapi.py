"""The OpenAPI description of the API, made from the table of routes."""

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from sysctr import __version__

if TYPE_CHECKING:
    from sysctr.api.route import Route

_STRING = {"type": "string"}
_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["code", "message", "hint"],
            "properties": {"code": _STRING, "message": _STRING, "hint": _STRING},
        }
    },
}


def document(routes: "Iterable[Route]") -> dict[str, Any]:
    """Return the description as OpenAPI 3.1."""
    paths: dict[str, dict[str, Any]] = {}
    for route in routes:
        paths.setdefault(route.path, {})[route.method.lower()] = _operation(route)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "sysctr",
            "version": __version__,
            "description": "HTTP on a unix socket. Whoever may connect is as powerful as root.",
        },
        "paths": paths,
        "components": {"schemas": {"Error": _ERROR}},
    }


def _operation(route: "Route") -> dict[str, Any]:
    words = re.findall("[a-z]+", route.path.replace("{ref}", "").replace("{id}", "").replace("{name}", ""))
    operation: dict[str, Any] = {
        "summary": route.summary,
        "operationId": "_".join(
            [route.method.lower(), *words, *(["one"] if route.path.endswith("}") else [])]
        ),
        "parameters": _parameters(route),
        "responses": {
            str(route.status): _answer(route),
            "default": {
                "description": "an error",
                "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}},
            },
        },
    }
    if route.body:
        operation["requestBody"] = {
            "required": any(field.required for field in route.body),
            "content": {"application/json": {"schema": route.fields.schema()}},
        }
    return operation


def _parameters(route: "Route") -> list[dict[str, Any]]:
    inside = [
        {"name": name, "in": "path", "required": True, "schema": _STRING}
        for name in re.findall(r"\{(\w+)\}", route.path)
    ]
    query = [
        {
            "name": field.name,
            "in": "query",
            "required": field.required,
            "description": field.doc,
            "schema": field.type.schema(),
        }
        for field in route.query
    ]
    return inside + query


def _answer(route: "Route") -> dict[str, Any]:
    if route.status == 101:
        return {"description": "a websocket"}
    schema: dict[str, Any] = {}
    if route.media == "application/json":
        names = route.answer.split()
        schema = {"type": "object"}
        if names:
            schema |= {"required": names, "properties": {name: {} for name in names}}
    return {"description": route.answer or "done", "content": {route.media: {"schema": schema}}}
