"""Every setting of the server. Precedence: flags, then environment, then file, then the defaults here."""

import ipaddress
import os
import re
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    model_validator,
)
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

from model.policy import Mode
from model.schedule import parse
from server.complaint import complaint

DEFAULT_MODEL = "smollm2-135m"
"""As `model.pretrained.DEFAULT_MODEL`; importing that would load torch before `--help` can answer."""

PREFIX = "BALLAST_"
LINK = re.compile(r"BALLAST_(\w+_)?(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT_\d+_\w+)")
"""Variables that Kubernetes sets beside a Service whose name begins with `ballast`."""
LINK_URL = re.compile(r"BALLAST_(\w+_)?PORT")
"""Others, which it sets to a URL."""
OTHER_VARIABLES = ("BALLAST_CONFIG", "BALLAST_CACHE")
"""Variables that are no settings: the settings file, and where `model.pretrained` keeps converted weights."""

KEYS_VARIABLE = """BALLAST_API_KEYS='[{"name": "app", "key": "..."}]'"""
"""How keys are written as a variable."""

NO_CHECKPOINT = "none"

Exposure = Literal["full", "flag", "none"]
"""How much of the risks a caller sees: the numbers, only whether they are flagged, or nothing."""


class ConfigurationError(Exception):
    """A setting is unknown or has a wrong value. The message is one line for a person."""


class ApiKey(BaseModel):
    """A key and what its bearer may do."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    """Appears in the log instead of the key."""
    key: SecretStr = Field(min_length=1)
    may_loosen: bool = False
    expose_risk: Exposure | None = None
    """Overrides the server's setting for this key."""


def _split(value: Any) -> Any:
    if isinstance(value, str):
        return [item.strip() for item in value.split(",") if item.strip()]
    return value


def _schedule(value: str) -> str:
    parse(value)
    return value


def _numbered(value: Any) -> Any:
    """Return the list that variables such as BALLAST_API_KEYS__0__NAME spell."""
    if isinstance(value, dict) and all(str(key).isdigit() for key in value):
        return [value[key] for key in sorted(value, key=int)]
    return value


Names = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_split)]
"""A list; as a flag or variable, separated by commas."""


def setting(default: Any, group: str, text: str, show: str | None = None) -> Any:
    """Return a field with its help: the group it is listed under, one line of text, its default in words."""
    return Field(default, description=text, json_schema_extra={"group": group, "show": show})


class Settings(BaseSettings):
    """What a server is told at its start; nothing changes afterwards."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        env_nested_delimiter="__",
        env_ignore_empty=True,
        frozen=True,
        extra="forbid",
        hide_input_in_errors=True,
    )

    model: str = setting(DEFAULT_MODEL, "Model", "a short name, a folder, a GGUF file or a Hub id")
    checkpoint: str | None = setting(
        None, "Model", "safety checkpoint: a shipped name, a folder, or 'none' for no signal", "the model's own"
    )
    served_model_name: str | None = setting(None, "Model", "name that clients use for the model", "as in --model")
    device: str = setting("auto", "Model", "a torch device such as cpu or cuda:0", "cuda if there is one")
    dtype: Literal["auto", "bfloat16", "float16", "float32", "int8"] = setting(
        "auto",
        "Model",
        "precision of the weights; int8, on a CPU, is bfloat16 with the weights of linear layers in 8 bits",
        "that of the calibration",
    )
    num_threads: Annotated[int, Field(ge=1)] | None = setting(
        None, "Model", "CPU threads", "as many as torch or a container's quota says"
    )
    compile: bool = setting(True, "Model", "compile the model's layers at the start, on a CPU")
    trust_remote_code: bool = setting(False, "Model", "run code that comes with the weights")

    input_mode: Mode = setting(Mode.BLOCK, "Safety", "request side: off, score (observe) or block (act)")
    output_mode: Mode = setting(Mode.BLOCK, "Safety", "response side: off, score or block")
    schedule: Annotated[str, AfterValidator(_schedule)] | None = setting(
        None,
        "Safety",
        "when the response is assessed: every, annealed, periodic-N or first; of a checkpoint with [CLS] and a token "
        "head, when [CLS] is",
        "the checkpoint's own",
    )
    read_cls: bool | None = setting(
        None, "Safety", "response tokens read [CLS], where there is one", "the checkpoint's own"
    )
    redraw: bool = setting(
        True, "Safety", "draw a refusal of the model's own again at harmless requests, if the checkpoint says so"
    )
    expose_risk: Exposure | None = setting(
        None, "Safety", "what callers see of the risks", "full without keys on a loopback address, else flag"
    )
    refusal_in_content: bool = setting(True, "Safety", "put a refusal's text in content too")
    moderation_aliases: Names = setting(
        ("omni-moderation-latest",), "Safety", "other names for the model in moderation requests"
    )

    host: str = setting("127.0.0.1", "Network", "address to listen on")
    port: Annotated[int, Field(ge=0, le=65535)] = setting(8000, "Network", "port to listen on; 0 takes a free one")
    api_keys: Annotated[tuple[ApiKey, ...], BeforeValidator(_numbered)] = setting(
        (), "Network", "keys that clients need; from the file or the environment only"
    )
    metrics_open: bool = setting(False, "Network", "serve /metrics without a key")
    cors_origins: Names = setting((), "Network", "web origins that may call the API")

    max_running: Annotated[int, Field(ge=1)] = setting(32, "Limits", "sequences that are generated at a time")
    kv_cache_mib: Annotated[int, Field(ge=1)] | None = setting(
        None, "Limits", "MiB for keys and values", "2048, or most of a GPU's memory"
    )
    max_waiting: Annotated[int, Field(ge=0)] = setting(64, "Limits", "requests in the queue; more get a 429")
    max_n: Annotated[int, Field(ge=1, le=128)] = setting(
        16, "Limits", "most choices (n) of one request, if all can run or wait"
    )
    max_body_bytes: Annotated[int, Field(ge=1024)] = setting(4 << 20, "Limits", "longest body of a request")
    drain_s: Annotated[float, Field(ge=0)] = setting(30.0, "Limits", "seconds that running requests get at a stop")

    log_level: Literal["debug", "info", "warning", "error"] = setting("info", "Logging", "least level that is logged")
    log_format: Literal["console", "json"] = setting("console", "Logging", "how a log line looks")

    @model_validator(mode="after")
    def _check(self) -> "Settings":
        names = [entry.name for entry in self.api_keys]
        if len(set(names)) != len(names):
            raise ValueError(f"api_keys: names must differ, got {names}")
        if len({entry.key.get_secret_value() for entry in self.api_keys}) != len(names):
            raise ValueError(f"api_keys: keys must differ, two of {names} are the same")
        if self.checkpoint == NO_CHECKPOINT and (self.input_mode, self.output_mode) != (Mode.OFF, Mode.OFF):
            raise ValueError("checkpoint: without a signal, input_mode and output_mode must both be off")
        return self

    @property
    def name(self) -> str:
        """The name that clients use for the model."""
        return self.served_model_name or self.model

    @property
    def most_choices(self) -> int:
        """The largest `n` that can be served at all; a larger one would find the queue full however idle it is."""
        return min(self.max_n, self.max_running + self.max_waiting)

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach the server."""
        return is_loopback_name(self.host)

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Return the sources: values given, then the environment. `load` adds flags and the file."""
        if isinstance(env_settings, EnvSettingsSource):
            env_settings.env_vars = {
                name: value for name, value in env_settings.env_vars.items() if not _is_link(name, value)
            }
        return init_settings, env_settings


def is_loopback_name(host: str) -> bool:
    """Tell whether `host` is `localhost` or a loopback address, without a port and without brackets."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _is_link(name: str, value: str | None) -> bool:
    """Tell whether a variable is not meant for us, but says where a Service is."""
    is_url = "://" in (value or "")
    return bool(LINK.fullmatch(name.upper()) or (is_url and LINK_URL.fullmatch(name.upper())))


