"""Builds the HTTP application. Nothing lives at module level: every app has its own of everything."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Iterator
from functools import partial

import structlog
from fastapi import FastAPI
from fastapi_offline import FastAPIOffline
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware

from model import __version__, checkpoint
from model.config import SafetyConfig
from server import description, errors
from server.auth import OPEN_PATHS, Authenticate, KeyRing
from server.engine.engine import EngineState
from server.metrics import Metrics
from server.middleware import LimitBody, Observe
from server.routes import chat, health, models, moderations, safety
from server.service import ModelEngine, Service
from server.settings import Settings

logger = structlog.get_logger(__name__)

Started = Callable[[Exception | None], None]
"""Called once when the engine can serve, or with the error that keeps it from it."""


def create_app(settings: Settings, engine: ModelEngine, *, on_started: Started | None = None) -> FastAPI:
    """Return the application that serves `engine`.

    The probes answer at once; the engine starts in the background, and until it is ready the API
    answers 503. At shutdown running requests get `settings.drain_s` seconds.

    Args:
        settings: what the operator wants.
        engine: generates and scores; started and stopped by the application.
        on_started: told when the start has succeeded or failed.
    """
    metrics = Metrics(engine)
    service = Service(settings, engine, metrics, created=int(time.time()))
    open_paths = OPEN_PATHS | {"/metrics"} if settings.metrics_open else OPEN_PATHS
    app = FastAPIOffline(
        title="Ballast",
        version=__version__,
        description="A language model behind the OpenAI API, with every token scored before it leaves.",
        middleware=_middleware(settings, metrics, open_paths),
        lifespan=lambda app: _lifespan(service, on_started),
        redoc_url=None,
        static_url=description.ASSETS,
    )
    app.openapi = partial(description.describe, app, open_paths)  # type: ignore[method-assign]  # as FastAPI advises
    app.state.service = service
    errors.install(app)
    for module in (chat, models, moderations, safety, health):
        app.include_router(module.router, responses=errors.RESPONSES)
    return app


def _middleware(settings: Settings, metrics: Metrics, open_paths: frozenset[str]) -> list[Middleware]:
    """Return the layers, outermost first."""
    layers = [Middleware(Observe, metrics=metrics)]
    if settings.cors_origins:
        layers.append(
            Middleware(
                CORSMiddleware,
                allow_origins=list(settings.cors_origins),
                allow_methods=["*"],
                allow_headers=["*"],
                expose_headers=["x-request-id", "retry-after", "retry-after-ms"],
            )
        )
    layers.append(Middleware(Authenticate, keys=KeyRing(settings), open_paths=open_paths))
    layers.append(Middleware(LimitBody, max_bytes=settings.max_body_bytes))
    return layers


@contextlib.asynccontextmanager
async def _lifespan(service: Service, on_started: Started | None) -> AsyncIterator[None]:
    """Start the engine in the background; at the end drain it. A load that has begun is waited for."""
    stopping = asyncio.Event()
    starting = asyncio.create_task(_start(service, on_started, stopping))
    try:
        yield
    finally:
        stopping.set()
        if service.engine.state is not EngineState.STOPPED:
            await service.engine.stop(drain_s=service.settings.drain_s)
        await starting


async def _start(service: Service, on_started: Started | None, stopping: asyncio.Event) -> None:
    """Start the engine, and say how that went unless the server is stopping already."""
    began = time.perf_counter()
    try:
        await service.engine.start()
    except Exception as error:
        if on_started is None:
            logger.error("the model could not be loaded", error=str(error))
        else:
            on_started(error)
        return
    if stopping.is_set():
        return
    config = service.engine.lm.config
    service.metrics.describe(config)
    seconds = round(time.perf_counter() - began, 1)
    logger.info(
        "model loaded",
        model=service.settings.name,
        checkpoint=service.settings.checkpoint or checkpoint.default_for(service.settings.model),
        seconds=seconds,
    )
    for notice in _notices(service.settings, config):
        logger.warning(notice)
    if on_started is not None:
        on_started(None)


def _notices(settings: Settings, config: SafetyConfig | None) -> Iterator[str]:
    """Yield what an operator should know before the first request."""
    if not settings.is_loopback and not settings.api_keys:
        yield f"no api_keys: anybody who reaches {settings.host}:{settings.port} can use this server"
    if config is not None and "NC" in config.licence.upper().split("-"):
        notice = f"this safety checkpoint is for non-commercial use only ({config.licence})"
        permissive = f"{settings.model}/permissive"
        if settings.checkpoint is None and permissive in checkpoint.shipped():
            notice += f"; checkpoint={permissive} serves one that is not"
        yield notice
