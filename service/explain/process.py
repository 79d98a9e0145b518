"""The explaining process, which starts when somebody asks a question and ends when it is idle.

It has its own sessions, so that explanations cost the serving processes neither memory nor speed. It has the
lowest priority, and if it is killed, only one explanation is lost. There are two such processes: one computes
heat maps, the other has models opened, so that requests for layers need not wait for the end of an occlusion.

    service → explainer    a question: JSON with `ask` and its `number`, and an image
    explainer → service    parts, marked `part`, while it works; then the answer, or `error` or `failure`
    service → explainer    `stop` and the question's number, while it works: nobody waits any more

Every message of the process repeats the number of the question. A message that is neither a question nor a
`stop` ends the process: the stream is out of step, and no later answer could be trusted.
"""

from __future__ import annotations

import base64
import contextlib
import os
import signal
import socket
import traceback
from collections import OrderedDict
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any, Final, TypeAlias

import numpy as np

from fovea.service.artifact.contract import Contract
from fovea.service.errors import ModelError, NotFound, RequestError, one_line
from fovea.service.explain.explainer import Explainer, Question, Seen
from fovea.service.explain.introspection import Opened, part_of
from fovea.service.explain.layers import Shown, describe
from fovea.service.explain.occlusion import Step
from fovea.service.inference.engine import Floats, read_model
from fovea.service.inference.preprocess import configure_pillow
from fovea.service.runners.messages import (
    MAX_EXPLAINER_MODELS,
    Failure,
    LoadCommand,
    receive_message,
    send_message,
)

_NICE: Final = 19
"""Niceness, the highest there is; runners have 5. Four callers on two processors got 295 requests per second
beside an occlusion with niceness 10, 627 with 19, and 745 without an occlusion."""

_Reply: TypeAlias = tuple[dict[str, Any], bytes]
"""JSON values and binary content of a reply."""


class _Stopped(Exception):
    """The caller no longer waits for the answer."""


def main(descriptor: int) -> None:
    """Answer questions from the socket with this file descriptor until the socket is closed."""
    # Signals go to the whole process group; the service ends this process itself.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    os.nice(_NICE)
    with contextlib.suppress(OSError):  # when memory runs out, the system kills this process first
        Path("/proc/self/oom_score_adj").write_text("1000")
    configure_pillow()
    gone = contextlib.suppress(BrokenPipeError, ConnectionResetError)
    with socket.socket(fileno=descriptor) as service, gone:
        answers = _Answers(service)
        while frame := receive_message(service):
            values, content = frame
            if "stop" not in values:  # a `stop` here came after the answer was sent
                answers.answer(values, bytes(content))
            elif content:
                raise ValueError("a `stop` has no content")


