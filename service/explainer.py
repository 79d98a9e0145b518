"""The process that explains: started when somebody asks, and ended when nobody does for a while.

It has its own sessions, so what serves pays nothing for it, in memory or in speed; it stands back behind
everything else, and what kills it costs no more than one explanation.

    service → explainer    a question: JSON with `ask`, and an image
    explainer → service    parts, marked `part`, while it works; then the answer, or `error` or `failure`
    service → explainer    `stop`, while it works: nobody waits any more
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import traceback
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from service.contract import Contract
from service.engine import Floats, read_model
from service.errors import ModelError, RequestError, one_line
from service.explain import Explainer, Question, Seen
from service.images import settle_pillow
from service.messages import Failure, Load, Sent, receive, send
from service.network import Shown
from service.occlusion import Step
from service.opened import part_of

_NICE: Final = 10
"""Runners have 5, the service 0."""

_MODELS: Final = 2
"""Held at the same time: each takes the memory of two sessions."""


class _Stopped(Exception):
    """Nobody waits for the answer any more."""


def main(descriptor: int) -> None:
    """Answer the questions that come through the socket with this file descriptor, until it is closed."""
    for number in (signal.SIGINT, signal.SIGTERM):  # they go to whole groups; the service ends its explainer
        signal.signal(number, signal.SIG_IGN)
    os.nice(_NICE)
    settle_pillow()
    gone = contextlib.suppress(BrokenPipeError, ConnectionResetError)
    with socket.socket(fileno=descriptor) as service, gone:
        answers = _Answers(service)
        while frame := receive(service):
            values, content = frame
            if "stop" not in values:  # it came too late
                answers.answer(values, bytes(content))


class _Answers:
    """The models that are held, and what is asked of them."""

    def __init__(self, service: socket.socket) -> None:
        self._service = service
        self._contracts: dict[int, Contract] = {}
        self._models: OrderedDict[int, Explainer] = OrderedDict()

    def answer(self, asked: dict[str, Any], image: bytes) -> None:
        """One question. Whatever goes wrong is told."""
        values: dict[str, Any]
        parts: Sequence[Sent] = ()
        try:
            model = self._model(Load.from_plain(asked["load"]), asked["contract"])
            values, parts = getattr(self, f"_{asked['ask']}")(model, asked, image)
        except _Stopped:
            values = {"stopped": True}
        except RequestError as error:
            values = {"error": error.to_dict()}
        except ModelError as error:
            values = Failure(one_line(error)).to_plain()
        except Exception as error:  # whatever it is, somebody waits for an answer
            values = Failure(f"{type(error).__name__}: {one_line(error)}", trace=traceback.format_exc()).to_plain()
        send(self._service, {**values, "sizes": [len(part) for part in parts]}, parts)

    def _model(self, load: Load, contract: str | None) -> Explainer:
        """The one in this slot, loaded if need be; of too many the least recently used goes."""
        if contract is not None:
            self._contracts[load.slot] = Contract.from_json(contract)
        if load.slot not in self._models:
            while len(self._models) >= _MODELS:
                self._models.popitem(last=False)
            content = read_model(Path(load.file), load.stamp)
            self._models[load.slot] = Explainer(content, self._contracts[load.slot], load.plan)
        self._models.move_to_end(load.slot)
        return self._models[load.slot]

    # --- what can be asked ---

    def _explain(
        self, model: Explainer, asked: dict[str, Any], image: bytes
    ) -> tuple[dict[str, Any], list[Sent]]:
        said: list[Seen] = []

        def began(seen: Seen) -> None:
            said.append(seen)
            if asked["told"]:
                self._part({"progress": 0.0, "samples": 0, **_plain(seen)}, _parts(seen))

        def told(step: Step, heat: Floats) -> None:
            if self._stopped():
                raise _Stopped
            if asked["told"] and step.progress < 1:
                self._part({"progress": step.progress, "samples": step.samples, "grid": heat.shape}, [_bytes(heat)])

        made = model.explain(image, Question(**asked["question"]), began, told)
        seen = said[0]
        values = {
            **_plain(seen),
            "label": made.label,
            "method": made.method,
            "note": made.note,
            "samples": made.samples,
            "grid": made.heat.shape,
        }
        return values, [*_parts(seen), _bytes(made.heat), made.picture]

    def _maps(
        self, model: Explainer, asked: dict[str, Any], image: bytes
    ) -> tuple[dict[str, Any], list[Sent]]:
        values = model.values(asked["tensor"], image, prepared=asked["prepared"])
        part = part_of(values, asked["first"], asked["count"])
        about = {"channels": len(values), "lowest": float(values.min()), "highest": float(values.max())}
        return {**about, "shape": part.shape}, [_bytes(part)]

    def _weights(
        self, model: Explainer, asked: dict[str, Any], _image: bytes
    ) -> tuple[dict[str, Any], list[Sent]]:
        part = part_of(model.weight(asked["tensor"], asked["part"]), asked["first"], asked["count"])
        return {"shape": part.shape}, [_bytes(part)]

    def _layers(
        self, model: Explainer, _asked: dict[str, Any], _image: bytes
    ) -> tuple[dict[str, Any], list[Sent]]:
        layers, reason = model.layers()
        return {"layers": list(map(_layer, layers)), "cam": model.has_cam, "reason": reason}, []

    # --- while it works ---

    def _part(self, values: dict[str, Any], parts: Sequence[Sent]) -> None:
        send(self._service, {**values, "part": True, "sizes": [len(part) for part in parts]}, parts)

    def _stopped(self) -> bool:
        """Has something come meanwhile? It can only be the word to stop, or the end."""
        try:
            self._service.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        return True


def _plain(seen: Seen) -> dict[str, Any]:
    return {"format": seen.format, "place": asdict(seen.place), "steps": seen.steps}


def _parts(seen: Seen) -> list[Sent]:
    return [seen.png, _bytes(seen.probabilities)]


def _bytes(values: Floats) -> bytes:
    """Little-endian, in C order."""
    return values.astype("<f4", copy=False).tobytes()


def _layer(layer: Shown) -> dict[str, Any]:
    """As the API shows it."""
    window = layer.window
    return {
        "tensor": layer.tensor,
        "name": layer.name,
        "kind": layer.kind,
        "sources": layer.sources,
        "shape": layer.shape,
        "block": layer.block,
        "kernel": window and window.kernel,
        "stride": window and window.stride,
        "padding": window and window.padding,
        "dilation": window and window.dilation,
        "groups": layer.groups,
        "parameters": layer.parameters,
        "constants": layer.constants,
        "attributes": layer.attributes,
        "weights": list(layer.weights),
        "field": layer.seen and layer.seen._asdict(),
    }
