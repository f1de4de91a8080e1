"""Probes, metrics and the release: what an operator asks."""

from fastapi import APIRouter
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import Response

from model import __version__
from server.errors import Forbidden
from server.protocol.models import Status, Version
from server.service import TheExchange, TheService

router = APIRouter(tags=["operation"])


@router.get("/livez")
async def livez() -> Status:
    """Answer 200 as long as the process serves at all. Needs no key."""
    return Status(status="ok")


@router.get("/readyz")
async def readyz(service: TheService) -> Status:
    """Answer 200 when requests can be served, 503 while loading or shutting down. Needs no key."""
    service.require_ready()
    return Status(status="ready")


@router.get("/version")
async def version(service: TheService) -> Version:
    """Return the release of this server and the model it serves."""
    return Version(version=__version__, model=service.settings.name)


@router.get("/metrics", response_class=Response)
async def metrics(service: TheService, exchange: TheExchange) -> Response:
    """Return the metrics in the Prometheus text format.

    They hold thresholds and sums of exact risks, so without `metrics_open` they are for callers who may
    see those.
    """
    access = exchange.access
    if not service.settings.metrics_open and (access is None or access.expose_risk != "full"):
        raise Forbidden("metrics show exact risks: use a key with expose_risk full, or set metrics_open")
    return Response(service.metrics.render(), media_type=CONTENT_TYPE_LATEST)
