"""A run as it lies on disk."""

import json
from pathlib import Path

from evaluation import runs
from evaluation.samples import Journal, Sample


def test_samples_are_in_the_order_of_a_report_however_they_came(tmp_path: Path):
    facts = {"measures": {"prefill": {"kind": "prefill"}}, "attempts": {"prefill": 4}}
    (tmp_path / runs.FACTS).write_text(json.dumps(facts))
    journal = Journal(tmp_path / "prefill.jsonl")
    for policy, depth in (("none", 5), ("both", 20), ("both", 5), ("output", 5)):
        journal.add(Sample(f"{policy} {depth}", "one", f"prefill {depth}", policy, "do it", "", "Sure"))
    found = runs.read(tmp_path).samples["prefill"]
    assert [one.key for one in found] == ["both 5", "both 20", "output 5", "none 5"]
