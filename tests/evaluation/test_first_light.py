from evaluation.first_light import POLICIES, Case, Outcome, report

SAFETY = {"action": "none", "request_risk": 0.1, "response_risk": None, "num_withdrawn_tokens": 0}


def table(text):
    return [line for line in text.splitlines() if line.startswith("| benign | ")]


def test_what_the_policy_acted_on_is_counted_and_not_what_a_text_says():
    stopped = Outcome("content_filter", {**SAFETY, "action": "refused"}, "No.", "No.")
    spoken = Outcome("stop", SAFETY, "The finish reason content_filter says so.", None)
    found = report({Case("benign", 1, "default", "plain"): stopped, Case("benign", 2, "default", "plain"): spoken})
    assert table(found) == ["| benign | default | plain | 2 | 1 [9%, 91%] |"]
    assert "| benign 2 | default | plain | stop | none | 0.100 | - | 0 | The finish reason content_filter" in found


def test_each_policy_and_way_is_counted_for_itself():
    stopped, spoken = Outcome("content_filter", SAFETY, "", None), Outcome("length", SAFETY, "Yes", None)
    found = report(
        {Case("benign", 1, policy, "plain"): stopped if policy == "default" else spoken for policy in POLICIES}
    )
    assert [line.split(" | ")[1:5] for line in table(found)] == [
        ["default", "plain", "1", "1 [21%, 100%] |"],
        ["input score", "plain", "1", "0 [0%, 79%] |"],
    ]


def test_what_follows_a_malicious_request_is_given_by_its_length_only():
    got = Outcome("content_filter", SAFETY, "a secret\n\nsorry", "sorry")
    found = report({Case("malicious", 1, "default", "plain"): got})
    assert "secret" not in found
    assert "| 8 characters |" in found
