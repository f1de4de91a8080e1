"""Decoder layers on a CPU whose compiled code is noted in one pass, and played in later ones of as many rows.

What a layer computes is a few dozen calls of compiled code. With a row or a few, finding out what to call next takes
longer than the calls: the checks before compiled code, and the Python that it is called from.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from server.engine.tape import Tape, noting


class TapedPass:
    """All layers of one pass."""

    def __init__(self) -> None:
        self.tape = Tape()
        self.inputs: list[Tensor] = []
        """What the first layer reads: hidden states and whatever else, such as the angles of positions."""
        self.outputs: list[Any] = []
        """Of every layer."""

    @property
    def states(self) -> list[Tensor]:
        """What the first layer reads, and what each layer gives, (1, R, D) each."""
        return [self.inputs[0], *(_tensors([output])[0] for output in self.outputs)]


class TapedLayers:
    """The layers of a model, which run as they are but in passes that were noted.

    Args:
        model: the model.
        layers: compiled, in the order in which they run; their `forward` is changed.

    Raises:
        ValueError: if the model has no output layer.
    """

    def __init__(self, model: PreTrainedModel, layers: Sequence[nn.Module]) -> None:
        output = model.get_output_embeddings()  # type: ignore[no-untyped-call]  # untyped there
        if output is None:
            raise ValueError("the model has no output layer")
        self.last = torch.empty(0)
        """The final states of the newest pass, (1, R, D): what the output layer read."""
        self._were = [(layer, layer.forward) for layer in layers]
        self._hook = output.register_forward_pre_hook(self._see_last)
        self._noted: TapedPass | None = None
        self._played: TapedPass | None = None
        self._stand_ins: dict[int, Tensor] = {}
        for number, layer in enumerate(layers):
            layer.forward = partial(self._forward, number, layer.forward)

    def close(self) -> None:
        """Have the layers run as they did before."""
        self._hook.remove()
        for layer, forward in self._were:
            layer.forward = forward

    def note(self, run: Callable[[], object]) -> TapedPass:
        """Note what the layers compute while the model runs once, with tensors that take the place of theirs.

        Raises:
            ValueError: if it cannot be played, as far as can be told without trying.
        """
        self._noted, self._stand_ins = TapedPass(), {}
        try:
            run()
            return self._noted
        finally:
            self._noted, self._stand_ins = None, {}

    @contextmanager
    def playing(self, noted: TapedPass) -> Iterator[None]:
        """Play a pass in the place of layers that read as many rows."""
        self._played = noted
        try:
            yield
        finally:
            self._played = None

    def _see_last(self, _: nn.Module, args: tuple[Any, ...]) -> None:
        self.last = args[0]

    def _forward(self, number: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run one layer, or play all of them when the first is asked."""
        if (noted := self._noted) is not None:
            return self._note(noted, number, forward, args, kwargs)
        if (played := self._played) is None:
            return forward(*args, **kwargs)
        if number == 0:
            for stands_in, given in zip(played.inputs, _tensors([*args, *kwargs.values()]), strict=True):
                stands_in.copy_(given)
            played.tape.play()
        return played.outputs[number]

    def _note(
        self, noted: TapedPass, number: int, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        given = _tensors([*args, *kwargs.values()])
        if number == 0:
            noted.inputs = [tensor.clone() for tensor in given]
            self._stand_ins = {id(tensor): stand_in for tensor, stand_in in zip(given, noted.inputs, strict=True)}
            noted.tape.kept += given  # so that nothing else gets their ids
        else:
            (before,) = _tensors([noted.outputs[-1]])
            if not args or args[0].data_ptr() != before.data_ptr() or args[0].shape != before.shape:
                raise ValueError(f"layer {number} does not read what the one before it gives")
            self._stand_ins[id(args[0])] = before
        if missing := [tensor.shape for tensor in given if id(tensor) not in self._stand_ins]:
            raise ValueError(f"layer {number} reads what the first does not: {missing}")
        with noting(noted.tape):
            output = forward(*_replaced(args, self._stand_ins), **_replaced(kwargs, self._stand_ins))
        noted.outputs.append(output)
        noted.tape.kept += _tensors([output])
        return output


def _tensors(values: Sequence[Any]) -> list[Tensor]:
    """Return the tensors among some values, those in tuples too."""
    found = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, tuple):
            found += _tensors(value)
    return found


def _replaced(value: Any, stand_ins: dict[int, Tensor]) -> Any:
    """Return a value with other tensors in it."""
    if isinstance(value, Tensor):
        return stand_ins[id(value)]
    if isinstance(value, tuple):
        return tuple(_replaced(one, stand_ins) for one in value)
    if isinstance(value, dict):
        return {name: _replaced(one, stand_ins) for name, one in value.items()}
    return value
