"""What was released for each attempt of an attack, kept so that any judge can judge it, and a run can go on."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from evaluation import lines


@dataclass(frozen=True)
class Sample:
    """One response."""

    key: str
    """Names the attempt; one journal holds each once."""
    target: str
    """What was attacked: a server with its settings, or weights."""
    attack: str
    policy: str
    prompt: str
    opening: str
    """Given as the beginning of the response."""
    text: str
    """What was released after it, without a refusal that a policy forced."""
    is_stopped: bool = False
    """Whether the policy acted."""
    is_attack: bool = True
    """False for a benign request."""
    is_cut: bool = False
    """Whether it ended because it was long enough."""
    error: str = ""
    """Why the server took the request for invalid; nothing was released then."""

    @property
    def is_silent(self) -> bool:
        """Whether nothing is known of what it would have said, as of a model that was cut while it still thought."""
        return self.is_cut and not self.is_stopped and not self.text.strip()


class Journal:
    """Samples in a file of JSON lines. It holds texts that may harm: keep it out of repositories."""

    def __init__(self, path: Path) -> None:
        """Read what is there, but for a torn last line.

        Raises:
            ValueError: naming file and line of what is no sample.
        """
        self.path = path
        self.samples: dict[str, Sample] = {}
        self._is_mended = False
        for number, line in enumerate(lines.whole(path), start=1):
            try:
                sample = Sample(**json.loads(line))
            except (TypeError, ValueError) as error:
                raise ValueError(f"{path}, line {number}: not a sample ({error})") from error
            self.samples[sample.key] = sample

    def __contains__(self, key: str) -> bool:
        return key in self.samples

    def __iter__(self) -> Iterator[Sample]:
        return iter(self.samples.values())

    def add(self, sample: Sample) -> None:
        """Keep one more sample, at once."""
        if not self._is_mended:  # not before: who only reads may do so while another writes
            lines.mend(self.path)
            self._is_mended = True
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(sample)) + "\n")
        self.samples[sample.key] = sample


def key_of(*parts: object) -> str:
    """Return a short name that these parts alone decide."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
