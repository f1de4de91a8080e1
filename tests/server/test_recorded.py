"""Recorded passes give what passes give, and so do the kernels that they run on a GPU."""

import os
from itertools import count

import pytest
import torch

from model.generation import generate
from model.guarded_lm import GuardedLM
from model.safety_head import Passage
from model.testing import FAMILIES, tiny_guarded_lm
from server.engine.compiled import layers_of
from server.engine.graph_heads import GraphHeads, Said
from server.engine.native import multiply_of
from server.engine.paged import paged
from server.engine.recorded import Recorded
from server.engine.runner import PagedRunner
from server.engine.tape import Tape, failed, raise_if_failed
from tests.server.together import HEAD, NEVER, OFTEN, SIGNALS, SOME, requests, together, told

ON_GPU = pytest.param("cuda", marks=pytest.mark.gpu)


def on(device: str, family: str, signal: str) -> GuardedLM:
    """Return a tiny guarded model on a device."""
    lm = tiny_guarded_lm(family, **SIGNALS[signal] | {"request": NEVER, "response": OFTEN, "onset": 0.4})
    return GuardedLM(lm.model.to(device), lm.tokenizer, lm.head, lm.config, lm.cls)  # type: ignore[arg-type]  # as in model.pretrained


def spied(monkeypatch) -> list[object]:
    """Return where what is played, or None for what is run, is added from now on."""
    played: list[object] = []
    play = Recorded.play
    monkeypatch.setattr(Recorded, "play", lambda self, laid: played.append(play(self, laid)) or played[-1])
    return played


@pytest.mark.parametrize("device", ["cpu", ON_GPU])
@pytest.mark.parametrize(("family", "signal"), SOME)
def test_recorded_passes_say_what_is_said_alone(family: str, signal: str, device: str, monkeypatch):
    lm, alone = on(device, family, signal), on(device, family, signal)
    runner = paged(lm, 8 << 20)
    assert isinstance(runner, PagedRunner)
    runner.record()
    played = spied(monkeypatch)
    asked = requests(lm, 16)
    found = [told(events) for events in together(lm, asked, runner, evicts=True)]
    expected = [told(list(generate(alone, request))) for request in asked]
    assert [exact for exact, _ in found] == [exact for exact, _ in expected]
    for (_, risks), (_, wanted) in zip(found, expected, strict=True):
        assert risks == pytest.approx(wanted, abs=1e-4)
    assert len(played) > 10
    assert None not in played


@pytest.mark.parametrize("signal", SIGNALS)
def test_heads_may_be_part_of_a_recorded_pass(signal: str, monkeypatch):
    monkeypatch.setattr("server.engine.recorded.WITH_HEADS", ("cpu", "cuda"))
    monkeypatch.setattr("server.engine.assessing.extend_rows", None)  # what reads states otherwise
    said: list[Said] = []
    monkeypatch.setattr(GraphHeads, "said", lambda *of, say=GraphHeads.said: said.append(say(*of)) or said[-1])
    test_recorded_passes_say_what_is_said_alone("llama", signal, "cpu", monkeypatch)
    assert len(said) > 20


@pytest.mark.skipif(multiply_of() is None, reason="no compiler, or a processor without a product in bfloat16")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, within its compiler
@pytest.mark.parametrize(
    "family", ["llama", *(pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES if f != "llama")]
)
def test_layers_on_a_tape_give_what_they_give_when_they_run(family: str, caplog, monkeypatch):
    lm = tiny_guarded_lm(family, **SIGNALS["both"] | {"request": NEVER, "response": OFTEN, "onset": 0.4})
    lm.model.to(torch.bfloat16)
    runner = paged(lm, 8 << 20, compiles=True)
    assert isinstance(runner, PagedRunner)
    assert not [one for one in caplog.records if one.name.startswith("server")]
    recorded = runner.recorded
    assert recorded is not None
    assert recorded._taped is not None
    asked = requests(lm, 16)
    runner.reset()
    counted = []
    play = Tape.play
    monkeypatch.setattr(Tape, "play", lambda self: counted.append(play(self)))
    played = [told(events) for events in together(lm, asked, runner, evicts=True)]
    assert len(counted) > 20
    runner.recorded = None
    runner.reset()  # what was shared in one run and computed in the other is rounded another way
    assert played == [told(events) for events in together(lm, asked, runner, evicts=True)]


