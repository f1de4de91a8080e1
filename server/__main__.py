"""`ballast-serve`: read the settings, load the model, serve."""

import os
import sys
from collections.abc import Sequence
from functools import partial

from server import flags, log, settings
from server.settings import ConfigurationError, Settings

WRONG_SETTINGS = 2
FAILED = 1
SPINS = "20000"
"""How often a thread of GNU OpenMP that waits for others looks again before it sleeps: enough from one operation to the
next, too few from one step to the next. The default, hundreds of thousands, takes the cores from the threads that talk
HTTP; with a twentieth of this, threads sleep within a step (docs/experiments.md)."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until stopped; return the exit code."""
    try:
        given, file = flags.parse(sys.argv[1:] if arguments is None else arguments)
        chosen = settings.load(given, file)
    except ConfigurationError as error:
        return _fail(str(error), WRONG_SETTINGS)
    return serve(chosen)


def serve(chosen: Settings) -> int:
    """Serve with these settings until stopped; return the exit code."""
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)  # read once, when torch is imported

    from transformers.utils.logging import disable_progress_bar

    from server.engine.local import LocalEngine
    from server.engine.paged import paged  # here, so that --help need not wait for torch
    from server.loading import load_model
    from server.process import Process, listen

    log.configure(chosen)
    disable_progress_bar()  # type: ignore[no-untyped-call]  # untyped there
    try:
        listener = listen(chosen)
    except OSError as error:
        return _fail(f"cannot listen on {chosen.host}:{chosen.port}: {error.strerror}; see --host and --port", FAILED)
    num_bytes = None if chosen.kv_cache_mib is None else chosen.kv_cache_mib << 20
    engine = LocalEngine(
        partial(load_model, chosen),
        seat=partial(paged, num_bytes=num_bytes, compiles=chosen.compile, is_int8=chosen.dtype == "int8"),
        max_running=chosen.max_running,
        max_waiting=chosen.max_waiting,
    )
    process = Process(chosen, engine)
    process.serve_at(listener)
    if process.failure is not None:
        return _fail(str(process.failure), FAILED)
    return 0


def _fail(message: str, code: int) -> int:
    sys.stderr.write(f"ballast-serve: {message}\n")
    return code


if __name__ == "__main__":
    sys.exit(main())
