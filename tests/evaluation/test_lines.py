"""What is left of a file whose writer was killed."""

from pathlib import Path

import pytest

from evaluation import lines


@pytest.mark.parametrize(
    ("text", "found"),
    [(b"", []), (b"a\nb\n", [b"a", b"b"]), (b'a\n{"key": "', [b"a"]), (b"torn", []), (b"a\n\xe2\x80", [b"a"])],
)
def test_a_torn_last_line_is_none_and_is_cut_off(tmp_path: Path, text: bytes, found: list[bytes]):
    path = tmp_path / "some.jsonl"
    path.write_bytes(text)
    assert lines.whole(path) == found
    assert path.read_bytes() == text
    lines.mend(path)
    assert path.read_bytes() == b"".join(line + b"\n" for line in found)


def test_where_there_is_no_file_there_are_no_lines(tmp_path: Path):
    assert lines.whole(tmp_path / "nothing") == []
    lines.mend(tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()
