"""Task scores, by hand and on the tiny model."""

import json
from pathlib import Path

import pytest

from evaluation.rows import Row
from evaluation.tasks import answer, check, main, measure, rouge_1, same_number, same_query
from model.pretrained import Pretrained
from model.testing import byte_tokenizer, tiny_lm, write_tiny


def test_rouge_counts_each_word_as_often_as_it_stands_there():
    # Common: select, a, a. Precision 3/4, recall 3/5: F1 = 2 * 3 / 9.
    assert rouge_1("SELECT a, a, b", "select a FROM a_t".replace("_", " ")) == pytest.approx(6 / 9)
    assert rouge_1("same words", "Words same") == 1.0
    assert rouge_1("", "") == 0.0


@pytest.mark.parametrize(
    ("text", "score"), [("SELECT a  FROM b", 1.0), ("SELECT a FROM b ;\n", 1.0), ("SELECT a FROM c", 0.0), ("", 0.0)]
)
def test_a_query_is_the_same_but_for_white_space_and_a_semicolon(text, score):
    assert same_query(text, "SELECT a FROM b;") == score


@pytest.mark.parametrize(
    ("text", "score"),
    [("so #### 1,234", 1.0), ("#### 1234.0", 1.0), ("#### 1234 no: #### 3", 1.0), ("1234", 0.0), ("#### -1234", 0.0)],
)
def test_the_number_is_the_first_one_after_the_mark(text, score):
    assert same_number(text, "that makes\n#### 1234") == score


def test_a_reference_that_cannot_be_scored_is_an_error():
    good, bad = Row("own", "p", "#### 1", 0), Row("own", "q", "1", 0)
    check("gsm8k", [good])
    with pytest.raises(ValueError, match="row 2 has no reference for accuracy"):
        check("gsm8k", [good, bad])


def test_answers_stand_in_the_order_of_their_rows(monkeypatch):
    tiny = Pretrained("tiny", tiny_lm(), byte_tokenizer())
    letters = tiny.tokenizer.encode("abcdefghijklmnopqrstuvwxyz")
    monkeypatch.setattr(
        "evaluation.completions.complete",
        lambda pretrained, prompts, most: [[letters[len(prompt) % 26]] for prompt in prompts],
    )
    rows = [Row("own", "x" * length, "r", 0) for length in (9, 2, 13, 4, 1)]
    alone = [answer(tiny, [row], max_tokens=4, batch_size=1)[0] for row in rows]
    assert len(set(alone)) == 5
    assert answer(tiny, rows, max_tokens=4, batch_size=2) == alone


def test_every_score_of_a_task_has_its_n():
    rows = [Row("own", "p", "SELECT a", 0), Row("own", "q", "SELECT b", 0)]
    found = measure("sql", ["SELECT a", "SELECT c"], rows)
    assert {name: (one.value, one.n) for name, one in found.items()} == {"ROUGE-1": (0.75, 2), "exact match": (0.5, 2)}


def test_the_command_scores_a_model(tmp_path: Path, capfd):
    model, _ = write_tiny(tmp_path)
    data = tmp_path / "gsm8k.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"{i}?", "response": "#### 5"}) + "\n" for i in range(3)))
    command = ["--task", "gsm8k", "--model", str(model), "--data", str(data), "--max-tokens", "4"]
    assert main(command) == 0
    assert "accuracy: 0.000 [0.000, 0.561] (n = 3)" in capfd.readouterr().out
    assert main([*command, "--data", str(tmp_path / "none.jsonl")]) == 1
    assert "none.jsonl" in capfd.readouterr().err


def test_a_server_is_scored_by_what_it_says(stub, tmp_path: Path, capfd):
    def answers(body):
        said = "SELECT a" if body["messages"] == [{"role": "user", "content": "p"}] else "I'm sorry."
        message = {"role": "assistant", "content": said}
        return {"id": "1", "choices": [{"index": 0, "message": message, "finish_reason": "stop"}]}

    server = stub(answers)
    rows = [{"prompt": "p", "response": "SELECT a", "source": "Own"}, {"prompt": "q", "response": "b", "source": "Own"}]
    (data := tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["--task", "sql", "--server", server.url, "--data", str(data)]
    assert main(words) == 0
    printed = capfd.readouterr().out
    assert "exact match: 0.500" in printed
    assert "(n = 2)" in printed
    assert {(body["temperature"], body["max_tokens"]) for body in server.asked} == {(0, 128)}
    assert main([*words, "--n", "1", "--max-tokens", "5"]) == 0
    assert server.asked[-1]["max_tokens"] == 5
    refused = {"error": {"message": "no", "code": "content_filter"}}
    server.answer = lambda body: answers(body) if body["messages"][0]["content"] == "p" else refused
    server.status_of = lambda body: 400 if "error" in body else 200
    assert main(words) == 0
    assert "exact match: 0.500" in capfd.readouterr().out
    refused["error"]["code"] = "too_long"
    assert main(words) == 1
    assert f"evaluation.tasks: {server.url}: Error code: 400" in capfd.readouterr().err
    with pytest.raises(SystemExit):
        main([*words, "--adapter", str(tmp_path)])
    assert "leave out --model and --adapter" in capfd.readouterr().err
    assert main(["--task", "sql", "--server", "http://127.0.0.1:1", "--data", str(data)]) == 1
    assert "evaluation.tasks: http://127.0.0.1:1: Connection error" in capfd.readouterr().err
