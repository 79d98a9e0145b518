"""The explaining process, which starts with the first request for an explanation and ends when it is idle.

The process has its own sessions, so that explanations cost the serving processes neither memory nor speed.
It has the lowest priority, and if it is killed, only one explanation is lost. There are two such processes:
one computes heat maps, the other reads layers, so that requests for layers need not wait for the end of an
occlusion.

    service → process    a request: JSON with its `number`, its kind in `ask`, and an image
    process → service    partial replies, marked `part`; then the final reply, or `error` or `failure`
    service → process    `stop` and the request's number, if the caller has left before the final reply

Every reply repeats the number of its request. A message that is neither a request nor a `stop` ends the
process: the stream is out of step, and no later reply could be trusted.
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
from fovea.service.errors import ModelError, NotFound, RequestError, to_one_line
from fovea.service.explain.explainer import Explainer, ExplanationRequest, SeenInput
from fovea.service.explain.introspection import IntrospectedModel, slice_rows
from fovea.service.explain.layer_view import LayerView
from fovea.service.explain.layers import describe_layers
from fovea.service.explain.occlusion import OcclusionStep
from fovea.service.inference.engine import Floats
from fovea.service.inference.preprocess import configure_pillow
from fovea.service.inference.session import read_model
from fovea.service.runners.frames import receive_message, send_message
from fovea.service.runners.load_messages import MAX_EXPLAINER_MODELS, Failure, LoadCommand

_NICE: Final = 19
"""Niceness, the highest there is; runners have 5. Four callers on two processors got 295 requests per second
beside an occlusion with niceness 10, 627 with 19, and 745 without an occlusion."""

_Reply: TypeAlias = tuple[dict[str, Any], bytes]
"""JSON values and binary content of a reply."""


class _StopRequested(Exception):
    """The caller no longer waits for the answer."""


def main(descriptor: int) -> None:
    """Answer requests from the socket with this file descriptor until the socket is closed.

    The process has one thread, which answers one request after another. `ExplainerClient` in the service
    sends the next request only after the final reply to the request before.
    """
    # Signals go to the whole process group; the service ends this process itself.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    os.nice(_NICE)
    with contextlib.suppress(OSError):  # when memory runs out, the system kills this process first
        Path("/proc/self/oom_score_adj").write_text("1000")
    configure_pillow()
    disconnects = contextlib.suppress(BrokenPipeError, ConnectionResetError)
    with socket.socket(fileno=descriptor) as service, disconnects:
        handler = _RequestHandler(service)
        while frame := receive_message(service):
            values, content = frame
            if "stop" not in values:  # a `stop` that arrives here crossed the final reply
                handler.handle_request(values, bytes(content))
            elif content:
                raise ValueError(f"a `stop` message has {len(content)} bytes of content; it must have none")


class _RequestHandler:
    """The loaded models, and the replies to requests about them."""

    def __init__(self, service: socket.socket) -> None:
        self._service = service
        self._request_number = 0
        """Number of the request that is being answered."""
        self._contracts: dict[int, Contract] = {}
        self._models: OrderedDict[int, Explainer | IntrospectedModel | ModelError] = OrderedDict()

    def handle_request(self, request: dict[str, Any], image: bytes) -> None:
        """Answer one request, and send any error as the reply.

        Raises `KeyError` if the message is not a request.
        """
        self._request_number = request["number"]
        values: dict[str, Any]
        content = b""
        try:
            load = LoadCommand.from_dict(request["load"])
            # The service sends a contract only with the first request for a model, and counts like
            # `_get_model` which models were dropped since.
            if request["contract"] is not None:
                self._contracts[load.model_id] = Contract.from_json(request["contract"])
            values, content = getattr(self, f"_{request['ask']}")(load, request, image)
        except _StopRequested:
            values = {"stopped": True}
        except RequestError as error:
            values = {"error": error.to_dict()}
        except ModelError as error:
            values = Failure(to_one_line(error)).to_dict()
        except Exception as error:  # the service waits for a reply, whatever the error is
            reason = f"{type(error).__name__}: {to_one_line(error)}"
            values = Failure(reason, trace=traceback.format_exc()).to_dict()
        send_message(self._service, {**values, "number": self._request_number}, [content])

    def _load_explainer(self, load: LoadCommand) -> Explainer:
        """Return the explainer of this model, and load the model if necessary."""
        model = self._get_model(load, lambda content, contract: Explainer(content, contract, load.plan))
        if not isinstance(model, Explainer):
            raise TypeError("this process reads layers; the other explaining process computes heat maps")
        return model

    def _load_introspected(self, load: LoadCommand) -> IntrospectedModel | ModelError:
        """Return the introspected model, or the reason why its graph cannot be opened."""

        def open_model(content: bytes, contract: Contract) -> IntrospectedModel | ModelError:
            try:
                return IntrospectedModel(content, contract, load.plan)
            except Exception as error:  # a foreign graph may cause any exception
                return ModelError(to_one_line(error))

        model = self._get_model(load, open_model)
        if isinstance(model, Explainer):
            raise TypeError("this process computes heat maps; the other explaining process reads layers")
        return model

    def _require_introspected(self, load: LoadCommand) -> IntrospectedModel:
        model = self._load_introspected(load)
        if isinstance(model, ModelError):
            raise NotFound(f"the layers of this model cannot be read: {model}")
        return model

    def _get_model(
        self,
        load: LoadCommand,
        create_model: Callable[[bytes, Contract], Explainer | IntrospectedModel | ModelError],
    ) -> Explainer | IntrospectedModel | ModelError:
        """Return the model, and load it if necessary.

        If too many models are loaded, the least recently used model is dropped.
        """
        if load.model_id not in self._models:
            while len(self._models) >= MAX_EXPLAINER_MODELS:
                del self._contracts[self._models.popitem(last=False)[0]]
            content = read_model(Path(load.file), load.fingerprint)
            self._models[load.model_id] = create_model(content, self._contracts[load.model_id])
        self._models.move_to_end(load.model_id)
        return self._models[load.model_id]

    # --- requests: `ask` names the method ---

    def _explain(self, load: LoadCommand, request: dict[str, Any], image: bytes) -> _Reply:
        input_values: list[dict[str, Any]] = []

        # `Explainer.explain` calls both functions on this thread, between two model calls. Partial replies
        # are therefore never sent while the final reply is written.
        def on_start(seen_input: SeenInput) -> None:
            input_values.append(_render_seen_input(seen_input))
            if request["has_progress"]:
                self._send_part({"progress": 0.0, "samples": 0, "heatmap": None, **input_values[0]})

        def on_step(step: OcclusionStep, compute_heatmap: Callable[[], Floats]) -> None:
            if self._is_stopped():
                raise _StopRequested
            if not request["has_progress"]:
                # An empty partial reply shows the service that this process is alive.
                self._send_part({})
            elif step.progress < 1:
                self._send_part(
                    {
                        "progress": step.progress,
                        "samples": step.samples,
                        "heatmap": _render_heatmap(compute_heatmap()),
                    }
                )

        explanation = self._load_explainer(load).explain(
            image, ExplanationRequest(**request["question"]), on_start, on_step
        )
        values = {
            **input_values[0],
            "label": explanation.label,
            "method": explanation.method,
            "samples": explanation.samples,
            "note": explanation.note,
            "heatmap": _render_heatmap(explanation.heatmap),
        }
        return values, explanation.picture

    def _maps(self, load: LoadCommand, request: dict[str, Any], image: bytes) -> _Reply:
        model = self._require_introspected(load)
        values = model.compute_output(
            request["tensor"], model.decode_image(image, is_prepared=request["prepared"])
        )
        finite_values = values[np.isfinite(values)]
        lowest, highest = (finite_values.min(), finite_values.max()) if finite_values.size else (0.0, 0.0)
        summary = {"channels": len(values), "lowest": float(lowest), "highest": float(highest)}
        return summary, _encode_npy(slice_rows(values, request["first"], request["count"]))

    def _weights(self, load: LoadCommand, request: dict[str, Any], _image: bytes) -> _Reply:
        values = self._require_introspected(load).read_weights(request["tensor"], request["part"])
        return {"channels": len(values)}, _encode_npy(slice_rows(values, request["first"], request["count"]))

    def _layers(self, load: LoadCommand, _request: dict[str, Any], _image: bytes) -> _Reply:
        model = self._load_introspected(load)
        if isinstance(model, IntrospectedModel):
            layers, reason, cam = model.layers, None, model.has_cam
        else:
            layers, reason, cam = _describe_contract(self._contracts[load.model_id]), str(model), False
        return {"layers": list(map(_render_layer, layers)), "cam": cam, "reason": reason}, b""

    # --- messages during a request ---

    def _send_part(self, values: dict[str, Any]) -> None:
        send_message(self._service, {**values, "number": self._request_number, "part": True})

    def _is_stopped(self) -> bool:
        """Return True if a message has arrived, which can only be `stop` or the end of the stream."""
        # The message stays in the socket (MSG_PEEK): `main` reads it after the final reply.
        try:
            self._service.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        return True


def _render_seen_input(seen_input: SeenInput) -> dict[str, Any]:
    """Return the model's input in the API's form, without the labels, which the service adds."""
    height, width = seen_input.region.input_size
    return {
        "probabilities": seen_input.probabilities.tolist(),
        "image": {
            "format": seen_input.format,
            "width": seen_input.region.photo_size[0],
            "height": seen_input.region.photo_size[1],
        },
        "warnings": [list(warning) for warning in seen_input.warnings],
        "what_the_model_saw": {
            "width": width,
            "height": height,
            "png": base64.b64encode(seen_input.png).decode(),
            "box": seen_input.region.box,
            "steps": [{"step": step, "text": text} for step, text in seen_input.steps],
        },
    }


def _render_heatmap(heatmap: Floats) -> dict[str, Any]:
    """Return a heat map with four digits, which is more than a screen can show."""
    rows = np.round(heatmap.astype(np.float64), 4).tolist()
    return {"height": len(rows), "width": len(rows[0]), "values": rows}


def _encode_npy(values: Floats) -> bytes:
    """Return the values in NumPy's file format, little-endian, in C order."""
    content = BytesIO()
    np.save(content, np.ascontiguousarray(values, "<f4"))
    return content.getvalue()


def _describe_contract(contract: Contract) -> list[LayerView]:
    """Return the layers as the layer table describes them, or none if the table is invalid."""
    try:
        return describe_layers(contract, {}, {})
    except Exception:  # a foreign table may cause any exception
        return []


def _render_layer(layer: LayerView) -> dict[str, Any]:
    """Return a layer in the API's form."""
    window = layer.window
    return {
        "tensor": layer.tensor,
        "name": layer.name,
        "kind": layer.kind,
        "sources": layer.sources,
        "shape": layer.shape,
        "left_out": layer.layout.leading_tokens if layer.layout else 0,
        "direct": layer.is_direct,
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
        "field": layer.receptive_field
        and {axis: list(span) for axis, span in layer.receptive_field._asdict().items()},
    }
