"""What a run says about itself: counts, checksums and numbers, as plain values."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from model.pretrained import sha256_of
from training.calibrate import Calibration, SideReport
from training.config import HeadRecipe
from training.head import Trained
from training.records import Origin, local_file
from training.rows import Row


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
        "redraw_below": calibration.redraw_below,
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
