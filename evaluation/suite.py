"""What is measured, every choice of it: a measure for each attack, and a suite of them in a YAML file."""

from collections.abc import Sequence
from dataclasses import fields, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from evaluation.rows import is_of_hub

SHIPPED = Path(__file__).parent / "suites"
TEXTS = Path(__file__).parent / "texts"
"""Texts that come with this release."""
STRICT = ConfigDict(extra="forbid")

Kind = Literal[
    "direct",
    "ready",
    "exploit",
    "scenes",
    "conversations",
    "relapses",
    "affirmed",
    "prefill",
    "late",
    "diluted",
    "search",
    "benign",
    "requests",
    "responses",
    "onsets",
]
"""An attack of `evaluation.attack`, benign requests sent as they are, or labelled texts that the signal scores."""
SCORED = ("requests", "responses", "onsets")
"""What the signal scores: `evaluation.signal`, and made onsets of `evaluation.onsets`. Nothing is generated."""
ANSWERS = "answers.jsonl"
"""The file of a suite that comes with no data set: harmless answers of a served model."""
DEPTHS: dict[str, tuple[int, ...]] = {
    "prefill": (5, 10, 20, 40, 100, 200),
    "late": (25, 100, 300, 1000),
    "diluted": (500, 2000),
}
"""Tokens that are given, by attack: of the harmful response, of the harmless opening, around the request."""
BEGUN = ("affirmed", "prefill", "late", "relapses")
"""What begins the response, which the server must go on with."""
OF_ATTACKS = ("suffix", "policies", "max_tokens", "tokenizer")
"""Keys without a meaning for what is scored."""
FILLED = ("late", "diluted", "onsets")
"""What has harmless text in it."""
Policy = Literal["both", "output", "none"]
"""The sides that block."""
Tokens = Annotated[int, Field(ge=0)]
AtLeastOne = Annotated[int, Field(ge=1)]
Name = Annotated[str, Field(pattern=r"^[a-z0-9_-]+$")]
"""Of a measure; it names a file too."""


@dataclass(frozen=True, config=STRICT)
class Measure:
    """One attack on some requests, or benign requests for its price."""

    kind: Kind
    data: Path
    """JSON lines of `prompt`; `prefill`, `late` and `onsets` need `harmful_response`, `ready` needs `attack_prompt`,
    `responses` needs `response`. In a suite relative to its own place or to the folder of data; or a data set of the
    Hub that has these fields, as `hub:NAME` or `hub:NAME:SPLIT`."""
    source: str = ""
    """Only rows whose source begins with this."""
    n: AtLeastOne = 373
    """Most prompts; of labelled texts, most rows, and of made onsets, most harmful responses."""
    label: Literal[0, 1] | None = None
    """Of the rows of `requests` and `responses` that carry none; those that carry the other are left out. Null takes
    every row with its own."""
    suffix: str = ""
    """Ends every prompt: the trigger of a backdoor."""
    depths: tuple[Tokens, ...] | None = None
    """Tokens that are given; null takes those of the attack."""
    filler: Path | None = None
    """JSON lines of harmless responses, for `late`, `diluted` and `onsets`."""
    rounds: AtLeastOne | None = None
    """How often `search` changes the best wording so far; null takes 12."""
    width: AtLeastOne | None = None
    """Changes that `search` tries in each round; null takes 8."""
    policies: Annotated[tuple[Policy, ...], Field(min_length=1)] = ("both", "output", "none")
    max_tokens: AtLeastOne = 48
    """Of the longest response."""
    tokenizer: str | None = None
    """Counts the tokens that are given; null takes that of the served model."""

    def __post_init__(self) -> None:
        if self.depths is not None and (self.kind not in DEPTHS or not self.depths):
            raise ValueError(f"depths are for {list(DEPTHS)}, one at least")
        if (self.filler is None) is (self.kind in FILLED):
            raise ValueError(f"filler, a file of harmless responses, is for {list(FILLED)}, which need it")
        if (self.rounds or self.width) and self.kind != "search":
            raise ValueError("rounds and width are for search")
        if self.label is not None and self.kind not in ("requests", "responses"):
            raise ValueError("label is for requests and responses")
        if self.kind in SCORED and any(getattr(self, name) != getattr(type(self), name) for name in OF_ATTACKS):
            raise ValueError(f"{', '.join(OF_ATTACKS)} are not for {list(SCORED)}: nothing is generated")


@dataclass(frozen=True, config=STRICT)
class Suite:
    """Measures by name."""

    measures: Annotated[dict[Name, Measure], Field(min_length=1)]


def load(name: str, data: Path) -> Suite:
    """Return a suite with the files of its measures in the folder `data`.

    Args:
        name: a YAML file, or the name of a shipped suite.
        data: folder of the files that lie neither beside the suite nor among the texts of this release.

    Raises:
        ValueError: naming the file and the key that is wrong, or what suites there are.
    """
    path = next((p for p in (Path(name), SHIPPED / f"{name}.yaml") if p.is_file()), None)
    if path is None:
        raise ValueError(f"no suite {name!r}; shipped suites are {shipped()}{_nearest(name, shipped())}")
    try:
        raw: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
        suite = TypeAdapter(Suite).validate_python(raw)
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: {' '.join(str(error).split())}") from error
    except ValidationError as error:
        raise ValueError(f"{path}: {explain(error)}") from error
    places = (path.parent, TEXTS, data)
    return Suite({name: _found(measure, places) for name, measure in suite.measures.items()})


def _found(measure: Measure, places: Sequence[Path]) -> Measure:
    """Return the measure with its files in the first of the places that has them, or else the last."""

    def at(name: Path) -> Path:
        if is_of_hub(name):
            return name
        return next((place / name for place in places if (place / name).is_file()), places[-1] / name)

    return replace(measure, data=at(measure.data), filler=measure.filler and at(measure.filler))


def require_files(suite: Suite) -> None:
    """See that the files of a suite are there.

    Raises:
        ValueError: naming the first that is missing, its measure, and what makes it.
    """
    for name, measure in suite.measures.items():
        for path in filter(None, (measure.data, measure.filler)):
            if not is_of_hub(path) and not path.is_file():
                prompts = path.with_name("benign_prompts.jsonl")
                made = f"python -m evaluation.answers --server ADDRESS --data {prompts} --out {path}"
                hint = f"; this makes it: {made}" if path.name == ANSWERS else ""
                raise ValueError(f"the measure {name} needs {path}, which does not exist{hint}")


def explain(error: ValidationError) -> str:
    """Return the first thing that is wrong, in a line."""
    first = error.errors(include_url=False)[0]
    where, said = ".".join(map(str, first["loc"])), first["msg"].removeprefix("Value error, ")
    if first["type"] == "unexpected_keyword_argument":
        known = [field.name for field in fields(Measure if len(first["loc"]) > 1 else Suite)]
        return f"{where} is not one of the keys {known}{_nearest(str(first['loc'][-1]), known)}"
    hint = _nearest(str(first["input"]), get_args(Kind)) if first["loc"][-1:] == ("kind",) else ""
    return ": ".join(filter(None, (where, f"{said}{hint}")))


def _nearest(name: str, known: Sequence[str]) -> str:
    """Return a hint at the known name that `name` resembles most."""
    matches = get_close_matches(name, known, n=1)
    return f"; did you mean {matches[0]!r}?" if matches else ""


def shipped() -> list[str]:
    """Return the names of the suites that come with this release."""
    return sorted(path.stem for path in SHIPPED.glob("*.yaml"))
