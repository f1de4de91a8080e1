"""What the API says of itself: `/openapi.json`, and `/docs`, a page that shows it with assets of this server.

Nothing of it is secret: it names this release and what it understands, not the model, the settings or the keys.
"""

from collections.abc import Collection
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

ASSETS = "/docs/assets"
PATHS = frozenset(
    {
        "/openapi.json",
        "/docs",
        *(f"{ASSETS}/{file}" for file in ("swagger-ui-bundle.js", "swagger-ui.css", "favicon.png")),
    }
)
"""What a browser that shows the page asks for."""

_KEY = {
    "type": "http",
    "scheme": "bearer",
    "description": "One of the server's `api_keys`; without any, the server asks for none.",
}


def describe(app: FastAPI, open_paths: Collection[str]) -> dict[str, Any]:
    """Return the OpenAPI description of an application; it is made once.

    The first line of a route's docstring is its summary, and the rest its description. A path asks for a key
    unless it is one of `open_paths`.
    """
    if app.openapi_schema is not None:
        return app.openapi_schema
    schema = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
    schema["components"]["securitySchemes"] = {"key": _KEY}
    for path, operations in schema["paths"].items():
        for operation in operations.values():
            summary, _, rest = operation["description"].partition("\n")
            operation |= {"summary": summary.rstrip("."), "description": rest.strip()}
            if path not in open_paths:
                operation["security"] = [{"key": []}]
    app.openapi_schema = schema
    return schema
