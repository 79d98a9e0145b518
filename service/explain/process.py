"""The explaining process, which starts with the first request for an explanation and ends when it is idle.

The process has its own sessions, so that explanations cost the serving processes neither memory nor speed.
It has the lowest priority, and if it is killed, only one explanation is lost. There are two such processes:
one computes heat maps, the other reads layers, so that requests for layers need not wait for the end of an
occlusion.

`service.explain.messages` holds the messages. A message that is neither a request nor a `StopCommand` ends
the process: the stream is out of step, and no later reply could be trusted.
"""

from __future__ import annotations

import contextlib
import socket
from collections import OrderedDict
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Final, TypeAlias

import numpy as np

from fovea.service.artifact.contract import Contract
from fovea.service.errors import ModelError, NotFound, RequestError, to_one_line
from fovea.service.explain.explainer import Explainer
from fovea.service.explain.introspection import (
    IntrospectedModel,
    compute_strengths,
    select_rows,
    slice_rows,
)
from fovea.service.explain.layer_view import LayerView
from fovea.service.explain.layers import describe_layers
from fovea.service.explain.messages import (
    ContentPart,
    ExplainerReply,
    ExplainerRequest,
    ExplanationRequest,
    HeatmapProgress,
    HeatmapResult,
    HeatmapValues,
    LayerDescription,
    LayersQuestion,
    LayersResult,
    MapsQuestion,
    MapsResult,
    ModelInput,
    Refusal,
    StopCommand,
    WeightsQuestion,
    WeightsResult,
)
from fovea.service.explain.occlusion import OcclusionStep
from fovea.service.inference.engine import Floats
from fovea.service.inference.preprocess import configure_pillow
from fovea.service.inference.session import read_model
from fovea.service.runners.child_process import prepare_child
from fovea.service.runners.frames import MAX_PIECE_BYTES, FrameError, receive_frame
from fovea.service.runners.load_messages import MAX_EXPLAINER_MODELS, LoadCommand
from fovea.service.runners.messages import Failure, NumberedMessage

_NICE: Final = 19
"""Niceness, the highest there is; runners have 5. Four callers on two processors got 295 requests per second
beside an occlusion with niceness 10, 627 with 19, and 745 without an occlusion."""

_Answer: TypeAlias = tuple[HeatmapResult | MapsResult | WeightsResult | LayersResult, bytes]
"""Result and content of a reply."""


class _StopRequested(Exception):
    """The caller no longer waits for the answer."""


def main(descriptor: int) -> None:
    """Answer requests from the socket with this file descriptor until the socket is closed.

    The process has one thread, which answers one request after another. `ExplainerClient` in the service
    sends the next request only after the final reply to the request before.
    """
    prepare_child(_NICE, is_expendable=True)
    configure_pillow()
    disconnects = contextlib.suppress(BrokenPipeError, ConnectionResetError)
    with socket.socket(fileno=descriptor) as service, disconnects:
        handler = _RequestHandler(service)
        while frame := receive_frame(service):
            if frame.kind == StopCommand.__name__:
                StopCommand.from_frame(frame)  # it crossed the final reply
                if frame.content:
                    raise FrameError("sent a StopCommand with content")
            else:
                handler.handle_request(ExplainerRequest.from_frame(frame), bytes(frame.content))


