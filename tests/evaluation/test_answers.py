import json

import pytest

from evaluation import answers
from evaluation.answers import choose
from evaluation.rows import Row, read

PROMPTS = ["bread", "tea", "kites", "boats", "snow"]


def chatty(body):
    """Answers with the last word and the seed; has nothing to say about snow."""
    word = body["messages"][-1]["content"]
    message = {"role": "assistant", "content": None if word == "snow" else f"On {word}, {body['seed']}."}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    return {"id": "1", "object": "chat.completion", "created": 0, "model": "stub", "choices": [choice]}


@pytest.fixture
def server(stub):
    return stub(chatty)


def run(server, tmp_path, n):
    data = tmp_path / "prompts.jsonl"
    data.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    out = tmp_path / "answers.jsonl"
    code = answers.main(["--server", server.url, "--data", str(data), "--n", str(n), "--out", str(out)])
    return code, out


def test_every_prompt_is_answered_by_a_policy_that_only_observes(server, tmp_path):
    code, out = run(server, tmp_path, 5)
    assert code == 0
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert {line["prompt"] for line in lines} == set(PROMPTS) - {"snow"}  # an empty answer is left out
    assert all(line["response"].startswith(f"On {line['prompt']}") for line in lines)
    for body in server.asked:
        assert {side["mode"] for side in body["moderation"]["policy"].values()} == {"score"}
        assert (body["temperature"], body["max_tokens"]) == (0.7, 128)
    assert len({body["seed"] for body in server.asked}) == 5


def test_the_answers_are_rows_that_the_signal_is_measured_on(server, tmp_path):
    _, out = run(server, tmp_path, 3)
    assert {(row.source, row.label) for row in read(out, label=0)} == {("own answers", 0)}


def test_an_interrupted_run_asks_only_for_what_is_missing(server, tmp_path):
    _, out = run(server, tmp_path, 5)
    whole = out.read_text()
    out.write_text("".join(whole.splitlines(keepends=True)[:-1]))
    server.asked.clear()
    run(server, tmp_path, 5)
    assert len(server.asked) == 2  # the one that was lost, and the one that has no answer
    assert sorted(out.read_text().splitlines()) == sorted(whole.splitlines())


def test_a_run_that_never_got_an_answer_can_be_repeated(server, tmp_path):
    (tmp_path / "answers.jsonl").touch()
    assert run(server, tmp_path, 2)[0] == 0


def test_the_sample_depends_on_the_prompts_alone():
    rows = [Row("s", prompt, None, 0) for prompt in PROMPTS]
    assert choose(rows, 3) == choose([*rows[::-1], *rows], 3)


def test_more_answers_than_prompts_are_refused(server, tmp_path, capsys):
    assert run(server, tmp_path, 6)[0] == 1
    assert "6 answers need as many different prompts, got 5" in capsys.readouterr().err
