r"""How fast the engine decodes a model of a given shape with random weights, without HTTP, against the memory's bound.

    .venv/bin/python benchmarks/shape.py --clients 1 64 --out shape.json

The default shape is that of Llama 2 7B. Each kind of signal, untrained and with thresholds that nothing reaches, is
served one after the other by the same weights: both sides block, so text waits for its assessment. The bound of one
client is the bytes of the weights that a token reads, all but the embedding, over the bandwidth of a large copy, which
counts bytes read and written. `token_ms` counts the prompt's pass in. `pass_ms` is the recorded forward pass alone,
played again and again. The last line of the output is one JSON object.
"""

import argparse
import asyncio
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, PreTrainedTokenizerBase

from model.chat import Message
from model.cls_signal import ClsSignal
from model.config import BaseModel, ClsConfig, SafetyConfig, Thresholds, TokenHeadConfig
from model.events import Finish
from model.guarded_lm import GuardedLM
from model.policy import Mode
from model.request import GenerationRequest
from model.safety_head import TokenHead
from model.sampling import SamplingParams
from model.testing import byte_tokenizer
from server.engine.compiled import as_it_was
from server.engine.local import LocalEngine
from server.engine.paged import paged
from server.engine.runner import PagedRunner

NEVER = Thresholds(block=1.0, flag=1.0)
PROMPT = "Tell a story of an old river, a quiet garden and a copper window. It is number "
VARIANTS = ("off", "token head", "[CLS] every", "[CLS] annealed", "token head, [CLS] annealed")


def made_model(args: argparse.Namespace, device: str) -> PreTrainedModel:
    """Return a Llama of the shape asked for, with random weights in bfloat16."""
    config = LlamaConfig(
        vocab_size=args.vocabulary,
        hidden_size=args.width,
        intermediate_size=args.inner,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.key_heads,
        max_position_embeddings=4096,
    )
    with torch.device(device):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return model.eval()


def made_tokenizer(vocabulary: int) -> PreTrainedTokenizerBase:
    """Return a tokenizer whose every id is some text."""
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([f" word{number}" for number in range(vocabulary - len(tokenizer))])
    return tokenizer


