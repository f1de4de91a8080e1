"""The summary of the signal as Markdown tables."""

from typing import Any

from evaluation.intervals import Estimate


def as_markdown(summary: dict[str, Any]) -> str:
    """Return the summary that `evaluation.signal.measure` makes as Markdown."""
    lines = []
    for side, acted in (("requests", "refused"), ("responses", "stopped")):
        lines += [f"### {side.capitalize()}", ""]
        lines += [
            "| source | n | AUROC | F1 at `flag` | all harmful: F1 | average precision |",
            "|---|---|---|---|---|---|",
        ]
        for source, found in summary[side]["separation"].items():
            cells = [_cell(found[name]) for name in ("auroc", "f1_at_flag")]
            trivial, precision = f"{found['f1_calling_all_harmful']:.3f}", _cell(found["average_precision"])
            lines.append(f"| {source} | {found['auroc'].n} | {' | '.join(cells)} | {trivial} | {precision} |")
        lines += ["", f"| source | n | {acted} at `block` |", "|---|---|---|"]
        for name, share in summary[side]["over_block"].items():
            lines.append(f"| {name} | {share.n} | {_share(share)} |")
        lines.append("")
    return "\n".join([*lines, *_depths(summary["responses"]["by_depth"]), ""])


def _depths(by_depth: dict[str, Any]) -> list[str]:
    """Return the table of what the first tokens of responses give, row by row."""
    lines = [
        "### Inside responses",
        "",
        "| source | tokens read | AUROC | F1 at `flag` | harmful: stopped at `block` | harmless: stopped at `block` |",
        "|---|---|---|---|---|---|",
    ]
    sources = {name.rpartition(", ")[0] for found in by_depth.values() for name in found["over_block"]}
    for source in sorted(sources):
        for depth, found in by_depth.items():
            both = found["separation"].get(source)
            cells = [_cell(both[name]) if both else "-" for name in ("auroc", "f1_at_flag")]
            for label in ("harmful", "harmless"):
                share = found["over_block"].get(f"{source}, {label}")
                cells.append(f"{_share(share)}, n = {share.n}" if share else "-")
            lines.append(f"| {source} | {depth} | {' | '.join(cells)} |")
    return lines


def _cell(estimate: Estimate) -> str:
    return f"{estimate.value:.3f} [{estimate.low:.3f}, {estimate.high:.3f}]"


def _share(share: Estimate) -> str:
    return f"{share.value:.2%} [{share.low:.2%}, {share.high:.2%}]"
