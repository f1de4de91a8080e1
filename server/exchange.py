"""One HTTP exchange: what the layers of the server know about it, from first byte to last."""

from __future__ import annotations

import re
import time
import uuid
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, cast

from starlette.types import Scope

if TYPE_CHECKING:
    from server.auth import Access

_SANE_ID = re.compile(r"[!-~]{1,128}")


@dataclass
class Exchange:
    """Filled in by the layers that a request passes."""

    request_id: str
    started: float = field(default_factory=time.perf_counter)
    access: Access | None = None
    """Set by `server.auth.Authenticate` on every path that is not open."""
    finish_reason: str = ""
    """Of a chat completion: stop, length, content_filter, error or aborted."""
    prompt_tokens: int = 0
    """Of a chat completion, once its generation has begun."""
    completion_tokens: int = 0
    """Released so far, by all choices together."""

    @property
    def elapsed_s(self) -> float:
        """Seconds since the request arrived."""
        return time.perf_counter() - self.started


def exchange_of(scope: Scope) -> Exchange:
    """Return the exchange that `server.middleware.Observe` opened."""
    return cast(Exchange, scope["ballast"])


def request_id_for(sent: str | None) -> str:
    """Return the client's own request id if it is sane, else a new one."""
    return sent if sent and _SANE_ID.fullmatch(sent) else f"req_{uuid.uuid4().hex}"
