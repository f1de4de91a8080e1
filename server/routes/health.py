"""Probes, metrics and the release: what an operator asks."""

from fastapi import APIRouter
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import Response

from model import __version__
from server.protocol.models import Status, Version
from server.service import TheService

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
async def metrics(service: TheService) -> Response:
    """Return the metrics in the Prometheus text format."""
    return Response(service.metrics.render(), media_type=CONTENT_TYPE_LATEST)