class _RequestHandler:
    """The loaded models, and the replies to requests about them."""

    def __init__(self, service: socket.socket) -> None:
        self._service = service
        self._request_number = 0
        """Number of the request that is being answered."""
        self._contracts: dict[int, Contract] = {}
        self._models: OrderedDict[int, Explainer | IntrospectedModel | ModelError] = OrderedDict()

    def handle_request(self, request: ExplainerRequest, image: bytes) -> None:
        """Answer one request, and send any error as the reply."""
        number = self._request_number = request.number
        reply: ExplainerReply | Refusal | Failure
        try:
            # The service sends a contract only with the first request for a model, and counts like
            # `_get_model` which models were dropped since.
            if request.contract_json is not None:
                self._contracts[request.load.model_id] = Contract.from_json(request.contract_json)
            result, content = self._answer(request, image)
            for start in range(0, len(content), MAX_PIECE_BYTES):
                self._send(ContentPart(number), content[start : start + MAX_PIECE_BYTES])
            reply = ExplainerReply(number, result, len(content))
        except _StopRequested:
            reply = ExplainerReply(number, None, 0)
        except RequestError as error:
            reply = Refusal(number, error.code, str(error))
        except ModelError as error:
            reply = Failure.from_model_error(number, error)
        except OSError:
            raise
        except Exception as error:  # the service waits for a reply, whatever the error is
            reply = Failure.from_bug(number, error)
        self._send(reply)

    def _answer(self, request: ExplainerRequest, image: bytes) -> _Answer:
        load = request.load
        match request.question:
            case ExplanationRequest() as question:
                return self._explain(load, question, image)
            case MapsQuestion() as question:
                return self._compute_maps(load, question, image)
            case WeightsQuestion() as question:
                return self._read_weights(load, question)
            case LayersQuestion():
                return self._list_layers(load)

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

    # --- questions ---

    def _explain(self, load: LoadCommand, question: ExplanationRequest, image: bytes) -> _Answer:
        inputs: list[ModelInput] = []

        # `Explainer.explain` calls both functions on this thread, between two model calls. Partial replies
        # are therefore never sent while the final reply is written.
        def on_start(model_input: ModelInput) -> None:
            inputs.append(model_input)
            if question.has_progress:
                self._send(HeatmapProgress(self._request_number, 0.0, 0, None, model_input))

        def on_step(step: OcclusionStep, compute_heatmap: Callable[[], Floats]) -> None:
            if self._is_stopped():
                raise _StopRequested
            # Without a heat map too, the message shows the service that this process is alive.
            heatmap = None
            if question.has_progress:
                if step.progress >= 1:  # the final reply follows
                    return
                heatmap = _render_heatmap(compute_heatmap())
            self._send(HeatmapProgress(self._request_number, step.progress, step.samples, heatmap, None))

        explanation = self._load_explainer(load).explain(image, question, on_start, on_step)
        result = HeatmapResult(
            inputs[0],
            explanation.label,
            explanation.method,
            explanation.samples,
            explanation.note,
            _render_heatmap(explanation.heatmap),
        )
        return result, explanation.picture

    def _compute_maps(self, load: LoadCommand, question: MapsQuestion, image: bytes) -> _Answer:
        model = self._require_introspected(load)
        values = model.compute_output(
            question.tensor, model.decode_image(image, is_prepared=question.prepared)
        )
        finite_values = values[np.isfinite(values)]
        lowest, highest = (finite_values.min(), finite_values.max()) if finite_values.size else (0.0, 0.0)
        result = MapsResult(len(values), float(lowest), float(highest))
        rows = compute_strengths(values) if question.strength else values
        if question.indices:
            return result, _encode_npy(select_rows(rows, question.indices))
        return result, _encode_npy(slice_rows(rows, question.first, question.count))

    def _read_weights(self, load: LoadCommand, question: WeightsQuestion) -> _Answer:
        values = self._require_introspected(load).read_weights(question.tensor, question.part)
        return WeightsResult(len(values)), _encode_npy(slice_rows(values, question.first, question.count))

    def _list_layers(self, load: LoadCommand) -> _Answer:
        model = self._load_introspected(load)
        if isinstance(model, IntrospectedModel):
            layers, reason, cam = model.layers, None, model.has_cam
        else:
            layers, reason, cam = _describe_contract(self._contracts[load.model_id]), str(model), False
        return LayersResult(list(map(_render_layer, layers)), cam, reason), b""

    # --- messages during a request ---

    def _send(self, message: NumberedMessage, content: bytes = b"") -> None:
        """Write a message as a whole. This process has one thread, which is the only writer."""
        for piece in message.to_pieces([content]):
            self._service.sendall(piece)

    def _is_stopped(self) -> bool:
        """Return True if a message has arrived, which can only be `stop` or the end of the stream."""
        # The message stays in the socket (MSG_PEEK): `main` reads it after the final reply.
        try:
            self._service.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        return True


def _render_heatmap(heatmap: Floats) -> HeatmapValues:
    """Return a heat map with four digits, which is more than a screen can show."""
    rows = np.round(heatmap.astype(np.float64), 4).tolist()
    return HeatmapValues(len(rows), len(rows[0]), rows)


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


def _render_layer(layer: LayerView) -> LayerDescription:
    """Return a layer as the service needs it."""
    window = layer.window
    field = layer.receptive_field
    return LayerDescription(
        tensor=layer.tensor,
        name=layer.name,
        kind=layer.kind,
        sources=layer.sources,
        shape=layer.shape,
        left_out=layer.layout.leading_tokens if layer.layout else 0,
        direct=layer.is_direct,
        block=layer.block,
        kernel=window.kernel if window else None,
        stride=window.stride if window else None,
        padding=window.padding if window else None,
        dilation=window.dilation if window else None,
        groups=layer.groups,
        parameters=layer.parameters,
        constants=layer.constants,
        attributes=layer.attributes,
        weights=list(layer.weights),
        input=layer.input_tensor,
        order=layer.flattened_axes,
        field=field and {axis: list(span) for axis, span in field._asdict().items()},
    )
