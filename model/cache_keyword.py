"""What transformers calls the argument that takes keys and values."""

import inspect
from typing import Any

NAMES = {"cache", "past_key_values"}
"""From transformers 5.24 on, and before; architectures were changed one after the other, and the old name warns."""


def with_cache(model: Any, cache: Any) -> dict[str, Any]:
    """Return the keyword arguments with which a model, perhaps with an adapter, reads and extends `cache`."""
    is_new = "cache" in inspect.signature(base_of(model).forward).parameters
    return {"cache" if is_new else "past_key_values": cache, "use_cache": True}


def base_of(model: Any) -> Any:
    """Return the model under an adapter, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model
