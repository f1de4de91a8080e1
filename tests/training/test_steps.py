"""What a step of a fine-tuning is made of."""

import pytest

from model.testing import byte_tokenizer
from training.config import Cut
from training.dialogues import Dialogue
from training.objectives import IGNORED
from training.steps import Encoded, EncodedPart, Steps, collate, encode
from training.tune_config import Recovery

CUT = Cut(request_tokens=64, response_tokens=8)
ALWAYS = Recovery(probability=1.0, deepest=3)


def part(
    name: str = "refusals", *, rows: int = 5, per_step: int = 2, share: float = 1.0, recovery: Recovery | None = None
):
    encoded = [Encoded((100 + i, 1), (7, 8), (50, 51, 52, 53, 54)) for i in range(rows)]
    return EncodedPart(name, encoded, share, per_step, recovery)


def test_a_dialogue_becomes_request_response_and_harmful_answer_joined_as_ids():
    tokenizer = byte_tokenizer()
    (row,) = encode([Dialogue("own", "MIT", "Hi", "No", "Yes")], tokenizer, CUT)
    assert tokenizer.decode(row.request).endswith("Hi<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.decode(row.response) == "No<|im_end|>"
    assert tokenizer.decode(row.harmful) == "Yes"


def test_a_response_that_is_cut_has_no_end():
    tokenizer = byte_tokenizer()
    (row,) = encode([Dialogue("own", "MIT", "Hi", "A very long one")], tokenizer, CUT)
    assert tokenizer.decode(row.response) == "A very l"


def test_a_part_may_cut_responses_sooner_but_no_harmful_prefix():
    tokenizer = byte_tokenizer()
    (row,) = encode([Dialogue("own", "MIT", "Hi", "A very long one", "Harmful")], tokenizer, CUT, 3)
    assert (tokenizer.decode(row.response), tokenizer.decode(row.harmful)) == ("A v", "Harmful")
    (row,) = encode([Dialogue("own", "MIT", "Hi", "A very long one")], tokenizer, CUT, 99)
    assert tokenizer.decode(row.response) == "A very l"


def test_a_response_that_was_cut_before_has_no_end_either():
    tokenizer = byte_tokenizer()
    (row,) = encode([Dialogue("own", "MIT", "Hi", "No", is_complete=False)], tokenizer, CUT)
    assert tokenizer.decode(row.response) == "No"


def test_a_harmful_prefix_is_read_and_not_learned():
    (example, *_) = [Steps([part(recovery=ALWAYS)], 1, seed=0)[i] for i in range(2)]
    depth = example.num_given - 2
    assert 1 <= depth <= 3
    assert example.ids[2 : example.num_given] == (50, 51, 52)[:depth]
    assert example.ids[example.num_given :] == (7, 8)


def test_without_recovery_no_harmful_token_is_read():
    steps = Steps([part()], 10, seed=0)
    assert all(example.ids[2:] == (7, 8) for example in (steps[i] for i in range(len(steps))))


def test_depths_are_drawn_anew_every_time_a_row_comes_round():
    steps = Steps([part(rows=1, per_step=1, recovery=ALWAYS)], 40, seed=0)
    assert {steps[i].num_given - 2 for i in range(40)} == {1, 2, 3}


def test_every_row_comes_once_before_any_comes_again_and_the_order_changes():
    steps = Steps([part(rows=6, per_step=2)], 6, seed=0)
    drawn = [steps[i].row[1] for i in range(12)]
    first, second = (
        [tuple(sorted(drawn[i : i + 2])) for i in range(0, 6, 2)],
        [tuple(sorted(drawn[i : i + 2])) for i in range(6, 12, 2)],
    )
    assert sorted(drawn[:6]) == sorted(drawn[6:]) == list(range(6))
    assert first != second


def test_a_step_is_the_same_whenever_it_is_asked_for():
    one, other = (Steps([part(recovery=ALWAYS), part("anchors")], 9, seed=3) for _ in range(2))
    backwards = [one[i] for i in reversed(range(len(one)))]
    assert backwards[::-1] == [other[i] for i in range(len(other))]


def test_the_rows_of_all_steps_are_those_that_any_of_them_draws_and_no_others():
    parts = [part(rows=50, per_step=3), part("anchors", rows=4)]
    steps = Steps(parts, 5, seed=0)
    found = steps.rows()
    assert {*found} == {steps[index].row for index in range(len(steps))}
    assert sum(name == "refusals" for name, _ in found) == 15
    assert sum(name == "anchors" for name, _ in found) == 4
    assert all(row is {one.name: one for one in parts}[name].rows[number] for (name, number), row in found.items())


def test_another_seed_gives_other_steps():
    assert [Steps([part(rows=50)], 5, seed=0)[i].row for i in range(10)] != [
        Steps([part(rows=50)], 5, seed=1)[i].row for i in range(10)
    ]


def test_the_weights_of_a_part_sum_to_its_share_in_every_step():
    steps = Steps([part(share=0.2, recovery=ALWAYS), part("anchors", per_step=6, share=0.8)], 3, seed=0)
    for step in range(3):
        total = {"refusals": 0.0, "anchors": 0.0}
        for place in range(8):
            example = steps[step * 8 + place]
            total[example.row[0]] += example.weight * (len(example.ids) - example.num_given)
        assert total == {"refusals": pytest.approx(0.2), "anchors": pytest.approx(0.8)}


def test_a_batch_is_padded_at_the_end_and_learns_only_responses():
    examples = [Steps([part(recovery=ALWAYS)], 4, seed=0)[i] for i in range(8)]
    batch = collate(sorted(examples, key=lambda example: len(example.ids)), pad_id=0)
    longest = max(len(example.ids) for example in examples)
    assert batch["input_ids"].shape == batch["labels"].shape == (8, longest)
    assert [[label for label in row if label != IGNORED] for row in batch["labels"].tolist()] == [[7, 8]] * 8
    assert batch["attention_mask"].sum(dim=1).tolist() == sorted(len(example.ids) for example in examples)
