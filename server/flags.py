"""The command line: one flag for every setting, and a help page for a person."""

import argparse
from collections.abc import Sequence
from typing import Any, Literal, NoReturn, get_args, get_origin

from pydantic.fields import FieldInfo

from model import __version__
from model.policy import Mode
from server.settings import KEYS_VARIABLE, ConfigurationError, Settings, nearest

_DESCRIPTION = "Serve a language model behind the OpenAI API, and score every token for safety before it leaves."

_EPILOG = """\
Every setting is also a variable (BALLAST_PORT=9000) and a key of the settings file (port: 9000).
Flags win over variables, variables over the file. Keys are never flags; as a variable they are a JSON list:
BALLAST_API_KEYS='[{"name": "app", "key": "change-me"}]'. BALLAST_CACHE says where converted weights are kept.

examples:
  ballast-serve
  ballast-serve --port 9000 --input-mode score
  ballast-serve --checkpoint smollm2-135m/permissive
  ballast-serve --host 0.0.0.0 --config ballast.yaml

  # ballast.yaml
  log_format: json
  api_keys:
    - {name: app, key: change-me}
    - {name: red-team, key: change-me-too, may_loosen: true, expose_risk: full}
"""

_WITHOUT_FLAG = ("api_keys",)
"""A secret on the command line is visible to every process."""


class _Parser(argparse.ArgumentParser):
    """Reports a wrong command line in one line."""

    def error(self, message: str) -> NoReturn:
        raise ConfigurationError(message)


def parse(arguments: Sequence[str]) -> tuple[dict[str, Any], str | None]:
    """Return the settings given as flags, and the settings file.

    Raises:
        ConfigurationError: on an unknown flag, naming the nearest known one, or a flag without its value.
    """
    parser = build()
    known, rest = parser.parse_known_args(arguments)
    if rest:
        flags = [flag for action in parser._actions for flag in action.option_strings]
        name = rest[0].split("=")[0]
        if name.removeprefix("--").replace("-", "_") in _WITHOUT_FLAG:
            places = f"put keys into the settings file (--config), or {KEYS_VARIABLE}"
            raise ConfigurationError(f"{name} is no flag, as every process could read it; {places}")
        raise ConfigurationError(f"unknown argument {name}{nearest(name, flags)}")
    given = vars(known)
    config = given.pop("config", None)
    return given, config


def build() -> argparse.ArgumentParser:
    """Return the parser of `ballast-serve`."""
    parser = _Parser(
        prog="ballast-serve",
        usage="ballast-serve [--config FILE] [--<setting> VALUE ...]",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=36, width=120),
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"ballast {__version__}")
    parser.add_argument("--config", metavar="FILE", help="YAML file with settings (variable: BALLAST_CONFIG)")
    groups: dict[str, Any] = {}
    for name, field in Settings.model_fields.items():
        extra = field.json_schema_extra
        assert isinstance(extra, dict)
        group = str(extra["group"])
        if group not in groups:
            groups[group] = parser.add_argument_group(group)
        if name not in _WITHOUT_FLAG:
            _add(groups[group], name, field, extra["show"])
    return parser


def _add(group: Any, name: str, field: FieldInfo, shown: Any) -> None:
    """Add one setting's flag. Values stay strings here; `Settings` checks them."""
    flag = "--" + name.replace("_", "-")
    text = f"{field.description} (default: {shown or _in_words(field.default)})"
    if bool in (field.annotation, *get_args(field.annotation)):
        group.add_argument(flag, action=argparse.BooleanOptionalAction, help=text)
    else:
        group.add_argument(flag, metavar=_metavar(name, field.annotation), help=text)


def _in_words(default: Any) -> str:
    if isinstance(default, bool):
        return "on" if default else "off"
    if isinstance(default, tuple):
        return ",".join(default) or "none"
    return str(default.value if isinstance(default, Mode) else default)


def _metavar(name: str, annotation: Any) -> str:
    if annotation is Mode:
        return "{" + ",".join(mode.value for mode in Mode) + "}"
    for candidate in (annotation, *get_args(annotation)):
        if get_origin(candidate) is Literal:
            return "{" + ",".join(get_args(candidate)) + "}"
    return name.rsplit("_", 1)[-1].upper()
