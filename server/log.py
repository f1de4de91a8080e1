"""Log lines: one event each, for people or for machines. Text of users never appears in them."""

import logging
import sys
from typing import Any

import structlog

from server.settings import Settings

_QUIET = {"uvicorn": logging.WARNING, "uvicorn.error": logging.WARNING, "sse_starlette": logging.WARNING}
"""Libraries whose chatter adds nothing; `sse_starlette` would log every chunk at debug level."""


def configure(settings: Settings) -> None:
    """Send our events and those of the libraries to stderr, in the configured format.

    Changes the logging of the whole process, so only the command line calls it.
    """
    shared: list[Any] = [
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.StackInfoRenderer(),
    ]
    renderer: Any = structlog.processors.JSONRenderer()
    if settings.log_format == "console":
        renderer = structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())
    else:
        shared.append(structlog.processors.format_exc_info)
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=False,
    )
    formatter = structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=shared,
        processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer],
    )
    stream = logging.StreamHandler(sys.stderr)
    stream.setFormatter(formatter)
    root = logging.getLogger()
    root.handlers = [stream]
    root.setLevel(settings.log_level.upper())
    for name, level in _QUIET.items():
        logging.getLogger(name).setLevel(level)