class _Answers:
    """The loaded models, and the answers to questions about them."""

    def __init__(self, service: socket.socket) -> None:
        self._service = service
        self._number = 0
        """Number of the question that is being answered."""
        self._contracts: dict[int, Contract] = {}
        self._held: OrderedDict[int, Explainer | Opened | ModelError] = OrderedDict()

    def answer(self, asked: dict[str, Any], image: bytes) -> None:
        """Answer one question, and send any error as the reply.

        Raises `KeyError` if the message is not a question.
        """
        self._number = asked["number"]
        values: dict[str, Any]
        content = b""
        try:
            load = LoadCommand.from_dict(asked["load"])
            if asked["contract"] is not None:
                self._contracts[load.model_id] = Contract.from_json(asked["contract"])
            values, content = getattr(self, f"_{asked['ask']}")(load, asked, image)
        except _Stopped:
            values = {"stopped": True}
        except RequestError as error:
            values = {"error": error.to_dict()}
        except ModelError as error:
            values = Failure(one_line(error)).to_dict()
        except Exception as error:  # the service waits for a reply, whatever the error is
            reason = f"{type(error).__name__}: {one_line(error)}"
            values = Failure(reason, trace=traceback.format_exc()).to_dict()
        send_message(self._service, {**values, "number": self._number}, [content])

    def _explainer(self, load: LoadCommand) -> Explainer:
        """Return the explainer for heat maps in this slot, and load the model if necessary."""
        held = self._model(load, lambda content, contract: Explainer(content, contract, load.plan))
        if not isinstance(held, Explainer):
            raise TypeError("this process opens models, and does not explain them")
        return held

    def _opened(self, load: LoadCommand) -> Opened | ModelError:
        """Return the opened model in this slot, or the reason why it cannot be opened."""

        def open_(content: bytes, contract: Contract) -> Opened | ModelError:
            try:
                return Opened(content, contract, load.plan)
            except Exception as error:  # anybody may have written the graph
                return ModelError(one_line(error))

        held = self._model(load, open_)
        if isinstance(held, Explainer):
            raise TypeError("this process explains models, and does not open them")
        return held

    def _require_opened(self, load: LoadCommand) -> Opened:
        opened = self._opened(load)
        if isinstance(opened, ModelError):
            raise NotFound(f"the graph cannot be looked into: {opened}")
        return opened

    def _model(
        self, load: LoadCommand, make: Callable[[bytes, Contract], Explainer | Opened | ModelError]
    ) -> Explainer | Opened | ModelError:
        """Return the model in this slot; if too many are loaded, the least recently used one is dropped."""
        if load.model_id not in self._held:
            while len(self._held) >= MAX_EXPLAINER_MODELS:
                del self._contracts[self._held.popitem(last=False)[0]]
            content = read_model(Path(load.file), load.fingerprint)
            self._held[load.model_id] = make(content, self._contracts[load.model_id])
        self._held.move_to_end(load.model_id)
        return self._held[load.model_id]

    # --- questions ---

    def _explain(self, load: LoadCommand, asked: dict[str, Any], image: bytes) -> _Reply:
        said: list[dict[str, Any]] = []

        def began(seen: Seen) -> None:
            said.append(_seen(seen))
            if asked["told"]:
                self._part({"progress": 0.0, "samples": 0, "heatmap": None, **said[0]})

        def told(step: Step, heat: Callable[[], Floats]) -> None:
            if self._stopped():
                raise _Stopped
            if not asked["told"]:
                self._part({})  # an empty message shows the service that this process is alive
            elif step.progress < 1:
                self._part({"progress": step.progress, "samples": step.samples, "heatmap": _heatmap(heat())})

        made = self._explainer(load).explain(image, Question(**asked["question"]), began, told)
        values = {
            **said[0],
            "label": made.label,
            "method": made.method,
            "samples": made.samples,
            "note": made.note,
            "heatmap": _heatmap(made.heat),
        }
        return values, made.picture

    def _maps(self, load: LoadCommand, asked: dict[str, Any], image: bytes) -> _Reply:
        opened = self._require_opened(load)
        values = opened.values(asked["tensor"], opened.see(image, prepared=asked["prepared"]))
        finite = values[np.isfinite(values)]
        lowest, highest = (finite.min(), finite.max()) if finite.size else (0.0, 0.0)
        about = {"channels": len(values), "lowest": float(lowest), "highest": float(highest)}
        return about, _npy(part_of(values, asked["first"], asked["count"]))

    def _weights(self, load: LoadCommand, asked: dict[str, Any], _image: bytes) -> _Reply:
        values = self._require_opened(load).weight(asked["tensor"], asked["part"])
        return {"channels": len(values)}, _npy(part_of(values, asked["first"], asked["count"]))

    def _layers(self, load: LoadCommand, _asked: dict[str, Any], _image: bytes) -> _Reply:
        opened = self._opened(load)
        if isinstance(opened, Opened):
            layers, reason, cam = opened.layers, None, opened.has_cam
        else:
            layers, reason, cam = _told_alone(self._contracts[load.model_id]), str(opened), False
        return {"layers": list(map(_layer, layers)), "cam": cam, "reason": reason}, b""

    # --- messages during the work ---

    def _part(self, values: dict[str, Any]) -> None:
        send_message(self._service, {**values, "number": self._number, "part": True})

    def _stopped(self) -> bool:
        """Return True if a message has arrived, which can only be `stop` or the end of the stream."""
        # The message stays in the socket (MSG_PEEK): `main` reads it after the answer.
        try:
            self._service.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        return True


def _seen(seen: Seen) -> dict[str, Any]:
    """Return the model's input in the API's form, without the labels, which the service adds."""
    height, width = seen.place.seen
    return {
        "probabilities": seen.probabilities.tolist(),
        "image": {"format": seen.format, "width": seen.place.size[0], "height": seen.place.size[1]},
        "warnings": [list(warning) for warning in seen.warnings],
        "what_the_model_saw": {
            "width": width,
            "height": height,
            "png": base64.b64encode(seen.png).decode(),
            "box": seen.place.box,
            "steps": [{"step": step, "text": text} for step, text in seen.steps],
        },
    }


def _heatmap(heat: Floats) -> dict[str, Any]:
    """Return a heat map with four digits, which is more than a screen can show."""
    rows = np.round(heat.astype(np.float64), 4).tolist()
    return {"height": len(rows), "width": len(rows[0]), "values": rows}


def _npy(values: Floats) -> bytes:
    """Return the values in NumPy's file format, little-endian, in C order."""
    content = BytesIO()
    np.save(content, np.ascontiguousarray(values, "<f4"))
    return content.getvalue()


def _told_alone(contract: Contract) -> list[Shown]:
    """Return the layers according to the layer table alone, or none if the table is invalid."""
    try:
        return describe(contract, {}, {})
    except Exception:  # anybody may have written the table
        return []


def _layer(layer: Shown) -> dict[str, Any]:
    """Return a layer in the API's form."""
    window = layer.window
    return {
        "tensor": layer.tensor,
        "name": layer.name,
        "kind": layer.kind,
        "sources": layer.sources,
        "shape": layer.shape,
        "left_out": layer.arrangement.leading if layer.arrangement else 0,
        "direct": layer.direct,
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
        "field": layer.seen and {axis: list(span) for axis, span in layer.seen._asdict().items()},
    }
