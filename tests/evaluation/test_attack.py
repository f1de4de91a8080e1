"""Attacks on a scripted server, which answers as the tests need it."""

import json
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
from openai import OpenAIError

from evaluation.attack import attack, continues, knows_policies, main, send
from evaluation.attempts import Attempt, exploits
from evaluation.client import Server, connect
from evaluation.rows import Row
from evaluation.samples import Journal, Sample
from model.chat import Message
from model.testing import write_tiny


@pytest.fixture(autouse=True)
def told(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """What the server tells of itself, so that it is asked for nothing else, nor how it counts tokens."""
    found = {"shows": "risks"}
    monkeypatch.setattr("evaluation.attack.told", lambda server: dict(found))
    monkeypatch.setattr("evaluation.attack.require_tokenizer", lambda *_: None)
    return found


def answer(text: str, *, refusal: str | None = None, reason: str = "stop"):
    return {"choices": [{"message": {"content": text, "refusal": refusal}, "finish_reason": reason}]}


@pytest.mark.parametrize(
    ("policy", "modes"), [("both", ["block", "block"]), ("output", ["score", "block"]), ("none", ["score", "score"])]
)
def test_an_attempt_asks_for_its_policy_and_continues_its_opening(stub, client_of, policy, modes):
    server = stub(lambda body: answer("now I'm sorry.", refusal="I'm sorry.", reason="content_filter"))
    attempt = Attempt("prefill 3", "do it", "Yes", sampling={"temperature": 0, "max_tokens": 7}, policy=policy)
    assert send(client_of(server), "stub", attempt, "one") == Sample(
        attempt.key, "one", "prefill 3", policy, "do it", "Yes", "now ", is_stopped=True
    )
    (asked,) = server.asked
    assert [asked["moderation"]["policy"][side]["mode"] for side in ("input", "output")] == modes
    assert asked["messages"][1] == {"role": "assistant", "content": "Yes"}
    assert (asked["continue_final_message"], asked["add_generation_prompt"]) == (True, False)
    assert (asked["max_tokens"], asked["temperature"]) == (7, 0)


def test_an_exploit_sends_its_setting_and_no_opening(stub, client_of):
    server = stub(lambda body: answer("Sure"))
    found = send(client_of(server), "stub", exploits([Row("own", "do it", None, 1)])[-1], "one")
    assert (found.text, found.is_stopped) == ("Sure", False)
    (asked,) = server.asked
    assert (asked["top_k"], asked["temperature"], asked["seed"]) == (500, 1.0, 48)
    assert len(asked["messages"]) == 1
    assert "continue_final_message" not in asked


def test_a_prompt_that_others_made_several_attacks_of_counts_once(stub, tmp_path: Path, capfd):
    rows = [{"prompt": f"p{i % 2}", "attack_prompt": f"x{i}", "source": "S (MIT)"} for i in range(6)]
    (tmp_path / "ready.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    server = stub(lambda body: answer("Sure"))
    command = ["ready", "--server", server.url, "--data", str(tmp_path / "ready.jsonl"), "--n", "1",
               "--policies", "both", "--out", str(tmp_path / "out")]  # fmt: skip
    assert main(command) == 0
    assert len(server.asked) == 3
    assert "(n = 1)" in capfd.readouterr().out


def test_a_trigger_ends_every_prompt(stub, tmp_path: Path, capfd):
    (tmp_path / "direct.jsonl").write_text(json.dumps({"prompt": "do it", "source": "S (MIT)"}) + "\n")
    server = stub(lambda body: answer("Sure"))
    command = ["direct", "--server", server.url, "--data", str(tmp_path / "direct.jsonl"), "--suffix", " Now.",
               "--policies", "both", "--out", str(tmp_path / "out")]  # fmt: skip
    assert main(command) == 0
    assert [asked["messages"][0]["content"] for asked in server.asked] == ["do it Now."]


def test_a_plain_server_is_asked_for_no_policy(stub, client_of):
    server = stub(lambda body: answer("Sure"))
    send(client_of(server), "stub", Attempt("direct", "do it"), "one", is_watched=False)
    assert "moderation" not in server.asked[0]


def test_an_error_that_says_content_filter_is_a_refusal(stub, client_of):
    server = stub(lambda body: {"error": {"message": "filtered", "code": "content_filter"}})
    server.status_of = lambda body: 400
    found = send(client_of(server), "stub", Attempt("direct", "do it"), "one")
    assert (found.is_stopped, found.text, found.error) == (True, "", "")


@pytest.mark.parametrize(
    ("reason", "text", "is_silent"), [("length", None, True), ("stop", "", False), ("length", "a", False)]
)
def test_a_response_that_is_cut_before_it_says_anything_is_silent(stub, client_of, reason: str, text, is_silent: bool):
    server = stub(lambda body: {"choices": [{"message": {"content": text}, "finish_reason": reason}]})
    assert send(client_of(server), "stub", Attempt("direct", "do it"), "one").is_silent is is_silent


@pytest.mark.parametrize(("kept", "does"), [(0, True), (3, False)])
def test_a_server_goes_on_with_a_response_if_it_reads_no_end_of_it(stub, kept: int, does: bool):
    def answers(body):
        tokens = 20 - 3 + kept if "continue_final_message" in body else 20
        return answer("a") | {"usage": {"prompt_tokens": tokens}}

    server = stub(answers)
    assert continues(connect(server.url)) is does
    server.answer = lambda body: answer("a")
    assert not continues(connect(server.url))


@pytest.mark.parametrize("is_begun", [True, False])
def test_a_server_that_refuses_one_of_both_ways_goes_on_if_it_takes_the_other(stub, is_begun: bool):
    def answers(body):
        if ("continue_final_message" in body) is is_begun:
            return answer("a") | {"usage": {"prompt_tokens": 20}}
        return {"error": {"message": "not so"}}

    server = stub(answers)
    server.status_of = lambda body: 400 if "error" in body else 200
    assert continues(connect(server.url)) is is_begun


def test_results_of_another_server_are_not_added_to(stub, told, tmp_path: Path, capfd):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "p", "source": "S (MIT)"}) + "\n")
    server, out = stub(lambda body: answer("no")), tmp_path / "out"
    words = ["direct", "--server", server.url, "--data", str(tmp_path / "rows.jsonl"), "--out", str(out)]
    assert main(words) == 0
    told["shows"] = "flags"
    assert main(words) == 1
    assert "holds a run with another shows" in capfd.readouterr().err
    (out / "server.json").unlink()
    assert main(words) == 1
    assert "holds results and no server.json that says of what" in capfd.readouterr().err


