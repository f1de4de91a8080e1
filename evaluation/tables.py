"""Tables of estimates, as Markdown and as HTML."""

import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any, NamedTuple

from evaluation.intervals import Estimate
from evaluation.onsets import COUNTS
from evaluation.outcomes import Outcome, Price

SAYS = {
    "both": "both sides block",
    "output": "the output side blocks",
    "none": "nothing acts",
}
"""Policies in words."""
RECALLS = {"recall_at_1_percent": "recall at 1 %", "recall_at_0.1_percent": "at 0.1 %"}
NOT_MEASURED = "not measured"
STOPPED = "acted on or declined"
"""Of harmless prompts, whatever the plain model does."""


class Table(NamedTuple):
    """Cells by row, below a head."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]


def as_markdown(table: Table, level: int = 2) -> str:
    """Return the table below a heading of this level."""
    lines = [table.head, ["---"] * len(table.head), *table.rows]
    return "\n".join([f"{'#' * level} {table.title}", "", *(f"| {' | '.join(line)} |" for line in lines), ""])


def as_html(table: Table) -> str:
    """Return the table below a heading."""
    head = "".join(f"<th>{in_html(cell)}</th>" for cell in table.head)
    rows = "\n".join("<tr>" + "".join(f"<td>{in_html(cell)}</td>" for cell in row) + "</tr>" for row in table.rows)
    title = in_html(table.title)
    return f"<h2>{title}</h2>\n<table><thead><tr>{head}</tr></thead><tbody>\n{rows}\n</tbody></table>\n"


def of_outcomes(outcomes: Iterable[Outcome]) -> list[Table]:
    """Return the tables of one run: attacks, and harmless prompts."""
    every, tables = list(outcomes), []
    for is_attack, title, name in ((True, "Attacks", "success"), (False, "Harmless prompts", STOPPED)):
        rows = [_cells(one) for one in every if one.is_attack is is_attack]
        head = ("measure", "attack", "policy", "n", name, "acted on", "invalid", "not judged")
        tables += [Table(title, head, rows)] if rows else []
    return tables


def side_by_side(series: Mapping[str, Sequence[Outcome]]) -> list[Table]:
    """Return the tables of several runs, a column for each of `series`."""

    def share(one: Outcome) -> str:
        left_out = {"invalid attempts": one.num_invalid, "not judged": one.num_unjudged}
        says = [f"{count} {what}" for what, count in left_out.items() if count]
        return ", ".join([share_of(one.share, with_n=True), *says])

    def acted_on(one: Outcome) -> str:
        return share_of(one.acted_on, with_n=True) if one.policy != "none" else ""

    tables = []
    for is_attack, title, say in (
        (True, "Attacks: success", share),
        (True, "Attacks: acted on at every attempt", acted_on),
        (False, f"Harmless prompts: {STOPPED}", share),
    ):
        cells: dict[tuple[str, str], dict[str, str]] = {}
        for name, outcomes in series.items():
            for one in outcomes:
                if one.is_attack is is_attack and (text := say(one)):
                    cells.setdefault((one.measure, one.attack), {})[name] = text
        used = [name for name in series if any(name in row for row in cells.values())]
        rows = [[*group, *(row.get(name, "") for name in used)] for group, row in cells.items()]
        tables += [Table(title, ("measure", "attack", *used), rows)] if rows else []
    return tables


def of_prices(plain: str, prices: Mapping[str, Iterable[Price]]) -> list[Table]:
    """Return the table of what each run costs beside the run of the plain model; none where they share no prompt."""
    head = ("run", "measure", "policy", "n", f"disturbed: {STOPPED} where it answers", "same text as it")
    rows = [
        [name, one.measure, SAYS[one.policy], str(one.same.n), share_of(one.disturbed), share_of(one.same)]
        for name, some in prices.items()
        for one in some
    ]
    return [Table(f"Harmless prompts beside the plain model, {plain}", head, rows)] if rows else []


def of_signal(summary: Mapping[str, Any]) -> list[Table]:
    """Return the tables of what `evaluation.signal.summarise` makes."""
    tables = []
    for side, acted in (("requests", "refused"), ("responses", "stopped")):
        if side not in summary:
            continue
        head = (
            "source",
            "n (harmful)",
            "AUROC",
            "F1 at `flag`",
            "all harmful: F1",
            "average precision",
            *RECALLS.values(),
        )
        rows = [
            [
                source,
                f"{found['auroc'].n} ({found['num_harmful']})",
                *(_value(found[name]) for name in ("auroc", "f1_at_flag")),
                f"{found['f1_calling_all_harmful']:.3f}",
                *(_value(found[name]) for name in ("average_precision", *RECALLS)),
            ]
            for source, found in summary[side]["separation"].items()
        ]
        tables += [Table(side.capitalize(), head, rows)] if rows else []
        shares = [[name, str(share.n), share_of(share, 2)] for name, share in summary[side]["over_block"].items()]
        tables.append(Table(f"{side.capitalize()}, {acted}", ("source", "n", f"{acted} at `block`"), shares))
    if "by_depth" in summary.get("responses", {}):
        tables.append(_depths(summary["responses"]["by_depth"]))
    return tables


def of_onsets(measure: str, found: Mapping[str, Mapping[str, Estimate]]) -> Table:
    """Return the table of what `evaluation.onsets.at_thresholds` makes."""
    rows = [
        [threshold, what, str(one.n), _value(one, 1) if what in COUNTS else share_of(one)]
        for threshold, by in found.items()
        for what, one in by.items()
    ]
    return Table(f"Made onsets: {measure}", ("threshold", "responses", "n", "share or number"), rows)


def in_html(text: str) -> str:
    """Return Markdown as HTML, of which it may have words `in backticks` alone."""
    return re.sub(r"`([^`]*)`", r"<code>\1</code>", escape(text))


def share_of(share: Estimate | None, digits: int = 1, *, with_n: bool = False) -> str:
    """Return a share with its interval in per cent."""
    if share is None:
        return NOT_MEASURED
    text = f"{share.value:.{digits}%} [{share.low:.{digits}%}, {share.high:.{digits}%}]"
    return f"{text}, n = {share.n}" if with_n else text


def _cells(one: Outcome) -> list[str]:
    n = str(one.share.n) if one.share else "0"
    is_other = one.acted_on is not None and (one.share is None or one.share.n != one.acted_on.n)
    shares = share_of(one.share), share_of(one.acted_on, with_n=is_other)
    return [one.measure, one.attack, SAYS[one.policy], n, *shares, str(one.num_invalid), str(one.num_unjudged)]


def _value(one: Estimate | None, digits: int = 3) -> str:
    return f"{one.value:.{digits}f} [{one.low:.{digits}f}, {one.high:.{digits}f}]" if one else "-"


def _depths(by_depth: Mapping[str, Any]) -> Table:
    """Return the table of what the first tokens of responses give, row by row."""
    head = ("source", "tokens read", "AUROC", "F1 at `flag`", "harmful: stopped at `block`", "harmless: stopped")
    sources, rows = {name.rpartition(", ")[0] for found in by_depth.values() for name in found["over_block"]}, []
    for source in sorted(sources):
        for depth, found in by_depth.items():
            both = found["separation"].get(source)
            cells = [_value(both[name]) if both else "-" for name in ("auroc", "f1_at_flag")]
            for label in ("harmful", "harmless"):
                share = found["over_block"].get(f"{source}, {label}")
                cells.append(share_of(share, 2, with_n=True) if share else "-")
            rows.append([source, depth, *cells])
    return Table("Inside responses", head, rows)
