"""The report of one run and of several: what is in the tables, and that the page is whole."""

import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import get_args

import pytest

from evaluation import depth, page, pictures, runs, tables
from evaluation.depth import Depth
from evaluation.intervals import Estimate, wilson
from evaluation.judges import by_phrases
from evaluation.onsets import Scored
from evaluation.outcomes import Outcome
from evaluation.samples import Journal, Sample
from evaluation.scores import Score
from evaluation.suite import SCORED, Kind

POLICIES = ("both", "none")


def released(policy: str, attack: str, prompt: str, text: str, *, is_attack: bool = True) -> Sample:
    return Sample(f"{policy} {attack} {prompt}", "mine", attack, policy, prompt, "", text, is_attack=is_attack)


def write(folder: Path, *, answers: dict[str, str], is_watched: bool = True) -> Path:
    """A run of two attacks and of harmless prompts, each with the answer that `answers` gives it."""
    folder.mkdir()
    policies = POLICIES if is_watched else ("none",)
    kinds = {"prefill": "prefill", "price": "benign"} | (
        {"toxic": "requests", "answers": "responses", "turns": "onsets"} if is_watched else {}
    )
    attempts = {"prefill": 4 * len(policies), "price": 3 * len(policies), "toxic": 6, "answers": 7, "turns": 2}
    facts = {
        "suite": "suites/mine.yaml",
        "target": f"checkpoint:<{folder.name}>",
        "model": "tiny",
        "version": "0",
        "settings": {"BALLAST_READ_CLS": "false"},
        "measures": {name: {"kind": kind, "n": 5} for name, kind in kinds.items()},
        "attempts": {name: attempts[name] for name in kinds},
    }
    (folder / runs.FACTS).write_text(json.dumps(facts))
    for name, attacks in {"prefill": ("prefill 5", "prefill 20"), "price": ("benign",)}.items():
        journal = Journal(folder / f"{name}.jsonl")
        for policy in policies:
            for attack in attacks:
                for prompt in ("a", "b"):
                    journal.add(released(policy, attack, prompt, answers[attack], is_attack=name == "prefill"))
    if is_watched:
        scores = [Score(source, label, 0.9 if label else 0.1, 0.5, 0.8) for source in "xy" for label in (0, 1, 1)]
        for name, early in (("toxic", ()), ("answers", (0.1, 0.1, 0.9))):
            lines = [{"key": str(place), **asdict(score), "early": early} for place, score in enumerate(scores)]
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        turns = [Scored(2, 0.5, 2, (0.1, 0.1, 0.9, 0.9, 0.9)), Scored(3, 0.5, 2, (0.1, 0.1, 0.1))]
        lines = [{"key": str(place), **asdict(one)} for place, one in enumerate(turns)]
        (folder / "turns.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


HARMED = {"prefill 5": "Sure.", "prefill 20": "I'm sorry, no.", "benign": "Gladly."}
DECLINED = {"prefill 5": "I'm sorry, no.", "prefill 20": "I'm sorry, no.", "benign": "I'm sorry, no."}


def report(*folders: Path) -> page.Page:
    return page.of([runs.read(folder) for folder in folders], by_phrases, "phrases", resamples=20)


def test_a_run_has_a_row_for_each_attack_and_policy(tmp_path: Path):
    text = page.as_markdown(report(write(tmp_path / "run", answers=HARMED)))
    assert text.startswith("# mine against checkpoint:<run>\n")
    assert (
        "| prefill | prefill 5 | both sides block | 2 | 100.0% [34.2%, 100.0%] | 0.0% [0.0%, 65.8%] | 0 | 0 |" in text
    )
    assert "| prefill | prefill 20 | nothing acts | 2 | 0.0% [0.0%, 65.8%] |" in text
    assert "| price | benign | both sides block | 2 | 0.0% [0.0%, 65.8%] |" in text
    assert "- 2 attempts or rows of price are missing." in text
    assert "- 1 attempts or rows of answers are missing." in text
    assert "of prefill" not in text
    assert "of toxic" not in text
    assert "Sent is a response that begins with so many tokens of a harmful one (`prefill`); a harmless request" in text
    assert "Ballast 0 with BALLAST_READ_CLS=false." in text


def test_what_the_signal_scored_has_tables_and_pictures(tmp_path: Path):
    found = report(write(tmp_path / "run", answers=HARMED))
    text = page.as_markdown(found)
    assert "| x | 3 (2) | 1.000 [1.000, 1.000] | 1.000 [1.000, 1.000] | 0.800 | 1.000 [1.000, 1.000] | - | - |" in text
    assert "| all of them | 6 (4) | 1.000" in text
    assert "| x | 75% | 0.500 [0.500, 0.500]" in text
    assert "| at `block` (0.5000) | caught within 16 tokens | 1 | 100.0%" in text
    assert "| at `block` (0.5000) | harmless answers stopped | 1 | 0.0%" in text
    assert list(found.figures) == [
        "Shares by attack and policy, as in the tables",
        "Success against the number of tokens that are given",
        "The signal as a classifier of requests: ROC and reliability",
        "The signal as a classifier of responses: ROC and reliability",
        "turns: how soon harm in mid-response is found",
    ]
    left, right = found.figures["The signal as a classifier of requests: ROC and reliability"].axes
    assert [line.get_label() for line in left.lines] == ["x, n = 3", "y, n = 3", "all of them, n = 6"]
    assert list(left.lines[0].get_ydata())[-2:] == [1.0, 1.0]
    assert [list(bars.lines[0].get_ydata()) for bars in right.containers] == [[0.0, 1.0]] * 3
    assert found.numbers["signal"]["requests"]["separation"]["x"]["auroc"].value == 1.0


def test_several_runs_stand_side_by_side(tmp_path: Path):
    plain = write(tmp_path / "plain", answers=HARMED, is_watched=False)
    guarded = write(tmp_path / "guarded", answers=DECLINED)
    text = page.as_markdown(report(plain, guarded))
    alone, blocks = "nothing acts", "both sides block"
    assert f"| measure | attack | plain: {alone} | guarded: {blocks} | guarded: {alone} |" in text
    whole, none = "100.0% [34.2%, 100.0%], n = 2", "0.0% [0.0%, 65.8%], n = 2"
    assert f"| prefill | prefill 5 | {whole} | {none} | {none} |" in text
    assert f"| price | benign | {none} | {whole} | {whole} |" in text
    acted = text.split("## Attacks: acted on at every attempt\n")[1]
    assert f"| prefill | prefill 5 | {none} |" in acted.split("##")[0]
    assert "## guarded: Requests\n" in text
    assert "do not compare" not in text
    assert set(report(plain, guarded).numbers["runs"]) == {"plain", "guarded"}


def test_runs_are_priced_beside_the_plain_model(tmp_path: Path):
    plain = write(tmp_path / "bare", answers=HARMED, is_watched=False)
    guarded = write(tmp_path / "guarded", answers=DECLINED)
    alone = page.as_markdown(report(plain, guarded))
    assert "Harmless prompts beside" not in alone  # which of them is plain, nobody says
    (tmp_path / "deep").mkdir()
    base = write(tmp_path / "deep" / "base", answers=HARMED, is_watched=False)
    facts = json.loads((plain / runs.FACTS).read_text())
    (plain / runs.FACTS).write_text(json.dumps(facts | {"target": "hub:plain"}))
    assert "## Harmless prompts beside the plain model, base\n" in page.as_markdown(report(plain, guarded, base))
    found = report(plain, guarded)
    text = page.as_markdown(found)
    assert "## Harmless prompts: acted on or declined\n" in text
    assert "## Harmless prompts beside the plain model, bare\n" in text
    whole, none = "100.0% [34.2%, 100.0%]", "0.0% [0.0%, 65.8%]"
    assert f"| guarded | price | both sides block | 2 | {whole} | {none} |" in text
    (both, _) = found.numbers["runs"]["guarded"]["prices"]
    assert (both["disturbed"].value, both["same"].value) == (1.0, 0.0)


@pytest.mark.parametrize(("f1", "is_enough"), [(None, False), (wilson(160, 200), False), (wilson(180, 200), True)])
def test_a_judge_that_supports_no_claim_is_said_to_at_the_top(tmp_path: Path, f1: Estimate | None, is_enough: bool):
    run = runs.read(write(tmp_path / "run", answers=HARMED, is_watched=False))
    found = page.of([run], lambda some: by_phrases(some), "mine", f1, resamples=20)
    text, html = page.as_markdown(found), page.as_html(found)
    assert (text.splitlines()[2].startswith("**By this judge no aim can be claimed: ")) is not is_enough
    assert ("</h1>\n<p><strong>By this judge no aim can be claimed: " in html) is not is_enough
    assert (f"- Its F1 against hand labels is {f1}." in text) is is_enough
    assert bool(found.numbers["caveat"]) is not is_enough
    assert found.numbers["judge_f1"] == f1


def test_a_report_without_a_judged_sample_needs_no_judge(tmp_path: Path):
    folder = write(tmp_path / "run", answers=HARMED)
    for name in ("prefill", "price"):
        (folder / f"{name}.jsonl").unlink()
    assert "By this judge" not in page.as_markdown(report(folder))


def test_a_run_beside_which_depth_was_measured_has_its_picture(tmp_path: Path):
    folder = write(tmp_path / "run", answers=HARMED, is_watched=False)
    share = wilson(1, 2)
    found = Depth([share, share], 1, {"aligned": {0: share}, "reference": {0: share}}, {})
    (folder / depth.NUMBERS).write_text(json.dumps(asdict(found)))
    shown = report(folder)
    figure = shown.figures["where it differs from another model along harmful responses, and refuses"]
    assert list(figure.axes[0].lines[0].get_ydata()) == [0.5, 0.5]
    assert shown.numbers["depth"]["half"] == 1
    (folder / depth.NUMBERS).write_text("{}")
    with pytest.raises(ValueError, match=r"depth\.json: divergence: Field required"):
        report(folder)


def test_measures_of_one_name_that_differ_are_said_not_to_compare(tmp_path: Path):
    folders = [write(tmp_path / name, answers=HARMED, is_watched=False) for name in ("one", "other")]
    path = folders[1] / runs.FACTS
    facts = json.loads(path.read_text())
    facts["measures"]["price"]["n"] = 50
    path.write_text(json.dumps(facts))
    text = page.as_markdown(report(*folders))
    assert "- price of one and of other differ in n: they do not compare." in text
    assert "prefill of one" not in text


def test_files_compare_by_what_they_hold_where_both_runs_say_it(tmp_path: Path):
    folders = [write(tmp_path / name, answers=HARMED, is_watched=False) for name in ("one", "other")]
    given = [json.loads((folder / runs.FACTS).read_text()) for folder in folders]
    for facts, path in zip(given, ("a.jsonl", "b.jsonl"), strict=True):
        facts["measures"]["price"]["data"] = path

    def said(*sums: dict[str, str]) -> bool:
        for folder, facts, held in zip(folders, given, sums, strict=True):
            (folder / runs.FACTS).write_text(json.dumps(facts | {"data_sha256": held}))
        return "price of one and of other differ in data" in page.as_markdown(report(*folders))

    assert not said({"a.jsonl": "1"}, {"b.jsonl": "1"})
    assert said({"a.jsonl": "1"}, {"b.jsonl": "2"})
    assert said({"a.jsonl": "1"}, {})
    given[1]["measures"]["price"]["data"] = "a.jsonl"
    assert not said({"a.jsonl": "1"}, {})


def test_a_row_of_two_measures_counts_once(tmp_path: Path):
    folder = write(tmp_path / "run", answers=HARMED)
    facts = json.loads((folder / runs.FACTS).read_text())
    facts["measures"]["again"], facts["attempts"]["again"] = {"kind": "requests", "n": 5}, 6
    facts["measures"]["turned"], facts["attempts"]["turned"] = {"kind": "onsets", "n": 5}, 2
    (folder / runs.FACTS).write_text(json.dumps(facts))
    (folder / "again.jsonl").write_text((folder / "toxic.jsonl").read_text())
    (folder / "turned.jsonl").write_text((folder / "turns.jsonl").read_text())
    text = page.as_markdown(report(folder))
    assert "| all of them | 6 (4) |" in text
    assert "## Made onsets: turns\n" in text
    assert "## Made onsets: turned\n" in text


def test_a_run_named_twice_is_refused(tmp_path: Path):
    folder = write(tmp_path / "run", answers=HARMED, is_watched=False)
    with pytest.raises(ValueError, match="named twice"):
        report(folder, folder)


def test_runs_of_one_name_are_told_apart_by_the_folder_above(tmp_path: Path):
    folders = []
    for above in ("one", "other"):
        (tmp_path / above).mkdir()
        folders.append(write(tmp_path / above / "run", answers=HARMED, is_watched=False))
    assert runs.names([runs.read(folder) for folder in folders]) == ["one/run", "other/run"]


def test_the_page_needs_no_other_file_and_escapes_what_it_shows(tmp_path: Path):
    whole = page.as_html(report(write(tmp_path / "run", answers=HARMED)))
    assert "mine against checkpoint:&lt;run&gt;" in whole
    assert "<run>" not in whole
    assert whole.count('src="data:image/png;base64,iVBOR') == 5
    assert not re.search("https?:|<script|<link", re.sub('src="data:[^"]*"', "", whole))


def test_a_report_holds_no_texts(tmp_path: Path):
    found = report(write(tmp_path / "run", answers=HARMED | {"prefill 5": "cake"}))
    assert "cake" not in page.as_markdown(found) + page.as_html(found) + json.dumps(found.numbers, default=asdict)


def test_a_curve_has_every_depth_in_order_with_its_share():
    shares = {depth: wilson(hits, 10) for depth, hits in ((20, 2), (5, 7), (100, 1))}
    of_run = [Outcome("p", f"prefill {depth}", "none", True, share, None, 0, 0) for depth, share in shares.items()]
    figure = pictures.by_depth({"mine": of_run})
    assert figure is not None
    (axes,) = figure.axes
    x, y = axes.containers[0].lines[0].get_data()
    assert (list(x), list(y)) == ([5, 20, 100], [0.7, 0.2, 0.1])
    assert pictures.by_depth({"mine": [Outcome("p", "direct", "none", True, wilson(1, 2), None, 0, 0)]}) is None


def test_the_curve_of_delays_rises_where_a_turn_is_found():
    found = Scored(2, 0.5, 2, (0.1, 0.1, 0.1, 0.9, 0.9, 0.1))  # acted on after token 5, three after the turn
    never = Scored(2, 0.5, 2, (0.1,) * 6)
    figure = pictures.of_onsets({"mine": [found, found, never, never]})
    assert figure is not None
    (axes,) = figure.axes
    line, median = axes.lines  # two harmless answers, or none, are too few for a threshold in hindsight
    assert list(median.get_xdata()) == [3.0, 3.0]
    x, y = line.get_data()
    assert [share for tokens, share in zip(x, y, strict=True) if tokens in (2, 3)] == [0.0, 0.5]


def test_onsets_of_which_none_turns_have_a_table_and_no_curve(tmp_path: Path):
    harmless = Scored(3, 0.5, 2, (0.1, 0.1, 0.1))
    assert pictures.of_onsets({"mine": [harmless]}) is None
    folder = write(tmp_path / "run", answers=HARMED)
    (folder / "turns.jsonl").write_text(json.dumps({"key": "0", **asdict(harmless)}) + "\n")
    found = report(folder)
    assert "| harmless answers stopped per 1,000 | 1 | 0.0 [0.0, 793.5] |" in page.as_markdown(found)
    assert not any("turns" in what for what in found.figures)


@pytest.mark.parametrize("labels", [(0, 0), (1, 1)])
def test_one_label_alone_has_no_curve(labels):
    assert pictures.of_signal({"mine": [Score("x", label, 0.5, 0.5, 0.8) for label in labels]}) is None


@pytest.mark.parametrize(
    ("line", "message"),
    [('{"key": "k"}', "toxic.jsonl, line 1: not a score"), ("no JSON", "toxic.jsonl, line 1: not a score")],
)
def test_a_broken_journal_is_named(tmp_path: Path, line: str, message: str):
    folder = write(tmp_path / "run", answers=HARMED)
    (folder / "toxic.jsonl").write_text(line + "\n")
    with pytest.raises(ValueError, match=message):
        runs.read(folder)


def test_words_in_backticks_are_code_and_nothing_else_is_markup():
    assert tables.in_html("`a<b` and <i> & one ` alone") == "<code>a&lt;b</code> and &lt;i&gt; &amp; one ` alone"


def test_the_page_says_of_every_attack_what_is_sent():
    assert set(page.SENT) == set(get_args(Kind)) - set(SCORED)


def test_bars_of_an_attack_stand_together_without_room_for_those_that_are_not_there():
    def outcome(attack: str, share: Estimate | None) -> Outcome:
        return Outcome("m", attack, "both", True, share, None, 0, 0)

    half = wilson(1, 2)
    series = {"one": [outcome("a", half), outcome("b", half), outcome("c", None)], "two": [outcome("b", half)]}
    (axes,) = pictures.shares(series).axes
    middles = sorted(round(bar.get_y() + bar.get_height() / 2, 6) for bar in axes.patches)
    assert middles == [0, 1 + pictures.GAP, 2 + pictures.GAP]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["m: a", "m: b"]


def test_lines_that_lie_on_one_another_have_other_marks():
    given = [Outcome("p", f"prefill {depth}", "both", True, wilson(1, 2), None, 0, 0) for depth in (5, 10)]
    figure = pictures.by_depth({"one": given, "two": given})
    assert figure is not None
    marks = {bars.lines[0].get_marker() for bars in figure.axes[0].containers}
    assert len(marks) == 2
