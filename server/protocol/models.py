"""Shapes of `/v1/models` and of the small status endpoints."""

from typing import Literal

from server.protocol.shared import ResponseModel


class Model(ResponseModel):
    """A served model."""

    id: str
    object: Literal["model"] = "model"
    created: int
    """Unix time at which this server started."""
    owned_by: str = "ballast"


class ModelList(ResponseModel):
    """The served models; there is one."""

    object: Literal["list"] = "list"
    data: list[Model]


class Status(ResponseModel):
    """Answer of a health probe."""

    status: str


class Version(ResponseModel):
    """Release of this server and what it serves."""

    version: str
    model: str
