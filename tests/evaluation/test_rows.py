import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from evaluation.rows import checksum, read, select


def test_a_line_separator_inside_a_text_does_not_end_its_row(tmp_path):
    # U+2028 and U+0085 end a line for `str.splitlines`, but not in JSON lines.
    texts = ["one\u2028two", "one\u0085two"]
    path = tmp_path / "rows.jsonl"
    lines = [json.dumps({"prompt": text, "harmful": 0}, ensure_ascii=False) for text in texts]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    assert [row.prompt for row in read(path)] == texts


def test_a_bad_row_is_named_by_file_and_line(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "p", "harmful": 0}\n{"prompt": "p"}\n')
    with pytest.raises(ValueError, match=r"rows.jsonl, line 2"):
        read(path)


def test_bytes_that_are_not_utf_8_are_named_by_file_and_line(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"prompt": "p", "harmful": 0}\n{"prompt": "caf\xe9", "harmful": 0}\n')
    with pytest.raises(ValueError, match=r"rows.jsonl, line 2"):
        read(path)


def test_a_file_without_rows_is_refused(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.touch()
    with pytest.raises(ValueError, match="holds no rows"):
        read(path)


def test_rows_come_from_the_hub_by_name(monkeypatch):
    rows = [{"prompt": f"p{n}", "harmful": n % 2, "response": None} for n in range(3)]

    def load_dataset(name, split):
        if split == "nowhere":
            raise RuntimeError("no such\nsplit")
        return rows if (name, split) in (("me/set", "train"), ("me/set", "test")) else []

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert [(row.prompt, row.source) for row in read(Path("hub:me/set"), label=1)] == [("p1", "set")]
    before = checksum(Path("hub:me/set:test"))
    rows.append({"prompt": "more"})
    assert checksum(Path("hub:me/set:test")) != before
    with pytest.raises(ValueError, match="hub:me/set:test, line 4: not a labelled row"):
        read(Path("hub:me/set:test"))
    with pytest.raises(ValueError, match="cannot load data set 'me/set': no such split"):
        read(Path("hub:me/set:nowhere"))
    with pytest.raises(ValueError, match="hub:me/empty holds no rows"):
        read(Path("hub:me/empty"))


def test_what_is_selected_is_every_different_row_of_some_prompts(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"p{n % 4}", "wording": f"w{n % 8}", "source": f"s{n % 4 // 3}"} for n in range(16)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = select(path, 2, label=1, response="wording")
    prompts = {row.prompt for row in found}
    assert len(prompts) == 2
    assert len(found) == 4
    assert prompts == {row.prompt for row in select(path, 2, label=1)}  # whatever the responses are
    assert {row.prompt for row in select(path, 9, label=1, source="s1")} == {"p3"}
    with pytest.raises(ValueError, match="holds no harmful row whose source begins with 's2'"):
        select(path, 9, label=1, source="s2")
