"""The command `ballast-train harden`: a model goes the whole way, from its own answers to a checkpoint that serves."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml

from model import checkpoint
from model.chat import Message
from model.cls_signal import sliding_windows
from model.events import Finish
from model.generation import generate
from model.guarded_lm import GuardedLM
from model.pretrained import device_of, load
from model.request import GenerationRequest
from model.sampling import GREEDY
from training import calibrate, recipe_file
from training.anchors import write_anchors
from training.corpus import assemble
from training.dialogues import read_openings, read_part, read_prompts
from training.harden_config import HardenRecipe
from training.licences import licence_beside, licence_for
from training.query import add_query_head, messages
from training.run import train_head
from training.templates import SHIPPED
from training.tune import tune
from training.tune_config import DialogueSource, Part

CHECK = SHIPPED / "check.yaml"
CHECK_TOKENS = 48


class Check(NamedTuple):
    """What became of the requests of `texts/check.yaml`, each asked once."""

    num_benign: int
    num_benign_acted_on: int
    num_malicious: int
    num_malicious_acted_on: int

    def __str__(self) -> str:
        return (
            f"quick check: {self.num_malicious_acted_on} of {self.num_malicious} malicious requests refused, "
            f"{self.num_benign_acted_on} of {self.num_benign} benign ones"
        )


def harden(recipe: HardenRecipe, command: str) -> tuple[Path, Check]:
    """Return the folder of the checkpoint, and what a first look at it finds.

    Interrupted, the same recipe goes on where it was: every step keeps what it has done.

    Raises:
        TrainingError: if recipe or data do not fit.
        ModelError: if the model cannot be loaded.
    """
    run = Path(recipe.run)
    run.mkdir(parents=True, exist_ok=True)
    recipe_file.dump(recipe, run / "recipe.yaml")
    shared: dict[str, Any] = {
        name: getattr(recipe, name) for name in ("model", "device", "data", "seed", "is_permissive_only")
    }
    _check_first(recipe, shared)
    cache = str(run / "cache")
    written: dict[str, str] = {}
    for name, anchors in recipe.anchors.items():
        found = write_anchors(replace(anchors, **shared, output=str(run / f"{name}.jsonl"), cache=cache), command)
        written[anchors.output] = str(found.resolve())
    parts = _reading(recipe.signal.parts, written)
    adapter = tune(
        replace(recipe.signal, **shared, parts=parts, output=str(run / "adapter"), run=str(run / "signal")), command
    )
    sources = {
        name: replace(source, without=tuple(written.get(path, path) for path in source.without))
        for name, source in recipe.head.sources.items()
    }
    head = replace(
        recipe.head,
        **shared,
        sources=sources,
        adapter=str(adapter),
        output=str(run / "head" / "checkpoint"),
        run=str(run / "head"),
        cache=cache,
    )
    with_head = train_head(head, command)
    query = replace(head, adapter=None, checkpoint=str(with_head), output=recipe.output, run=str(run / "query"))
    folder = add_query_head(query, command)
    dtype = getattr(torch, head.dtype)
    checked = check(checkpoint.attach(load(recipe.model, dtype=dtype, device=device_of(recipe.device)), folder))
    (run / "check.json").write_text(json.dumps(checked._asdict(), indent=2) + "\n", encoding="utf-8")
    return folder, checked


def _check_first(recipe: HardenRecipe, shared: Mapping[str, Any]) -> None:
    """Find before the hours of the first steps what would end the last: files, rows and licences of all but answers.

    Raises:
        TrainingError: if recipe or data do not fit.
        ModelError: if the model cannot be loaded, or cannot carry a `[CLS]` signal.
    """
    written = {anchors.output: read_prompts(replace(anchors, **shared)) for anchors in recipe.anchors.values()}
    signal = replace(recipe.signal, **shared)
    learned = {one for path in (recipe.model, signal.adapter) if path is not None for one in licence_beside(Path(path))}
    for name, part in signal.parts.items():
        answered = [source for source in part.sources.values() if source.path in written]
        learned |= {row.licence for one in answered for row in written[one.path] if row.source.startswith(one.match)}
        if not answered:
            learned |= {row.licence for row in read_part(name, part, signal)}
        if part.onset is not None and part.onset.openings.path not in written:
            learned |= {row.licence for row in read_openings(name, part.onset, signal)}
    sources = {
        name: replace(source, without=tuple(path for path in source.without if path not in written))
        for name, source in recipe.head.sources.items()
    }
    head = replace(recipe.head, **shared, sources=sources)
    rows = assemble(head, lambda rows: ["an answer"] * len(rows))
    calibrate.check(rows, head)
    messages(rows, head)  # raises where the head for the query would find nothing to learn from
    licence_for(head, {row.licence for row in rows} | {licence_for(signal, learned)})
    sliding_windows(load(recipe.model, dtype=getattr(torch, head.dtype), device="cpu").model)


def check(lm: GuardedLM) -> Check:
    """Ask a model the requests of `texts/check.yaml` and count those that the policy acted on."""
    texts: dict[str, list[str]] = yaml.safe_load(CHECK.read_text(encoding="utf-8"))
    acted = {kind: sum(_is_acted_on(lm, text) for text in found) for kind, found in texts.items()}
    return Check(len(texts["benign"]), acted["benign"], len(texts["malicious"]), acted["malicious"])


def _is_acted_on(lm: GuardedLM, text: str) -> bool:
    prompt = lm.chat.encode([Message("user", text)])
    *_, finish = generate(lm, GenerationRequest(prompt, max_tokens=CHECK_TOKENS, sampling=GREEDY))
    assert isinstance(finish, Finish)
    return finish.action != "none"


def _reading(parts: Mapping[str, Part], written: Mapping[str, str]) -> dict[str, Part]:
    """Return the parts with every source that reads one of these files reading what is now in its place."""

    def moved(source: DialogueSource) -> DialogueSource:
        return replace(source, path=written.get(source.path, source.path))

    return {
        name: replace(
            part,
            sources={key: moved(source) for key, source in part.sources.items()},
            onset=replace(part.onset, openings=moved(part.onset.openings)) if part.onset is not None else None,
        )
        for name, part in parts.items()
    }