def guarded(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, variant: str, base: BaseModel) -> GuardedLM:
    """Return the model with a signal of a kind that finds nothing."""
    if variant == "off":
        return GuardedLM(model, tokenizer)
    width, num_layers = model.config.hidden_size, model.config.num_hidden_layers
    layers = (*sorted({num_layers * part // 30 for part in (8, 12, 16, 20, 24)}), -1)
    head_config = TokenHeadConfig(layers, width, hidden=128) if "token head" in variant else None
    cls_config = ClsConfig(schedule=variant.rsplit(" ", 1)[1]) if "[CLS]" in variant else None
    config = SafetyConfig(base, head_config, NEVER, NEVER, onset=1.0, smoothing=0.15, cls=cls_config)
    head = TokenHead(head_config) if head_config is not None else None
    cls = ClsSignal(width) if cls_config is not None else None
    for module in (head, cls):
        for parameter in module.parameters() if module is not None else ():
            torch.nn.init.zeros_(parameter)
    return GuardedLM(model, tokenizer, head, config, cls, schedule=cls_config.schedule if cls_config else None)


async def answer(engine: LocalEngine, name: str, request: GenerationRequest) -> tuple[float, int]:
    """Return seconds to the first text, and how many tokens there were."""
    start, first = time.perf_counter(), 0.0
    async for event in engine.submit(name, request):
        first = first or time.perf_counter() - start
        if isinstance(event, Finish):
            return first, event.completion_tokens
    raise RuntimeError("the answer has no end")


async def measure(engine: LocalEngine, clients: int, num_tokens: int, rounds: int) -> dict[str, Any]:
    """Return medians over some rounds in which clients ask for an answer each."""
    lm = engine.lm
    mode = Mode.OFF if lm.config is None else Mode.BLOCK
    sampling = SamplingParams(temperature=0.0, ignore_eos=True)
    seconds, firsts = [], []
    for number in range(rounds + 1):
        prompts = [lm.chat.encode([Message("user", f"{PROMPT}{number} {client}")]) for client in range(clients)]
        asked = [GenerationRequest(prompt, num_tokens, sampling, input=mode, output=mode) for prompt in prompts]
        start = time.perf_counter()
        found = await asyncio.gather(*(answer(engine, f"{number} {n}", one) for n, one in enumerate(asked)))
        if any(count != num_tokens for _, count in found):
            raise RuntimeError(f"answers have {sorted({count for _, count in found})} tokens")
        if number:  # the first warms up
            seconds.append(time.perf_counter() - start)
            firsts += [first for first, _ in found]
    first = statistics.median(firsts)
    taken = statistics.median(seconds)
    return {
        "clients": clients,
        "n": rounds,
        "tokens_per_s": clients * num_tokens / taken,
        "first_ms": 1e3 * first,
        "token_ms": 1e3 * taken / num_tokens,
        "seconds": seconds,
    }


@torch.inference_mode()
def pass_ms(runner: PagedRunner, rows: int, repeats: int = 50) -> float | None:
    """Return milliseconds of a recorded pass of this many rows, played alone; None if it was not recorded."""
    recorded = runner.recorded
    if recorded is None or not torch.cuda.is_available():
        return None
    times = []
    for _ in range(5):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(repeats):
            recorded.again(rows)
        torch.cuda.synchronize()
        times.append((time.perf_counter() - start) / repeats)
    return 1e3 * statistics.median(times)


def copy_bytes_per_s(num_bytes: int = 4 << 30) -> float:
    """Return the bandwidth of a large copy on the GPU."""
    source = torch.empty(num_bytes // 2, dtype=torch.bfloat16, device="cuda").normal_()
    target = torch.empty_like(source)
    times = []
    for _ in range(12):
        torch.cuda.synchronize()
        start = time.perf_counter()
        target.copy_(source)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return 2 * num_bytes / statistics.median(times[2:])


async def serve(lm: GuardedLM, args: argparse.Namespace) -> dict[str, Any]:
    """Return what was measured of one kind of signal."""
    runners: list[Any] = []

    def seat(lm: GuardedLM) -> Any:
        runners.append(paged(lm, args.cache_gib << 30, compiles=True))
        return runners[0]

    engine = LocalEngine(lambda: lm, seat=seat, max_running=max(args.clients))
    start = time.perf_counter()
    await engine.start()
    ready_s = time.perf_counter() - start
    try:
        found = [await measure(engine, clients, args.tokens, args.rounds) for clients in args.clients]
    finally:
        await engine.stop(drain_s=0)
    for one in found:
        one["pass_ms"] = pass_ms(runners[0], one["clients"]) if isinstance(runners[0], PagedRunner) else None
    return {"ready_s": ready_s, "runs": found}


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shape = {"width": 4096, "inner": 11008, "layers": 32, "heads": 32, "key-heads": 32, "vocabulary": 32000}
    for name, value in shape.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 64])
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cache-gib", type=int, default=24)
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, tokenizer = made_model(args, device), made_tokenizer(args.vocabulary)
    read = sum(p.numel() * p.element_size() for p in model.parameters())
    read -= model.get_input_embeddings().weight.numel() * 2  # one row of it is read
    found: dict[str, Any] = {"shape": vars(args) | {"out": None}, "weight_bytes": read}
    if device == "cuda":
        found |= {"gpu": torch.cuda.get_device_name(), "copy_bytes_per_s": copy_bytes_per_s()}
        found["bound_ms"] = 1e3 * read / found["copy_bytes_per_s"]
        print(f"{found['gpu']}: {found['copy_bytes_per_s'] / 1e12:.2f} TB/s, bound {found['bound_ms']:.2f} ms a token")
    base = BaseModel("random", "", "", "bfloat16")
    was = model.config._attn_implementation
    for variant in args.variants:
        lm = guarded(model, tokenizer, variant, base)
        found[variant] = asyncio.run(serve(lm, args))
        as_it_was(model)
        model.set_attn_implementation(was)
        for one in found[variant]["runs"]:
            figures = ", ".join(f"{name} {value:.4g}" for name, value in one.items() if isinstance(value, (int, float)))
            print(f"{variant}: ready in {found[variant]['ready_s']:.0f} s; {figures}", flush=True)
        if args.out is not None:
            args.out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
