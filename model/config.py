"""What must travel with the weights: everything needed to read the signal and to act on it."""

import json
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

from model.attention import Windows
from model.errors import CheckpointError
from model.policy import Mode, Policy
from model.schedule import Schedule, parse

VERSION = 2
"""Version of the `safety_config.json` format that this code reads and writes."""

LONGEST_ALONE = 8
"""Most tokens between two assessments of a `[CLS]` without a token head, unless a schedule is asked for."""

Side = Literal["request", "response"]
"""What a risk is of."""


@dataclass(frozen=True)
class Thresholds:
    """Two named thresholds of one risk, each in (0, 1)."""

    block: float
    """For a false-positive rate on benign text; what the policy acts on."""
    flag: float
    """The best F1 on validation data; what a classifier reports."""


@dataclass(frozen=True)
class TokenHeadConfig:
    """Shape of the token head."""

    layers: tuple[int, ...]
    """Hidden states that it reads: 0 is the embedding, -1 the final normalised state."""
    width: int
    """Width of one hidden state (D)."""
    hidden: int
    """Width of the head's hidden layer; 0 means a linear head."""
    reads_query: bool = False
    """A further head reads every token of the query; its highest smoothed logit may raise the request risk."""


@dataclass(frozen=True)
class ClsConfig:
    """How the `[CLS]` signal was trained, and how it is read."""

    windows: tuple[int, ...] = (10, 10, 10)
    """r1, r2 and r3."""
    moves: bool = True
    """A re-assessed `[CLS]` takes the position of the newest token that it covers, instead of position 0."""
    is_read: bool = True
    """Response tokens read it, unless the server is told otherwise."""
    schedule: str = "annealed"
    """When it is assessed, as `model.schedule.parse` reads it."""
    request_share: float = 0.5
    """Weight of its request logit beside that of the token head, 0 to 1; without a token head it is alone."""
    response_share: float = 0.5
    """The same of its response logit."""


@dataclass(frozen=True)
class BaseModel:
    """Fingerprint of the model that the signal was trained on."""

    name: str
    weights: str
    """`model.checkpoint.fingerprint_weights` of the base model."""
    chat_template: str
    """SHA-256 of the chat template."""
    dtype: str
    """Precision in which the thresholds were calibrated, such as `bfloat16`."""
    adapter: str = ""
    """SHA-256 of the weights of the adapter that lies beside the signal; empty without one."""


@dataclass(frozen=True)
class RefusalConfig:
    """How a refusal is worded."""

    prefix: str = "I'm sorry, but I can't help with that."
    """Forced opening; the model continues it freely, to the end of a sentence."""
    ending: str = " I can't say more about this."
    """Fixed text that ends a refusal which turns harmful itself."""
    max_tokens: int = 40
    """Tokens that the model may add to the prefix."""


