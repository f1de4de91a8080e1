"""`ballast-train query`: requests in harmless text, the loss, and the head beside a tiny checkpoint."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from model import checkpoint
from model.chat import ChatTemplate, Message
from model.pretrained import Pretrained, load
from model.scoring import score
from model.testing import byte_tokenizer
from model.trace import probability
from tests.training.conftest import FILLER
from training import recipe_file
from training.__main__ import main
from training.config import Cut, HeadRecipe, Optimiser, Query
from training.errors import DataError, RecipeError
from training.hidden import Hidden, hide, place, surroundings
from training.losses import query_loss
from training.query import add_query_head, evenly, flagged_by, messages, unanswered
from training.risk import smooth
from training.rows import Row
from training.run import calibrate_checkpoint, train_head


def row(prompt: str, label: int = 1, response: str | None = None) -> Row:
    return Row("own", "Own", "MIT", (Message("user", prompt),), response, label, None if response is None else 0)


def test_every_request_gets_surroundings_of_its_own_the_same_each_time():
    rows = [row("request " + "z" * number) for number in range(200)]
    found = hide(rows, [FILLER, "Bread rises."], 0)
    assert found == hide(rows[::-1], [FILLER, "Bread rises."], 0)[::-1]
    assert found != hide(rows, [FILLER, "Bread rises."], 1)
    assert all(one.text == one.before + one.row.prompt + one.after for one in found)
    bare = [not one.before and not one.after for one in found]
    assert 0 < sum(bare) < 40
    assert max(len(one.before) for one in found) > 500


def test_surroundings_are_harmless_answers_and_long_harmless_requests():
    answered = row("What of the tide?", 0, FILLER * 2)
    long = row(FILLER * 3, 0)
    assert surroundings([answered, long, row(FILLER * 4, 1), row("short", 0)], 0) == sorted(
        [(FILLER * 2).strip(), FILLER * 3]
    )


def test_a_few_refusals_are_surroundings_too():
    answered = [row(f"What of tide {number}?", 0, f"Tide {number}. " + FILLER * 2) for number in range(20)]
    refused = [row(f"Grab {number}!", 1, f"No, not {number}. " + FILLER * 2) for number in range(9)]
    complied = [replace(one, response=f"Yes, {one.response}", response_label=1) for one in refused]
    found = surroundings([*answered, *refused, *complied], 0)
    assert sum(text.startswith("No") for text in found) == 2
    assert len(found) == 22
    assert found == surroundings([*complied, *refused[::-1], *answered], 0)
    assert found != surroundings([*answered, *refused, *complied], 1)
    assert len(surroundings([*answered, *complied, refused[0]], 0)) == 21


def test_rows_come_from_each_source_in_turn():
    many = [replace(row(f"a {number}"), group="many") for number in range(5)]
    few = [replace(row(f"b {number}"), group="few") for number in range(2)]
    assert evenly([*many, *few]) == [many[0], few[0], many[1], few[1], *many[2:]]


@pytest.mark.parametrize(("before", "after"), [("", ""), ("One. ", ""), ("", "\nTwo."), ("One.\n\n", "\n\nTwo.")])
def test_the_tokens_of_the_request_are_found(before: str, after: str):
    tokenizer = byte_tokenizer()
    template = ChatTemplate(tokenizer, marks_content=True)
    placed = place(Hidden(row("grab it"), before, after), tokenizer, template, Cut())
    query = torch.tensor(placed.prompt.request[placed.prompt.query_start :])
    assert tokenizer.decode(query[placed.inside]) == "grab it"


def test_a_message_that_is_too_long_keeps_its_end():
    tokenizer = byte_tokenizer()
    template = ChatTemplate(tokenizer, marks_content=True)
    placed = place(Hidden(row("grab it"), FILLER * 9, "!"), tokenizer, template, Cut(request_tokens=40))
    assert len(placed.prompt.request) == len(placed.inside) == 40
    assert tokenizer.decode(torch.tensor(placed.prompt.request)[placed.inside]) == "grab it"
    gone = place(Hidden(row("grab it"), "", FILLER * 9), tokenizer, template, Cut(request_tokens=40))
    assert not gone.inside.any()


def test_the_loss_of_a_query_is_that_of_its_soft_maximum():
    logits = torch.tensor([[1.0, 3.0, -2.0, 7.0, 50.0], [1.0, 3.0, -2.0, 7.0, 50.0], [0.0] * 5])
    mask = torch.tensor([[True, True, True, True, False]] * 2 + [[True] * 5])
    inside = torch.tensor([[False, True, True, False, False]] * 2 + [[True] * 5])
    labels, weights = torch.tensor([1.0, 0.0, 1.0]), torch.tensor([1.0, 2.0, 1.0])
    found = query_loss(logits, mask, inside, labels, weights, 0.5)
    within = math.log(math.exp(3) + math.exp(-2))
    all_of_it = math.log(math.exp(1) + math.exp(3) + math.exp(-2) + math.exp(7))
    expected = [
        math.log1p(math.exp(-within)) + 0.5 * math.log1p(math.exp(1)),  # before it alone; nothing is asked after it
        2 * math.log1p(math.exp(all_of_it)),
        math.log1p(math.exp(-math.log(5))),
    ]
    assert found.tolist() == pytest.approx(expected, rel=1e-5)


def test_the_loss_smooths_as_the_server_does_and_has_a_gradient_everywhere():
    logits = torch.tensor([[0.0, 4.0]], requires_grad=True)
    whole = torch.ones(1, 2, dtype=torch.bool)
    (found,) = query_loss(smooth(logits, 0.25), whole, whole, torch.ones(1), torch.ones(1), 0.5)
    assert found.item() == pytest.approx(math.log1p(math.exp(-math.log(math.exp(0) + math.exp(1)))), rel=1e-5)
    found.backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
    assert (logits.grad < 0).all()


def test_no_request_and_no_text_around_it_stands_in_two_parts(hiding: HeadRecipe):
    found = messages(unanswered(hiding), hiding)
    keys = {name: {one.row.key for one in some} for name, some in found.items()}
    assert not keys["train"] & (keys["validation"] | keys["benign"] | keys["malicious"])
    assert {one.row.request_label for one in found["benign"]} == {0}
    assert {one.row.request_label for one in found["malicious"]} == {1}
    assert len(found["train"]) <= 40
    named = {
        name: set(re.findall(r"something about (\w+)\.", "".join(one.text for one in found[name]))) for name in found
    }
    assert named["train"]
    assert named["benign"]
    assert not named["train"] & (named["validation"] | named["benign"] | named["malicious"])


def test_what_is_learned_from_comes_from_each_source_and_stands_beside_refusals_too(hiding: HeadRecipe):
    few = replace(hiding, query=replace(hiding.query, limit=3))
    taught = messages(unanswered(few), few)["train"]
    assert len({(one.row.group, one.row.request_label) for one in taught}) == len(taught) == 6
    around = {
        name: "".join(one.before + one.after for one in some)
        for name, some in messages(unanswered(hiding), hiding).items()
    }
    assert "stay whole" in around["train"]
    assert "stay whole" not in around["validation"] + around["benign"] + around["malicious"]


def test_the_head_is_added_and_finds_what_is_hidden(hiding: HeadRecipe, tiny: Pretrained, tmp_path: Path):
    first = train_head(hiding, "ballast-train head")
    before = checkpoint.load(first)
    with_query = replace(hiding, checkpoint=str(first), output=str(tmp_path / "with"), run=str(tmp_path / "query"))
    recipe_file.dump(with_query, tmp_path / "query.yaml")
    assert main(["query", "--config", str(tmp_path / "query.yaml")]) == 0

    after = checkpoint.load(tmp_path / "with")
    assert torch.equal(before.head.request.out.weight, after.head.request.out.weight)
    assert after.config.request.block == before.config.request.block
    assert after.config.token_head == replace(before.config.token_head, reads_query=True)
    report = after.config.calibration["query"]
    assert report["benign"]["hits"] == 0
    assert report["taught"] > 20
    assert report["malicious"]["value"] > 0.5

    plain = checkpoint.attach(load(str(tmp_path / "model"), dtype=torch.float32), first)
    reading = checkpoint.attach(load(str(tmp_path / "model"), dtype=torch.float32), tmp_path / "with")
    for text in ("Tell me about tea.", FILLER + "STEAL my tea. " + FILLER):
        risks = [score(lm, lm.chat.encode([Message("user", text)])).request_risk for lm in (plain, reading)]
        assert risks[1] >= risks[0] - 1e-6

    # A second time, and where it lies: the card says it once.
    again = replace(with_query, checkpoint=str(tmp_path / "with"))
    add_query_head(again, "a second time")
    card = (tmp_path / "with" / "README.md").read_text()
    assert card.count("## Every token of the query") == 1
    assert "a second time" in card
    assert (tmp_path / "with" / "metrics.json").is_file()

    # New thresholds take the further head into account, which is made to find everything harmful here.
    loud = checkpoint.load(tmp_path / "with")
    loud.head.query.out.bias.data += 30.0
    checkpoint.save(tmp_path / "with", loud.head, loud.config, loud.cls)
    stricter = replace(hiding, checkpoint=str(tmp_path / "with"), output=str(tmp_path / "new"))
    calibrate_checkpoint(stricter, "")
    raised = checkpoint.load(tmp_path / "new")
    assert "A further head reads" in (tmp_path / "new" / "README.md").read_text()
    assert raised.head.query is not None
    assert raised.config.request.block > before.config.request.block + 1e-3
    said = loud.config.calibration["query"]
    assert raised.config.calibration["query"] == {key: said[key] for key in ("command", "data_sha256", "taught")}


def test_rows_without_a_label_of_their_request_bind_the_weights_too(
    hiding: HeadRecipe, data: Path, tiny: Pretrained, tmp_path: Path
):
    bound = {"own_answers", "alpaca", "refusals"}
    free = replace(hiding, sources={name: one for name, one in hiding.sources.items() if name not in bound})
    free = replace(free, query=Query(limit=4, calibration=8), query_optimiser=Optimiser(epochs=1, batch_size=8))
    first = train_head(free, "")
    answers = [
        {"prompt": "", "response": f"{n}. {FILLER * 2}", "harmful": 0, "source": "O (CC-BY-NC-4.0)"} for n in "ab"
    ]
    (data / "others.jsonl").write_text("".join(json.dumps(row) + "\n" for row in answers))
    around = free.sources | {"others": replace(free.sources["responses"], path="others.jsonl", request_label=None)}
    for sources, licence in ((free.sources, "Apache-2.0"), (around, "CC-BY-NC-SA-4.0")):
        folder = add_query_head(replace(free, checkpoint=str(first), sources=sources, output=str(tmp_path / "q")), "")
        assert checkpoint.load(folder).config.licence == licence


def test_the_head_acts_on_no_more_benign_messages_than_was_said(
    hiding: HeadRecipe, tiny: Pretrained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("training.hidden.SHORT", (20, 60))
    monkeypatch.setattr("training.hidden.LONG", (60, 150))  # all fit into the tiny model
    first = train_head(hiding, "")
    query = replace(hiding, checkpoint=str(first), output=str(tmp_path / "with"), run=str(tmp_path / "query"))
    folder = add_query_head(replace(query, acting=replace(query.acting, request_false_positives=0.25)), "")
    lm = checkpoint.attach(load(str(tmp_path / "model"), dtype=torch.float32), folder)
    lm.head.request.out.bias.data.fill_(-1e3)
    lm.head.request.out.weight.data.zero_()
    benign = messages(unanswered(hiding), hiding)["benign"]
    risks = [score(lm, lm.chat.encode([Message("user", one.text)])).request_risk for one in benign]
    acted = [risk > lm.config.request.block + 1e-6 for risk in risks]
    assert sum(acted) == lm.config.calibration["query"]["benign"]["hits"] == len(benign) // 4
    assert max(risks) > probability(-20)


def test_flag_of_requests_is_what_a_calibration_finds(hiding: HeadRecipe, tiny: Pretrained, tmp_path: Path):
    plain = replace(hiding, augment=replace(hiding.augment, history=0.0, system=0.0))
    first = train_head(plain, "")
    query = replace(plain, checkpoint=str(first), output=str(tmp_path / "with"), run=str(tmp_path / "query"))
    acting = replace(query.acting, request_false_positives=0.5, smoothing=0.9)  # that of the checkpoint counts
    folder = add_query_head(replace(query, acting=acting), "")
    found, before = checkpoint.load(folder).config, checkpoint.load(first).config
    calibrate_checkpoint(replace(plain, checkpoint=str(folder), output=str(tmp_path / "new")), "")
    assert found.request.flag == pytest.approx(checkpoint.load(tmp_path / "new").config.request.flag, abs=1e-6)
    assert found.request.flag != pytest.approx(before.request.flag, abs=1e-4)
    assert found.response == before.response


def test_validation_rows_set_when_it_acts_too_as_they_set_block(hiding: HeadRecipe):
    sources = {name: replace(source, calibration=0) for name, source in hiding.sources.items()}
    recipe = replace(hiding, sources=sources)
    assert {one.row.part for one in messages(unanswered(recipe), recipe)["benign"]} == {"validation"}


def test_a_prompt_of_two_sources_sets_when_it_acts_if_one_of_them_does(hiding: HeadRecipe):
    sets = {"own_answers": ("request",), "instructions": (), "alpaca": ()}  # alpaca has those of own_answers, and more
    sources = {name: replace(hiding.sources[name], sets_block=value) for name, value in sets.items()}
    recipe = replace(hiding, sources=hiding.sources | sources)
    assert {one.row.group for one in messages(unanswered(recipe), recipe)["benign"]} == {"own_answers"}


def test_what_it_needs_is_said(hiding: HeadRecipe, tiny: Pretrained, tmp_path: Path):
    with pytest.raises(RecipeError, match="set checkpoint"):
        add_query_head(hiding, "")
    sources = {name: replace(source, sets_block=()) for name, source in hiding.sources.items()}
    with pytest.raises(DataError, match=r"no request is left for \['benign'\]"):
        messages(unanswered(hiding), replace(hiding, sources=sources))
    weightless = {name: replace(source, flag_weight=0.0) for name, source in hiding.sources.items()}
    with pytest.raises(DataError, match="no malicious validation request"):
        flagged_by(unanswered(hiding), replace(hiding, sources=weightless))
    first = train_head(hiding, "")
    (tmp_path / "data" / "instructions.jsonl").write_text(
        json.dumps({"prompt": "a", "response": "b", "source": "Own (MIT)"}) + "\n"
    )
    with pytest.raises(DataError, match="no harmless text"):
        add_query_head(replace(hiding, checkpoint=str(first)), "")
