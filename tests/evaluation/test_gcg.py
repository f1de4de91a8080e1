"""GCG on a guarded model: what its loss reads is what the server reads, and what it finds can be sent."""

import json
from pathlib import Path

import pytest
import torch
from nanogcg import GCGConfig

from evaluation.gcg import INIT, SignalGCG, main
from evaluation.rows import read
from model.chat import Message
from model.checkpoint import load, save
from model.config import ClsConfig, Thresholds, TokenHeadConfig
from model.errors import ModelError
from model.guarded_lm import GuardedLM
from model.scoring import score
from model.testing import tiny_guarded_lm, write_tiny

CLS = ClsConfig(windows=(2, 3, 2), schedule="every", request_share=0.3, response_share=0.7)
QUERY = {"token_head": TokenHeadConfig((1, -1), 32, 0, reads_query=True), "smoothing": 0.3}
SIGNALS = {"token": {}, "cls": {"token_head": None, "cls": CLS}, "both": {"cls": CLS}, "query": {"cls": CLS, **QUERY}}


def search(lm: GuardedLM, weight: float = 1.0, **settings) -> SignalGCG:
    found = {
        "num_steps": 3,
        "search_width": 8,
        "topk": 16,
        "optim_str_init": INIT,
        "use_prefix_cache": False,
        "seed": 0,
    }
    return SignalGCG(lm, GCGConfig(**found | settings, verbosity="ERROR"), weight)


@pytest.mark.parametrize("signal", SIGNALS)
def test_the_loss_reads_the_risks_that_scoring_finds(signal: str):
    lm = tiny_guarded_lm(**SIGNALS[signal])
    if lm.reads_query:
        lm.head.request.out.bias.data.fill_(-9.0)  # so that the highest token decides
    gcg = search(lm, num_steps=1)
    result = gcg.attack("do it", "yes sir")
    request = f"do it{result.best_string}"
    prompt = lm.chat.encode([Message("user", request), Message("assistant", "yes sir")], continue_final=True)
    trace = score(lm, prompt)
    embeddings = gcg.embedding_layer(torch.tensor([[*prompt.request, *prompt.prefill]]))
    with torch.no_grad():
        found = gcg.logits(embeddings.repeat(2, 1, 1))
        loss = gcg.losses(embeddings)
    assert torch.sigmoid(found.request).tolist() == pytest.approx([trace.request_risk] * 2, abs=1e-5)
    expected = [assessment.risk for assessment in trace.assessments]
    assert torch.sigmoid(found.response)[1].tolist() == pytest.approx(expected, abs=1e-5)
    assert loss.item() == pytest.approx(result.best_loss, abs=1e-4)


def test_the_signal_weighs_only_where_it_is_over_its_threshold():
    never, always = Thresholds(block=1 - 1e-6, flag=0.5), Thresholds(block=1e-6, flag=1e-6)
    lm = tiny_guarded_lm(request=never, response=never)
    losses = {weight: search(lm, weight).attack("do it", "yes").losses for weight in (0.0, 1.0)}
    assert losses[0.0] == losses[1.0]
    lm = tiny_guarded_lm(request=always, response=always)
    losses = {weight: search(lm, weight).attack("do it", "yes").losses for weight in (0.0, 1.0)}
    assert losses[1.0][0] > losses[0.0][0] + 1


def test_a_search_lowers_the_loss_with_text_that_a_server_takes():
    lm = tiny_guarded_lm()
    result = search(lm, num_steps=8, search_width=32).attack("do it", "yes")
    assert min(result.losses) < result.losses[0]
    lm.chat.encode([Message("user", f"do it{result.best_string}")])  # no control token in it
    assert result.best_string.isascii()


def test_a_template_that_cannot_be_taken_apart_is_an_error():
    lm = tiny_guarded_lm()
    gcg = search(lm)
    gcg.attack("do it", "yes")
    gcg.prompt = lm.chat.encode([Message("system", "be good"), Message("user", "do it")])
    with pytest.raises(ModelError, match="other tokens of a request"):
        gcg.run([{"role": "user", "content": "do it{optim_str}"}], "yes")


def write(path: Path, *prompts: str) -> Path:
    rows = [{"prompt": prompt, "harmful_response": "abcdefgh", "source": "Own (MIT)"} for prompt in prompts]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_the_command_writes_prompts_that_can_be_sent_and_goes_on(tmp_path: Path, capfd):
    model, checkpoint = write_tiny(tmp_path)
    out = tmp_path / "gcg.jsonl"
    words = ["--model", str(model), "--steps", "1", "--width", "4", "--target-tokens", "3", "--dtype", "float32"]
    words += ["--out", str(out)]
    guarded = [*words, "--checkpoint", str(checkpoint)]
    assert main([*guarded, "--data", str(write(tmp_path / "one.jsonl", "a"))]) == 0
    first = out.read_text()
    out.write_text(first + '{"prompt": "b", "atta')  # killed while it wrote
    assert main([*guarded, "--data", str(write(tmp_path / "two.jsonl", "a", "b"))]) == 0
    assert out.read_text().startswith(first)
    found = read(out, label=1, response="attack_prompt")
    assert [row.prompt for row in found] == ["a", "b"]
    queries = [json.loads(line)["queries"] for line in out.read_text().splitlines()]
    assert all(1 + 1 < count <= 1 + 1 + 4 for count in queries)  # the first wording, its gradient, its candidates
    assert all(row.response.startswith(row.prompt) for row in found)
    assert main([*guarded, "--data", str(tmp_path / "two.jsonl"), "--weight", "2"]) == 1
    assert "holds prompts of other settings" in capfd.readouterr().err
    plain = [*words[:-1], str(tmp_path / "plain.jsonl"), "--data", str(tmp_path / "one.jsonl")]
    with pytest.raises(SystemExit):
        main(plain)
    assert "a plain model has no signal: it takes --weight 0" in capfd.readouterr().err
    assert main([*plain, "--weight", "0"]) == 0
    assert main([*plain, "--weight", "0", "--dtype", "bfloat16"]) == 1
    assert "holds prompts of other settings" in capfd.readouterr().err
    assert main([*guarded, "--data", str(tmp_path / "one.jsonl"), "--target-tokens", "99"]) == 1
    assert main([*guarded, "--data", str(tmp_path / "none.jsonl")]) == 1
    assert "none.jsonl" in capfd.readouterr().err
    head, _, config = load(checkpoint)
    torch.nn.init.zeros_(head.response.out.bias)
    save(checkpoint, head, config)
    assert main([*guarded, "--data", str(tmp_path / "two.jsonl")]) == 1
    assert "holds prompts of other settings" in capfd.readouterr().err
    for text in ("no JSON\n", "5\n", '{"mine": 1}'):
        out.write_text(text)
        assert main([*guarded, "--data", str(tmp_path / "two.jsonl")]) == 1
        assert f"{out} holds something else than attack prompts" in capfd.readouterr().err
        assert out.read_text() == text
