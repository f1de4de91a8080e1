"""The README.md of a checkpoint: what it is, what it was made from, how good it is, and under which licence."""

from collections.abc import Mapping, Sequence

from model.config import ClsConfig, SafetyConfig, TokenHeadConfig
from training.calibrate import Calibration, SideReport
from training.config import HeadRecipe
from training.metrics import Rate
from training.report import SourceCount

_LICENCE_NOTES = {
    "CC-BY-NC-SA-4.0": "Some training rows are non-commercial: CC-BY-NC-SA-4.0 applies to these weights.",
    "Apache-2.0": "All training rows are under MIT, Apache or CC-BY licences; these weights are under Apache-2.0.",
}


def model_card(
    config: SafetyConfig,
    recipe: HeadRecipe,
    counts: Sequence[SourceCount],
    checksums: dict[str, str],
    calibration: Calibration,
    command: str,
) -> str:
    """Return the model card as Markdown."""
    sections = (
        _head(config, recipe, command),
        _data(counts, checksums),
        _thresholds(config, calibration, recipe),
        _side("request", calibration.request),
        _side("response", calibration.response),
        _limits(recipe),
    )
    return "\n\n".join(sections) + "\n"


def fit_card(name: str, base: str, kind: str, licence: str, rows: Mapping[str, Mapping[str, int]], command: str) -> str:
    """Return the model card of a fine-tuning as Markdown.

    Args:
        name: of the recipe.
        base: the model that was fine-tuned.
        kind: what the folder holds, such as "adapter".
        licence: of the weights.
        rows: number of rows per source, by part.
        command: that made it.
    """
    cells = [(part, source, str(count)) for part, sources in rows.items() for source, count in sources.items()]
    return (
        f"# {base}, fine-tuned: {name}\n\nThis folder holds the {kind}, the resolved recipe (`recipe.yaml`), and "
        "losses and checksums (`metrics.json`, `plots/loss.png`).\n\n"
        f"Licence: {licence}. {_LICENCE_NOTES.get(licence, '')}\n\nMade by:\n\n```\n{command}\n```\n\n"
        f"## Data\n\n{_table(('part', 'source', 'rows'), cells)}\n"
    )


def _head(config: SafetyConfig, recipe: HeadRecipe, command: str) -> str:
    note = _LICENCE_NOTES.get(config.licence, f"The licence of these weights is {config.licence}.")
    parts = [_token_head(config.token_head)] if config.token_head is not None else []
    if "query" in config.calibration:
        parts.append("`calibration.query` of `safety_config.json` says how the further head was made.")
    parts += [_cls(config.cls, has_head=config.token_head is not None)] if config.cls is not None else []
    tuned = "fine-tuned by the adapter beside this file" if config.base.adapter else "frozen"
    base = config.base
    return (
        f"# Safety signal for {base.name}: {recipe.name}\n\n{' '.join(parts)} "
        f"The base model is {tuned}: `{base.name}`, weights fingerprint `{base.weights[:16]}`, calibrated in "
        f"{base.dtype}.\n\n"
        f"Licence: {config.licence}. {note}\n\n"
        f"Made by:\n\n```\n{command}\n```"
    )


def _token_head(head: TokenHeadConfig) -> str:
    shape = f"hidden layer of 2 x {head.hidden}" if head.hidden else "linear"
    return (
        f"A Ballast token head ({shape}, layers {list(head.layers)}, each state beside the mean of its passage) that "
        "reads a request risk at the end of the request and a response risk at every response token."
        + (" A further head reads the state at every token of the query, alone." if head.reads_query else "")
    )


def _cls(cls: ClsConfig, *, has_head: bool) -> str:
    shares = f", its logits weighing {cls.request_share:g} (request) and {cls.response_share:g} (response)"
    return (
        f"A `[CLS]` signal (windows {list(cls.windows)}, schedule {cls.schedule}, "
        f"{'read' if cls.is_read else 'not read'} by response tokens{shares if has_head else ''}). What it learned "
        f"from is in `adapter/README.md`; rows below {'are those of the token head' if has_head else 'set thresholds'}."
    )


def _data(counts: Sequence[SourceCount], checksums: dict[str, str]) -> str:
    rows = [(c.source, c.licence, str(c.train), str(c.validation), str(c.calibration)) for c in counts]
    files = [(f"`{path}`", f"`{checksum}`") for path, checksum in checksums.items()]
    return (
        "## Data\n\n"
        "Rows by source. Validation rows chose the `flag` thresholds; calibration rows served the "
        "thresholds alone. No prompt stands in two parts.\n\n"
        f"{_table(('source', 'licence', 'train', 'validation', 'calibration'), rows)}\n\n"
        f"{_table(('file', 'SHA-256'), files)}"
    )


def _thresholds(config: SafetyConfig, calibration: Calibration, recipe: HeadRecipe) -> str:
    rows = []
    for name, side in (("request", calibration.request), ("response", calibration.response)):
        sources = ", ".join(side.block_sources)
        found = (f"{side.thresholds.block:.4f}", f"{side.thresholds.flag:.4f}")
        rows.append((name, *found, _rate(side.false_positives), sources))
    redraw, share = "", recipe.acting.redraw_share
    if share is not None:
        below = f"a request risk of {config.redraw_below:.4f}, which {share:.1%} of the benign requests do not exceed"
        redraw = f" A refusal of the model's own is drawn again up to {below}."
    return (
        "## Thresholds\n\n"
        f"{_table(('side', 'block', 'flag', 'benign rows over block', 'set on'), rows)}\n\n"
        f"Aims: {recipe.acting.request_false_positives:.2%} of benign requests and "
        f"{recipe.acting.response_false_positives:.2%} of benign responses over `block`. Onset {config.onset:.4f}, "
        f"smoothing {config.smoothing}, patience {config.patience}, lookback {config.lookback}."
        f"{redraw}"
    )


def _side(name: str, side: SideReport) -> str:
    rows = [
        (
            source,
            str(found.num_benign),
            str(found.num_harmful),
            _number(found.auroc),
            _number(found.average_precision),
            _number(found.f1_at_flag),
            _rate(found.false_positives_at_block),
            _rate(found.recall_at_block),
        )
        for source, found in side.per_source.items()
    ]
    header = ("source", "benign", "harmful", "AUROC", "AP", "F1 at flag", "benign over block", "harmful over block")
    return (
        f"## {name.capitalize()} risk on held-out rows\n\n{_table(header, rows)}\n\n"
        f"F1 at `flag` on validation rows with weighted sources: {side.flag_f1:.3f}. Intervals are 95 % Wilson."
    )


def _limits(recipe: HeadRecipe) -> str:
    onset = "no row of the tables above says where harm begins"
    if recipe.augment.onset > 0.0:
        onset = "where harm begins is known of those alone that were made to turn"
    return (
        "## Limits\n\n"
        f"Response labels are per response; {onset}. Sources differ in what they call harmful. "
        f"Responses were read up to {recipe.cut.response_tokens} tokens: in longer ones false alarms may be more "
        "frequent. Thresholds hold for the base model, precision and chat template named above."
    )


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _rate(rate: Rate | None) -> str:
    return "-" if rate is None else f"{rate.value:.2%} ({rate.low:.2%} to {rate.high:.2%}, n = {rate.n})"