@pytest.mark.skipif(multiply_of() is None, reason="no compiler, or a processor without a product in bfloat16")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, within its compiler
def test_a_tape_that_lacks_a_call_is_not_played(monkeypatch, caplog):
    monkeypatch.setattr("server.engine.tape._kernels", list)  # those of torch's compiler go unnoted
    lm = tiny_guarded_lm(token_head=HEAD)
    lm.model.to(torch.bfloat16)
    runner = paged(lm, 8 << 20, compiles=True)
    assert isinstance(runner, PagedRunner)
    assert runner.recorded is None
    assert "passes are not recorded" in caplog.text
    assert all(events for events in together(lm, requests(lm, 4), runner))


@pytest.mark.skipif(multiply_of() is None, reason="no compiler, or a processor without a product in bfloat16")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, within its compiler
def test_a_tape_that_lacks_any_one_call_is_not_believed(monkeypatch):
    monkeypatch.setattr("server.engine.recorded.SIZES", (1, 2))
    lm = tiny_guarded_lm("qwen3", token_head=HEAD)
    lm.model.to(torch.bfloat16)
    runner = paged(lm, 8 << 20, compiles=True)
    assert isinstance(runner, PagedRunner)
    assert runner.recorded is not None
    runner.recorded.close()
    note, seen = Tape.note, count()

    def note_all_but(missing: int):
        def some(self, *call):
            if next(seen) != missing:
                note(self, *call)

        return some

    monkeypatch.setattr(Tape, "note", note_all_but(-1))
    runner.record(layers_of(lm.model))
    runner.recorded.close()
    num_calls = next(seen)  # of both sizes, the larger first
    assert num_calls >= 2 * 3 * 9
    for missing in range(num_calls):
        seen = count()
        monkeypatch.setattr(Tape, "note", note_all_but(missing))
        with pytest.raises(ValueError, match="does not give"):
            runner.record(layers_of(lm.model))


def test_a_call_with_more_arguments_than_a_tape_takes_is_an_error():
    with pytest.raises(ValueError, match="at most 32"):
        Tape().note(0, [0] * 33, [])


def test_more_rows_than_were_recorded_are_run(monkeypatch):
    monkeypatch.setattr("server.engine.recorded.SIZES", (1, 2))
    lm, alone = tiny_guarded_lm(token_head=HEAD), tiny_guarded_lm(token_head=HEAD)
    runner = paged(lm, 8 << 20)
    assert isinstance(runner, PagedRunner)
    runner.record()
    played = spied(monkeypatch)
    asked = requests(lm, 8)
    found = [told(events)[0] for events in together(lm, asked, runner)]
    assert None in played
    assert any(one is not None for one in played)
    assert found == [told(list(generate(alone, request)))[0] for request in asked]


@pytest.mark.gpu
def test_on_a_gpu_passes_are_recorded_and_layers_compiled(caplog):
    lm, alone = on("cuda", "llama", "both"), on("cuda", "llama", "both")
    runner = paged(lm, 8 << 20, compiles=True)
    assert isinstance(runner, PagedRunner)
    assert runner.recorded is not None
    assert not [one for one in caplog.records if one.name.startswith("server")]
    asked = requests(lm, 16)
    found = [told(events)[0] for events in together(lm, asked, runner)]
    assert found == [told(list(generate(alone, request)))[0] for request in asked]