def load(flags: Mapping[str, Any], file: str | None = None) -> Settings:
    """Return the settings that flags, environment and file give together.

    Raises:
        ConfigurationError: on an unknown name, with the nearest known one, or a wrong value.
    """
    path = file or os.environ.get("BALLAST_CONFIG")
    given = _read(Path(path)) if path else {}
    variables = {name: value for name, value in os.environ.items() if not _is_link(name, value)}
    check_variables(variables)
    set_there = {name.upper().split("__")[0] for name, value in variables.items() if value}
    values = {name: value for name, value in given.items() if PREFIX + name.upper() not in set_there}
    try:
        return Settings(**{**values, **flags})
    except ValidationError as error:
        raise ConfigurationError(_one_line(error)) from None
    except SettingsError:  # of what a variable may hold, only the keys are not plain text
        raise ConfigurationError(f"a variable is not valid JSON; write {KEYS_VARIABLE}") from None


def check_variables(environment: Mapping[str, str]) -> None:
    """Refuse variables that look like settings and are none.

    Raises:
        ConfigurationError: naming the variable and the nearest known one.
    """
    known = [*(PREFIX + name.upper() for name in Settings.model_fields), *OTHER_VARIABLES]
    for name in environment:
        if name.upper().startswith(PREFIX) and name.upper().split("__")[0] not in known:
            raise ConfigurationError(f"unknown variable {name}{nearest(name, known)}")


def nearest(name: str, known: list[str]) -> str:
    """Return a hint at the known name that `name` resembles most."""
    matches = get_close_matches(name, known, n=1, cutoff=0.4)
    return f"; did you mean {matches[0]}?" if matches else ""


def _read(path: Path) -> dict[str, Any]:
    """Return the content of a settings file, with known keys only."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"cannot read the settings file {path}: {error}") from None
    except yaml.YAMLError as error:
        raise ConfigurationError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigurationError(f"{path} must hold settings as `name: value`, got {type(content).__name__}")
    known = list(Settings.model_fields)
    for name in content:
        if name not in known:
            raise ConfigurationError(f"unknown setting {name!r} in {path}{nearest(str(name), known)}")
    return content


def _one_line(error: ValidationError) -> str:
    """Return the first problem, without its input, which may be a secret."""
    found = error.errors(include_input=False, include_url=False)
    first = next((one for one in found if one["type"] == "extra_forbidden"), found[0])
    name = ".".join(map(str, first["loc"]))
    if first["type"] == "extra_forbidden":
        known = ApiKey.model_fields if first["loc"][0] == "api_keys" else Settings.model_fields
        return f"{name}: unknown{nearest(str(first['loc'][-1]), list(known))}"
    message = complaint(first)
    return f"{name}: {message}" if name else message
