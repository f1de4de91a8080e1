"""What can go wrong in `model/`, as one tree.

ModelError
├── CheckpointError      safety_config.json or the head's weights cannot be used
│   └── BaseMismatch     they belong to another base model or chat template
├── WeightsNotFound      a model name, folder or file that does not lead to weights
├── InvalidRequest       a generation request that cannot be honoured; `param` names the field
│   └── ContextLengthError
└── TemplateError        the chat template refuses these messages
"""

from traceback import walk_tb


class ModelError(Exception):
    """Any error of the guarded model."""


class CheckpointError(ModelError):
    """A safety checkpoint is unreadable, truncated, of another version or inconsistent."""


class BaseMismatch(CheckpointError):
    """A safety checkpoint was made for other base weights or another chat template."""


class WeightsNotFound(ModelError):
    """A model name does not lead to weights on this machine."""


class InvalidRequest(ModelError):
    """A request that the model cannot honour. `param` is the name of the offending field."""

    def __init__(self, message: str, *, param: str) -> None:
        super().__init__(message)
        self.param = param


class ContextLengthError(InvalidRequest):
    """Prompt and requested tokens together exceed the model's context."""


class TemplateError(ModelError):
    """The model's chat template does not accept these messages."""


def origin(error: BaseException) -> str:
    """Return the type of `error` and where it came from, innermost last; its message may quote a user's text."""
    frames = [
        f"{frame.f_code.co_filename}:{line} {frame.f_code.co_name}" for frame, line in walk_tb(error.__traceback__)
    ]
    return f"{type(error).__name__} at {' > '.join(frames)}"