@pytest.mark.gpu  # or with TRITON_INTERPRET=1
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(9, 3, 64), (4, 4, 8), (8, 1, 40), (32, 32, 128)])
def test_a_kernel_reads_the_slots_of_each_list(shape, dtype):
    pytest.importorskip("triton", reason="the kernels are written in it")
    from server.engine import kernels

    device = "cpu" if os.environ.get("TRITON_INTERPRET") else "cuda"
    (num_heads, num_key_heads, size), num_slots, num_rows = shape, 400, 6
    generator = torch.Generator().manual_seed(num_heads)
    queries, keys, values = (
        torch.randn(*of, generator=generator).to(device, dtype)
        for of in ((num_rows, num_heads, size), *[(num_key_heads, num_slots, size)] * 2)
    )
    for lengths in ((1, 0, 17), (400, 3, 64), (200,), (130, *[5] * 5)):
        lists = [torch.randperm(num_slots, generator=generator)[:length].to(device) for length in lengths]
        rows = torch.randperm(num_rows, generator=generator)[: len(lists)].to(device)
        offsets = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], device=device)
        output = torch.full_like(queries, torch.nan)
        kernels.attend(queries, keys, values, output, rows, torch.cat(lists), offsets, 0.3)
        for row, slots in zip(rows.tolist(), lists, strict=True):
            k, v = (
                store[:, slots].float().repeat_interleave(num_heads // num_key_heads, 0) for store in (keys, values)
            )
            weights = (queries[row, :, None].float() @ k.transpose(1, 2) * 0.3).softmax(-1)
            expected = (weights @ v)[:, 0]
            assert torch.allclose(output[row].float(), expected, atol=1e-4 if dtype is torch.float32 else 3e-2)


@pytest.mark.gpu  # or with TRITON_INTERPRET=1
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_kernel_keeps_keys_and_values_in_their_slots(dtype):
    pytest.importorskip("triton", reason="the kernels are written in it")
    from server.engine import kernels

    device = "cpu" if os.environ.get("TRITON_INTERPRET") else "cuda"
    generator = torch.Generator().manual_seed(0)
    key = torch.randn(5, 3, 40, generator=generator).to(device, dtype).transpose(0, 1)  # as a layer gives them
    value = torch.randn(5, 3, 24, generator=generator).to(device, dtype).transpose(0, 1)
    keys, values = (torch.zeros(3, 20, size, device=device, dtype=dtype) for size in (40, 24))
    slots = torch.tensor([7, 0, 19, 3, 4], device=device)
    expected = [store.clone().index_copy_(1, slots, some) for store, some in ((keys, key), (values, value))]
    kernels.keep(key, value, keys, values, slots)
    assert all(map(torch.equal, (keys, values), expected))


@pytest.mark.parametrize("signal", SIGNALS)
@pytest.mark.parametrize("device", ["cpu", ON_GPU])
def test_heads_within_a_pass_say_what_they_say_by_themselves(signal: str, device: str):
    lm = on(device, "llama", signal)
    heads = GraphHeads(lm, 8)
    generator = torch.Generator().manual_seed(1)
    states = [torch.randn(1, 4, lm.model.config.hidden_size, generator=generator).to(device) for _ in range(4)]
    logits = torch.randn(4, lm.vocab_size, generator=generator).to(device)
    logits[2, 7] = logits[2, 30] = 9.0
    passages: list[Passage | None] = [Passage(), None, Passage(), Passage()]
    layers = lm.head.config.layers if lm.head is not None else ()
    for passage, length in ((passages[0], 3), (passages[3], 1)):
        before = [torch.randn(length, lm.model.config.hidden_size, generator=generator).to(device) for _ in layers]
        if passage is not None and before:
            passage.extend(torch.cat(before, dim=-1))
    with torch.inference_mode():
        heads.fill(passages)
        heads.read(logits, states, torch.tensor([4, 1, 1, 2], device=device))
        said = heads.said(4, 3)
    if device == "cuda":
        torch.cuda.synchronize()
    assert [said.likeliest(row) for row in range(3)] == logits[:3].argmax(-1).tolist()
    assert said.likeliest(2) == 7
    for row, passage in enumerate(passages[:3]):
        if lm.cls is not None:
            expected = lm.assess_cls("request", states[-1][0, [row]]).logits[0]
            assert said.cls("request", row) == pytest.approx(expected, abs=1e-4)
        if lm.head is not None and passage is not None:
            features = passage.extend(torch.cat([states[layer][0, row : row + 1] for layer in layers], dim=-1))
            assert torch.allclose(said.features[row : row + 1], features, atol=1e-5)
            assert passage.total is not None
            assert torch.allclose(said.totals[row], passage.total, atol=1e-5)
            assert said.response(row) == pytest.approx(lm.assess("response", features).logits[0], abs=1e-4)


def test_a_call_without_memory_is_an_error_once():
    failed.fill_(1)
    with pytest.raises(MemoryError):
        raise_if_failed()
    raise_if_failed()