@dataclass(frozen=True)
class SafetyConfig:
    """The content of `safety_config.json`."""

    base: BaseModel
    token_head: TokenHeadConfig | None
    """None where the checkpoint carries `[CLS]` alone."""
    request: Thresholds
    response: Thresholds
    onset: float
    """Raw response risk above which the onset of harm is placed."""
    smoothing: float
    """Weight of the newest logit in the moving average, (0, 1]."""
    patience: int = 3
    lookback: int = 8
    redraw_below: float = 0.0
    """Request risk up to which a refusal that the model begins with by itself is withdrawn, and the response drawn
    again, once; 0 never does."""
    cls: ClsConfig | None = None
    """None where the checkpoint carries no `[CLS]`."""
    refusal: RefusalConfig = field(default_factory=RefusalConfig)
    licence: str = "Apache-2.0"
    """Licence of the head's weights, which follows from the data that they were trained on."""
    calibration: dict[str, Any] = field(default_factory=dict)
    """Report of the calibration: data, counts and rates. Read by people, not by code."""
    version: int = VERSION

    def policy(self, input_mode: Mode, output_mode: Mode) -> Policy:
        """Return the policy that these thresholds give under the two modes."""
        return Policy(
            input=input_mode,
            output=output_mode,
            request_block=self.request.block,
            response_block=self.response.block,
            onset=self.onset,
            patience=self.patience,
            lookback=self.lookback,
            redraw_below=self.redraw_below,
        )

    def schedule(self, name: str | None = None) -> Schedule:
        """Return when assessments are made: by the named schedule, or by the checkpoint's own.

        A token head assesses every token, so `[CLS]` beside it may be sparse. Alone and by its own schedule it waits
        `LONGEST_ALONE` tokens at most, because a response is held back until it is assessed, and never longer than
        its window, so that no token goes unread.

        Raises:
            ValueError: if there is no such schedule.
        """
        if name is not None:
            return parse(name)
        if self.cls is None:
            return parse("every")
        longest = None if self.token_head is not None else min(LONGEST_ALONE, self.cls.windows[1])
        return parse(self.cls.schedule, longest=longest)

    def to_json(self) -> str:
        """Return the configuration as indented JSON with sorted keys."""
        raw = asdict(self)
        if not self.redraw_below:  # as releases without it read no unknown key
            del raw["redraw_below"]
        if self.token_head is not None and not self.token_head.reads_query:
            del raw["token_head"]["reads_query"]
        return json.dumps(raw, indent=2, sort_keys=True) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "SafetyConfig":
        """Return the configuration that `text` holds.

        Raises:
            CheckpointError: on invalid JSON, another version, or a missing, unknown or mistyped key.
        """
        try:
            raw = json.loads(text)
        except json.JSONDecodeError as error:
            raise CheckpointError(f"safety_config.json is not valid JSON: {error}") from error
        version = raw.get("version") if isinstance(raw, dict) else None
        if version != VERSION:
            raise CheckpointError(f"safety_config.json has version {version!r}; this release reads version {VERSION}")
        parts = {
            "base": _build(BaseModel, raw.get("base"), "base"),
            "token_head": _build_if_there(TokenHeadConfig, raw.get("token_head"), "token_head"),
            "cls": _build_if_there(ClsConfig, raw.get("cls"), "cls"),
            "request": _build(Thresholds, raw.get("request"), "request"),
            "response": _build(Thresholds, raw.get("response"), "response"),
            "refusal": _build(RefusalConfig, raw.get("refusal", {}), "refusal"),
        }
        config: SafetyConfig = _build(cls, {**raw, **parts}, "safety_config.json")
        config._check()
        return config

    def _check(self) -> None:
        for name, value in (
            ("request.block", self.request.block),
            ("request.flag", self.request.flag),
            ("response.block", self.response.block),
            ("response.flag", self.response.flag),
            ("onset", self.onset),
        ):
            if not 0.0 < value < 1.0:  # at 1, not even a failed head would count as unsafe
                raise CheckpointError(f"{name} must be in (0, 1), got {value!r}")
        if not 0.0 < self.smoothing <= 1.0:
            raise CheckpointError(f"smoothing must be in (0, 1], got {self.smoothing!r}")
        if self.token_head is None and self.cls is None:
            raise CheckpointError("token_head and cls are both missing: there is no signal")
        if self.token_head is not None and not self.token_head.layers:
            raise CheckpointError("token_head.layers must name at least one layer, got none")
        if self.cls is not None:
            self._check_cls(self.cls)
        if not self.refusal.prefix:
            raise CheckpointError("refusal.prefix must not be empty: a refusal begins with it")
        if self.refusal.max_tokens < 0:
            raise CheckpointError(f"refusal.max_tokens must be at least 0, got {self.refusal.max_tokens}")
        try:
            self.policy(Mode.BLOCK, Mode.BLOCK)
        except ValueError as error:
            raise CheckpointError(f"safety_config.json is inconsistent: {error}") from error

    def _check_cls(self, cls: ClsConfig) -> None:
        for name, share in (("request_share", cls.request_share), ("response_share", cls.response_share)):
            if not 0.0 <= share <= 1.0:
                raise CheckpointError(f"cls.{name} must be in [0, 1], got {share!r}")
        if len(cls.windows) != 3:
            raise CheckpointError(f"cls.windows must be r1, r2 and r3, got {list(cls.windows)}")
        try:
            Windows(*cls.windows)
            parse(cls.schedule)
        except ValueError as error:
            raise CheckpointError(f"cls: {error}") from error


def _build_if_there(kind: Any, raw: Any, where: str) -> Any:
    return None if raw is None else _build(kind, raw, where)


def _build(kind: Any, raw: Any, where: str) -> Any:
    """Return `kind(**raw)`, or raise a CheckpointError that names the missing, unknown or mistyped keys."""
    if not isinstance(raw, dict):
        raise CheckpointError(f"{where}: expected an object, got {raw!r}")
    known = {entry.name for entry in fields(kind)}
    if unknown := sorted(set(raw) - known):
        raise CheckpointError(f"{where}: unknown keys {unknown}; known are {sorted(known)}")
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in raw.items()}
    for name, expected in get_type_hints(kind).items():
        if name in values and not _fits(values[name], expected):
            raise CheckpointError(f"{where}: {name} must be {_spell(expected)}, got {raw[name]!r}")
    try:
        return kind(**values)
    except TypeError as error:
        raise CheckpointError(f"{where}: {error}") from error


def _fits(value: Any, expected: Any) -> bool:
    """Tell whether a JSON value has the type of a field: an int is a float too, a bool is no number."""
    if type(None) in get_args(expected):  # a part: built, or not there
        return value is None or isinstance(value, get_args(expected))
    if get_origin(expected) is tuple:
        return isinstance(value, tuple) and all(type(item) is int for item in value)
    if expected is float:
        return type(value) in (int, float)
    return type(value) is (get_origin(expected) or expected)


def _spell(expected: Any) -> str:
    origin = get_origin(expected)
    return "a list of int" if origin is tuple else f"of type {(origin or expected).__name__}"
