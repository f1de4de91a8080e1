"""Who may import whom, as `docs/architecture.md` draws it; and the checking function on made-up source."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ALLOWED: dict[str, set[str]] = {"model": set(), "server": {"model"}, "training": {"model"}, "evaluation": {"model"}}
FORBIDDEN = {
    "server/engine/": {"fastapi", "pydantic", "pydantic_settings", "starlette"},
    "server/engine/scheduler.py": {"torch"},
    "server/engine/pages.py": {"torch"},
    "model/policy.py": {"torch"},
    "model/trace.py": {"torch"},
    "model/schedule.py": {"torch"},
}
"""Imports from outside that a file or a folder must do without."""


def imported(source: str) -> list[tuple[str, tuple[str, ...]]]:
    """Return every absolute module that `source` imports, with the names taken from it, if any."""
    found: list[tuple[str, tuple[str, ...]]] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [(alias.name, ()) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.append((node.module, tuple(alias.name for alias in node.names)))
    return found


def is_found(package: str, name: str) -> bool:
    """Tell whether `from package import name` takes a submodule or the version, and no name of a submodule."""
    return name == "__version__" or any((ROOT / package / f"{name}{end}").exists() for end in ("", ".py"))


def violations(path: str, source: str) -> list[str]:
    """Return what is wrong with the imports of the file at `path`, relative to the repository."""
    package = path.split("/")[0]
    forbidden = {root for prefix, roots in FORBIDDEN.items() if path.startswith(prefix) for root in roots}
    wrong = []
    for module, names in imported(source):
        root = module.split(".")[0]
        if package in ALLOWED and root in ALLOWED.keys() - ALLOWED[package] - {package}:
            wrong.append(f"{path} imports {module}; {package} may import {sorted(ALLOWED[package])}")
        if root in forbidden:
            wrong.append(f"{path} imports {module}, but must do without {root}")
        if root in ALLOWED and not names:
            wrong.append(f"{path} has `import {module}`; write `from {module} import ...`")
        if module in ALLOWED:
            wrong += [f"{path} imports {name}, no submodule, from {root}" for name in names if not is_found(root, name)]
    return wrong


def source_files() -> list[Path]:
    folders = [*ALLOWED, "tests"]
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def test_every_import_follows_the_directions():
    found = [
        line
        for path in source_files()
        for line in violations(path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8"))
    ]
    assert not found, "\n".join(found)


def test_the_files_of_every_package_are_found():
    # Without files the test above would pass on nothing.
    assert {path.relative_to(ROOT).parts[0] for path in source_files()} >= {*ALLOWED, "tests"}


@pytest.mark.parametrize(
    ("path", "source", "named"),
    [
        ("model/chat.py", "from server.app import create_app", "server.app"),
        ("model/chat.py", "def late():\n    from training.losses import loss", "training.losses"),
        ("server/app.py", "from evaluation.judges import Judge", "evaluation.judges"),
        ("training/trainer.py", "from server.settings import Settings", "server.settings"),
        ("evaluation/report.py", "from training.losses import loss", "training.losses"),
        ("server/engine/worker.py", "import fastapi", "fastapi"),
        ("server/engine/worker.py", "from pydantic.types import Json", "pydantic"),
        ("server/engine/scheduler.py", "import torch.nn", "torch"),
        ("model/policy.py", "from torch import Tensor", "torch"),
        ("model/trace.py", "import torch", "torch"),
        ("model/schedule.py", "import torch", "torch"),
        ("server/app.py", "import model", "import model"),
        ("tests/model/test_chat.py", "import model.chat as chat", "import model.chat"),
        ("server/app.py", "from model import Policy", "no submodule"),
    ],
)
def test_a_forbidden_import_is_named_with_its_file(path: str, source: str, named: str):
    (line,) = violations(path, source)
    assert line.startswith(path)
    assert named in line


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("server/app.py", "from model.policy import Policy\nimport fastapi"),
        ("server/engine/worker.py", "import torch\nfrom server.engine.sequence import Sequence"),
        ("model/policy.py", "from model.trace import Trace\nfrom dataclasses import dataclass"),
        ("server/app.py", "from .settings import Settings\nimport models_of_others"),
        ("server/app.py", "from model import __version__, checkpoint"),
    ],
)
def test_an_allowed_import_passes(path: str, source: str):
    assert violations(path, source) == []


def test_the_rules_of_acting_load_without_torch():
    # Through other modules of ours too, which the check of one file's imports cannot see.
    code = (
        "import sys; from model.policy import Policy; from model.schedule import Every; from model.trace import Trace; "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_no_folder_of_tests_is_a_package():
    # tests/model/__init__.py would shadow the package `model`.
    assert list((ROOT / "tests").rglob("__init__.py")) == []
