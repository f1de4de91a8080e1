"""What transformers calls the argument that takes keys and values."""

import inspect
from typing import Any


def with_cache(model: Any, cache: Any) -> dict[str, Any]:
    """Return the keyword arguments with which a model reads and extends `cache`.

    transformers renamed the argument in 5.24, one architecture after the other, and warns of its old name.
    """
    is_new = "cache" in inspect.signature(model.forward).parameters
    return {"cache" if is_new else "past_key_values": cache, "use_cache": True}
