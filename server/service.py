"""What a route needs: the settings, the engine and its model, the metrics."""

from dataclasses import dataclass
from typing import Annotated, Protocol, cast

from fastapi import Depends, Request

from model.config import SafetyConfig
from model.guarded_lm import GuardedLM
from server.auth import Access
from server.engine.engine import Engine, EngineState
from server.errors import NotJson, NotReady, NotServed, invalid
from server.exchange import Exchange, exchange_of
from server.metrics import Metrics
from server.settings import Settings


class ModelEngine(Engine, Protocol):
    """An engine that shows the model it serves: its chat template, tokenizer and safety configuration."""

    @property
    def lm(self) -> GuardedLM:
        """The model; only after `start`."""
        ...


@dataclass(frozen=True)
class Service:
    """Everything that one app is built of."""

    settings: Settings
    engine: ModelEngine
    metrics: Metrics
    created: int
    """Unix time of the start."""

    def require_ready(self) -> None:
        """Refuse while no request can be served.

        Raises:
            NotReady: saying why.
        """
        match self.engine.state:
            case EngineState.READY:
                return
            case EngineState.STARTING:
                raise NotReady("the model is loading")
            case EngineState.DRAINING:
                raise NotReady("the server is shutting down")
            case EngineState.STOPPED:
                raise NotReady("the engine has stopped")

    def require_signal(self) -> SafetyConfig:
        """Return the safety configuration of the model.

        Raises:
            ApiError: 400 if the model carries no signal.
        """
        config = self.engine.lm.config
        if config is None:
            raise invalid("model", f"the model {self.settings.name!r} is served without a safety signal")
        return config

    def require_model(self, name: str, *, param: str = "model", aliases: tuple[str, ...] = ()) -> None:
        """Refuse another model than the one served.

        Raises:
            NotServed: naming the field `param`, and what is served.
        """
        known = (self.settings.name, *aliases)
        if name not in known:
            raise NotServed(name, known, param=param)


async def _service(request: Request) -> Service:
    return cast(Service, request.app.state.service)


async def _model(request: Request) -> GuardedLM:
    service = await _service(request)
    service.require_ready()
    return service.engine.lm


async def _exchange(request: Request) -> Exchange:
    return exchange_of(request.scope)


async def _access(request: Request) -> Access:
    access = exchange_of(request.scope).access
    assert access is not None, "every path with a route that asks for access is authenticated"
    return access


async def _require_json(request: Request) -> None:
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    kind, _, subtype = media_type.partition("/")
    if kind != "application" or not (subtype == "json" or subtype.endswith("+json")):
        raise NotJson(media_type)


JSON_BODY = Depends(_require_json)
"""For routes with a body. A web page can send any other type, or none, to another site without asking it first."""
TheService = Annotated[Service, Depends(_service)]
TheModel = Annotated[GuardedLM, Depends(_model)]
"""Asking for it answers 503 while the model is not ready."""
TheExchange = Annotated[Exchange, Depends(_exchange)]
TheAccess = Annotated[Access, Depends(_access)]