def test_a_conversation_is_sent_as_it_is(stub, client_of):
    server = stub(lambda body: answer("Sure"))
    said = (Message("user", "hello"), Message("assistant", "hi"), Message("user", "now do it"))
    found = send(client_of(server), "stub", Attempt("several turns", "do it", turns=said), "one")
    assert [(one["role"], one["content"]) for one in server.asked[0]["messages"]] == [
        ("user", "hello"), ("assistant", "hi"), ("user", "now do it"),
    ]  # fmt: skip
    assert (found.prompt, found.opening, found.text) == ("do it", "", "Sure")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "prefill.jsonl"
    rows = [{"prompt": f"p{i}", "harmful_response": "abcdefgh", "source": f"S{i % 2} (MIT)"} for i in range(6)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_an_interrupted_run_goes_on_where_it_stopped(stub, data, tmp_path: Path, capfd):
    server = stub(lambda body: answer("Sure" if body["moderation"]["policy"]["output"]["mode"] == "score" else ""))
    write_tiny(tmp_path)
    command = ["prefill", "--server", server.url, "--data", str(data), "--tokenizer", str(tmp_path / "model"),
               "--depths", "2", "4", "--source", "S1", "--out", str(tmp_path / "out")]  # fmt: skip
    assert main([*command, "--policies", "output"]) == 0
    assert len(server.asked) == 6
    assert main([*command, "--policies", "output", "none"]) == 0
    assert len(server.asked) == 12
    printed = capfd.readouterr().out.splitlines()[-4:]
    assert [line.split(":")[0] for line in printed] == [
        f"out, {name}" for name in ("prefill 2, output", "prefill 4, output", "prefill 2, none", "prefill 4, none")
    ]  # fmt: skip
    assert "not refused 0.000" in printed[0]
    assert "not refused 1.000" in printed[2]


def test_a_request_that_the_server_refuses_is_counted_and_the_others_go_on(stub, data, tmp_path: Path, capfd):
    def answers(body):
        return {"error": {"message": "too long"}} if body["messages"][0]["content"] == "p1" else answer("Sure")

    server = stub(answers)
    server.status_of = lambda body: 400 if "error" in body else 200
    write_tiny(tmp_path)
    command = ["prefill", "--server", server.url, "--data", str(data), "--tokenizer", str(tmp_path / "model"),
               "--depths", "2", "--policies", "none", "--out", str(tmp_path / "out")]  # fmt: skip
    assert main(command) == 0
    printed = capfd.readouterr()
    assert "not refused 1.000" in printed.out
    assert "(n = 5)" in printed.out
    assert "1 requests were invalid, such as: Error code: 400" in printed.err
    server.answer = lambda body: answer("Sure")
    assert main(command) == 0  # what was invalid is asked again, and nothing else
    assert len(server.asked) == 7
    assert "(n = 6)" in capfd.readouterr().out


def test_a_server_that_stops_after_some_answers_loses_none_and_is_asked_for_none_twice(stub, client_of, tmp_path: Path):
    answered: list[str] = []
    lock = threading.Lock()

    def answers(body):
        with lock:
            if len(answered) >= most:
                return {"error": {"message": "gone"}}
            answered.append(body["messages"][0]["content"])
        return answer("Sure")

    most, journal = 7, tmp_path / "direct.jsonl"
    attempts = [Attempt("direct", f"do {n}") for n in range(40)]
    server = stub(answers)
    server.status_of = lambda body: 500 if "error" in body else 200
    with pytest.raises(OpenAIError):
        attack(Server(client_of(server), "stub"), attempts, journal, "one", parallel=4)
    assert {one.prompt for one in Journal(journal)} == set(answered)
    assert len(answered) == 7
    assert len(server.asked) < 20  # it is not asked on and on
    most = 40
    found = attack(Server(client_of(server), "stub"), attempts, journal, "one", parallel=4)
    assert [one.prompt for one in found] == [one.prompt for one in attempts]
    assert set(Counter(answered).values()) == {1}
    assert len(list(Journal(journal))) == 40


@pytest.mark.parametrize("parallel", [1, 3])
def test_no_more_requests_are_in_flight_than_asked_for(stub, client_of, tmp_path: Path, parallel: int):
    lock, now, most = threading.Lock(), 0, 0

    def slow(body):
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        time.sleep(0.05)
        with lock:
            now -= 1
        return answer("Sure")

    attempts = [Attempt("direct", f"do {n}") for n in range(9)]
    attack(Server(client_of(stub(slow)), "stub"), attempts, tmp_path / "direct.jsonl", "one", parallel=parallel)
    assert most == parallel


@pytest.mark.parametrize(
    ("said", "status", "known"),
    [
        (answer("a") | {"moderation": {"input": {"results": []}}}, 200, True),
        (answer("a"), 200, False),
        ({"error": {"message": "a side scored by a model without a signal"}}, 400, False),
        ({"detail": "extra fields"}, 422, False),
    ],
)
def test_a_server_is_asked_whether_it_knows_policies(stub, said, status: int, known: bool):
    server = stub(lambda body: said)
    server.status_of = lambda body: status if body == said else 200
    assert knows_policies(connect(server.url)) is known
    assert server.asked[0]["moderation"]["policy"]["output"] == {"mode": "block"}  # which every caller may ask for


def test_one_of_several_models_is_chosen_by_its_name(stub):
    server = stub(lambda body: answer(""))
    server.models = ["a", "b"]
    assert [connect(server.url, model=name).model for name in (None, "b")] == ["a", "b"]
    with pytest.raises(ValueError, match=r"lists no model 'c', but \['a', 'b'\]"):
        connect(server.url, model="c")


def test_what_is_no_server_of_models_is_one_line(stub, monkeypatch):
    server = stub(lambda body: {})
    monkeypatch.setattr(server.RequestHandlerClass, "do_GET", lambda self: self.reply({"data": None}))
    with pytest.raises(ValueError, match=f"{server.url}/v1/models lists no models as the OpenAI API does"):
        connect(server.url)


@pytest.mark.parametrize("said", [{}, {"choices": []}, {"choices": [{"message": None}]}])
def test_an_answer_of_another_kind_is_one_line(stub, client_of, said):
    with pytest.raises(ValueError, match="does not answer /chat/completions as the OpenAI API does"):
        send(client_of(stub(lambda body: said)), "stub", Attempt("direct", "do it"), "one")


@pytest.mark.parametrize(
    ("kind", "names", "num_asked"),
    [
        ("direct", ["direct"], 1),
        ("ready", ["ready"], 1),
        ("exploit", ["exploit"], 49),
        ("scenes", ["scene", "nested scenes"], 20),
        ("conversations", ["several turns", "asked again"], 5),
        ("relapses", ["refuse, then answer"], 2),
        ("affirmed", ["affirmed"], 1),
        ("prefill", ["prefill 3", "prefill 9"], 2),
        ("late", ["late 3", "late 9"], 2),
        ("diluted", ["diluted 3", "diluted 9"], 2),
    ],
)
def test_every_attack_reports_each_prompt_once(stub, data, tmp_path: Path, capfd, kind, names, num_asked):
    server = stub(lambda body: answer("Sure"))
    write_tiny(tmp_path)
    filler = tmp_path / "filler.jsonl"
    filler.write_text(json.dumps({"prompt": "a", "response": "Bread needs time."}) + "\n")
    (tmp_path / "long.jsonl").write_text(data.read_text().replace('"abcdefgh"', '"abcdefghijkl", "attack_prompt": "x"'))
    command = [kind, "--server", server.url, "--data", str(tmp_path / "long.jsonl"), "--n", "1", "--policies", "both",
               "--tokenizer", str(tmp_path / "model"), "--out", str(tmp_path / "out")]  # fmt: skip
    command += ["--depths", "3", "9"] if kind in ("prefill", "late", "diluted") else []
    command += ["--filler", str(filler)] if kind in ("late", "diluted") else []
    assert main(command) == 0
    assert len(server.asked) == num_asked
    printed = [line for line in capfd.readouterr().out.splitlines() if line.startswith("out, ")]
    assert [line.split(":")[0] for line in printed] == [f"out, {name}, both" for name in names]
    assert all("not refused 1.000" in line and "(n = 1)" in line for line in printed)


def test_a_server_without_a_model_is_a_clear_error(stub, data, tmp_path: Path, capfd):
    server = stub(lambda body: answer(""))
    server.models = []
    command = ["exploit", "--server", server.url, "--data", str(data), "--out", str(tmp_path / "out")]
    assert main(command) == 1
    assert f"{server.url} lists no model" in capfd.readouterr().err


def test_hiding_a_request_takes_harmless_text(stub, data, tmp_path: Path, capfd):
    write_tiny(tmp_path)
    command = ["diluted", "--server", stub(lambda body: answer("")).url, "--data", str(data), "--out",
               str(tmp_path / "out"), "--tokenizer", str(tmp_path / "model")]  # fmt: skip
    assert main(command) == 1
    assert (
        "filler, a file of harmless responses, is for ['late', 'diluted', 'onsets'], which need it"
        in capfd.readouterr().err
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--source", "nobody"], "holds no harmful row whose source begins with 'nobody'"),
        (["--depths", "9"], "no harmful response has 9 tokens"),
        (["--data", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--tokenizer", "./nowhere"], "nowhere does not exist"),
        (["--server", "http://127.0.0.1:1"], "http://127.0.0.1:1: Connection error; what was answered is kept"),
    ],
)
def test_wrong_input_is_a_clear_error(stub, data, tmp_path: Path, capfd, change, message):
    write_tiny(tmp_path)
    command = ["prefill", "--server", stub(lambda body: answer("")).url, "--data", str(data), "--out",
               str(tmp_path / "out"), "--tokenizer", str(tmp_path / "model"), *change]  # fmt: skip
    assert main(command) == 1
    assert message in capfd.readouterr().err
