"""`GET /v1/models`: what is served here."""

from fastapi import APIRouter

from server.protocol.models import Model, ModelList
from server.service import Service, TheService

router = APIRouter(tags=["models"])


@router.get("/v1", include_in_schema=False)
@router.get("/v1/", include_in_schema=False)
async def root(service: TheService) -> Model:
    """Return the served model, so that a client which only looks whether the API is there finds it."""
    return _model(service)


@router.get("/v1/models")
async def list_models(service: TheService) -> ModelList:
    """List the served model."""
    return ModelList(data=[_model(service)])


@router.get("/v1/models/{model_id:path}")
async def retrieve_model(model_id: str, service: TheService) -> Model:
    """Return the served model by its name, which may hold slashes."""
    service.require_model(model_id)
    return _model(service)


def _model(service: Service) -> Model:
    return Model(id=service.settings.name, created=service.created)
