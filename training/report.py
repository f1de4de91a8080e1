"""What a run says about itself: counts, checksums and numbers, as plain values."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from model.pretrained import sha256_of
from training.calibrate import Calibration, SideReport
from training.config import HeadRecipe
from training.errors import RecipeError
from training.head import Trained
from training.records import Origin, local_file
from training.rows import Row, licence_of_weights
from training.tune_config import FitRecipe


@dataclass(frozen=True)
class SourceCount:
    """Rows of one source under one licence, by part."""

    source: str
    licence: str
    train: int
    validation: int
    calibration: int


def count_sources(rows: Sequence[Row]) -> list[SourceCount]:
    """Return the number of rows per source, in order of first appearance."""
    counts: dict[tuple[str, str], dict[str, int]] = {}
    for row in rows:
        counts.setdefault((row.group, row.licence), dict.fromkeys(("train", "validation", "calibration"), 0))
        counts[row.group, row.licence][row.part] += 1
    return [SourceCount(group, licence, **parts) for (group, licence), parts in counts.items()]


def checksums(sources: Iterable[Origin], data: str) -> dict[str, str]:
    """Return the SHA-256 of every local data file, and the split of every Hub data set, by path."""
    found: dict[str, str] = {}
    for source in sources:
        path = local_file(source, Path(data))
        found[source.path] = sha256_of(path) if path else f"Hub data set, split {source.split}"
    return found


def licence_for(recipe: HeadRecipe | FitRecipe, licences: set[str]) -> str:
    """Return the licence of weights made of rows under `licences`: the recipe's, or what follows from the rows.

    Raises:
        RecipeError: if the recipe names none and none follows.
    """
    licence = recipe.licence or licence_of_weights(licences)
    if licence is None:
        raise RecipeError(f"set recipe key licence: it does not follow from {sorted(licences)}")
    return licence


def licence_beside(folder: Path) -> set[str]:
    """Return the licence that a fine-tuning noted beside its adapter; of a stranger's adapter nothing is known."""
    path = folder / "metrics.json"
    found = json.loads(path.read_text(encoding="utf-8")).get("licence") if path.is_file() else None
    return {str(found)} if found is not None else set()


def calibration_report(rows: Sequence[Row], calibration: Calibration, recipe: HeadRecipe) -> dict[str, Any]:
    """Return the short report that travels in `safety_config.json`."""
    return {
        "recipe": recipe.name,
        "seed": recipe.seed,
        "rows": {f"{count.source} ({count.licence})": count.train for count in count_sources(rows)},
        "data_sha256": checksums(recipe.sources.values(), recipe.data),
        "response_tokens": recipe.cut.response_tokens,
        "request": _side(calibration.request, recipe.acting.request_false_positives),
        "response": _side(calibration.response, recipe.acting.response_false_positives),
    }


def metrics(
    rows: Sequence[Row], trained: Trained, calibration: Calibration, recipe: HeadRecipe, command: str
) -> dict[str, Any]:
    """Return everything measured, for `metrics.json`."""
    return {
        "command": command,
        "seed": recipe.seed,
        "data_sha256": checksums(recipe.sources.values(), recipe.data),
        "rows": [asdict(count) for count in count_sources(rows)],
        "history": trained.history,
        "request": asdict(calibration.request),
        "response": asdict(calibration.response),
        "onset": calibration.onset,
    }


def _side(report: SideReport, target: float) -> dict[str, Any]:
    rate = report.false_positives
    return {
        "block_sources": list(report.block_sources),
        "false_positive_target": target,
        "false_positives": {"rate": rate.value, "low": rate.low, "high": rate.high, "hits": rate.hits, "n": rate.n},
        "flag_f1": report.flag_f1,
        "auroc": {name: quality.auroc for name, quality in report.per_source.items() if quality.auroc is not None},
    }
