"""What is measured, every choice of it: a measure for each attack, and a suite of them in a YAML file."""

from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from model.pretrained import DEFAULT_MODEL

SHIPPED = Path(__file__).parent / "suites"
STRICT = ConfigDict(extra="forbid")

Kind = Literal[
    "direct", "ready", "exploit", "scenes", "conversations", "relapses", "prefill", "late", "diluted", "benign"
]
"""An attack of `evaluation.attack`, or benign requests sent as they are."""
Policy = Literal["both", "output", "none"]
"""The sides that block."""
Tokens = Annotated[int, Field(ge=0)]
AtLeastOne = Annotated[int, Field(ge=1)]


@dataclass(frozen=True, config=STRICT)
class Measure:
    """One attack on some requests, or benign requests for its price."""

    kind: Kind
    data: Path
    """JSON lines of `prompt`; `prefill` and `late` need `harmful_response`, `ready` needs `attack_prompt`. In a suite
    relative to its own place or to the folder of data."""
    source: str = ""
    """Only rows whose source begins with this."""
    n: AtLeastOne = 373
    """Most prompts."""
    depths: tuple[Tokens, ...] | None = None
    """Tokens that are given; null takes those of the attack."""
    filler: Path | None = None
    """JSON lines of harmless responses, for `late` and `diluted`."""
    policies: Annotated[tuple[Policy, ...], Field(min_length=1)] = ("both", "output", "none")
    max_tokens: AtLeastOne = 48
    """Of the longest response."""
    tokenizer: str = DEFAULT_MODEL
    """Of the served model; counts the tokens that are given."""

    def __post_init__(self) -> None:
        if self.kind in ("late", "diluted") and self.filler is None:
            raise ValueError(f"{self.kind} needs filler, a file of harmless responses")


@dataclass(frozen=True, config=STRICT)
class Suite:
    """Measures by name."""

    measures: Annotated[dict[str, Measure], Field(min_length=1)]


def load(name: str, data: Path) -> Suite:
    """Return a suite with the files of its measures in the folder `data`.

    Args:
        name: a YAML file, or the name of a shipped suite.
        data: folder of the files; those that lie beside a shipped suite are found there.

    Raises:
        ValueError: naming the file and the key that is wrong, or what suites there are.
    """
    path = next((p for p in (Path(name), SHIPPED / f"{name}.yaml") if p.is_file()), None)
    if path is None:
        raise ValueError(f"no suite {name!r}; shipped suites are {shipped()}")
    try:
        raw: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
        suite = TypeAdapter(Suite).validate_python(raw)
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: {' '.join(str(error).split())}") from error
    except ValidationError as error:
        raise ValueError(f"{path}: {explain(error)}") from error
    for measure in suite.measures.values():
        for field in ("data", "filler"):
            if (found := getattr(measure, field)) is not None:
                beside = path.parent / found
                object.__setattr__(measure, field, beside if beside.is_file() else data / found)
    return suite


def explain(error: ValidationError) -> str:
    """Return the first thing that is wrong, in a line."""
    first = error.errors(include_url=False, include_input=False)[0]
    return ": ".join(filter(None, (".".join(map(str, first["loc"])), first["msg"].removeprefix("Value error, "))))


def shipped() -> list[str]:
    """Return the names of the suites that come with this release."""
    return sorted(path.stem for path in SHIPPED.glob("*.yaml") if "measures:" in path.read_text(encoding="utf-8"))
