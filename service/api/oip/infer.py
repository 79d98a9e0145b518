"""Inference requests of Open Inference Protocol: parsing the tensors, and rendering the outputs."""

from __future__ import annotations

import asyncio
import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import orjson

from fovea.service.api import bodies
from fovea.service.api.adapter import InferenceRequest, ParsedRequest, ProtocolAdapter, Reply, ReplyFormat
from fovea.service.api.json_bodies import parse_json, validate_json
from fovea.service.api.oip.schemas import InferOutput, InferRequest
from fovea.service.api.options import check_spelling
from fovea.service.api.tensors import (
    DATATYPES,
    ENCODED_DATATYPE,
    BinaryData,
    InferInput,
    ModelInputs,
    check_parameters,
    pack_elements,
    parse_json_size,
    read_parameter,
    shorten_value,
)
from fovea.service.artifact.inputs import find_original_output
from fovea.service.errors import BadRequest
from fovea.service.http.fast_path import Headers
from fovea.service.http.request_record import RequestRecord
from fovea.service.image_warnings import format_warnings
from fovea.service.runners.batch_messages import Image, ImageRequest, Item
from fovea.service.runners.shared_memory import SharedBuffer
from fovea.service.serving.classifier import Classification
from fovea.service.serving.live_model import LiveModel

if TYPE_CHECKING:  # see `InferAdapter.parse_request`
    import numpy as np
    import numpy.typing as npt

_JSON_LENGTH_HEADER: Final = "inference-header-content-length"

FLOAT_DATATYPE: Final = DATATYPES["float32"]


class OutputKind(NamedTuple):
    """The type of an output."""

    width: int
    """Number of values for each image."""
    is_logits: bool


def list_outputs(model: LiveModel) -> dict[str, OutputKind]:
    """Return the outputs of a model by name; an output of an imported file also keeps its original name."""
    contract = model.contract
    kinds = {
        contract.probabilities_name: OutputKind(len(contract.labels), is_logits=False),
        contract.logits_name: OutputKind(contract.logit_count, is_logits=True),
    }
    if own := find_original_output(contract):
        name, served_name = own
        kinds.setdefault(name, kinds[served_name])
    return kinds


class InferAdapter(ProtocolAdapter):
    """The parser of inference requests, in pure JSON or with binary tensors after the JSON."""

    def __init__(self) -> None:
        self._has_numpy = False
        """True once NumPy is imported completely. It is in `sys.modules` before that."""

    def is_json_body(self, headers: Headers) -> bool:
        """Return True if the whole body is JSON: the request does not use the binary extension."""
        return _JSON_LENGTH_HEADER.encode() not in headers

    async def parse_request(self, request: InferenceRequest) -> ParsedRequest:
        await self._import_numpy()
        body, size = request.body.take_content(), request.body.size
        json_size = parse_json_size(request.headers.get(_JSON_LENGTH_HEADER.encode()), size)
        bodies.json_limit(request.settings).check(json_size)
        view = body.view(0, size) if isinstance(body, SharedBuffer) else memoryview(body)

        def get_image(start: int, stop: int) -> Image:
            start, stop = start + json_size, stop + json_size
            return body.to_ref(start, stop) if isinstance(body, SharedBuffer) else view[start:stop]

        binary_data = BinaryData(view[json_size:], get_image)
        json_body = bodies.RawBody(body if isinstance(body, SharedBuffer) else body[:json_size], json_size)
        return await parse_json(json_body, lambda value: _parse_infer_request(value, request, binary_data))

    async def _import_numpy(self) -> None:
        """Import NumPy, which rendering needs, in a thread.

        It takes 7 MB and 0.1 s, and nothing else in this process needs it. An import on the event loop would
        wait there for an import that another request has begun.
        """
        if not self._has_numpy:
            await asyncio.to_thread(importlib.import_module, "numpy")
            self._has_numpy = True


@dataclass(frozen=True)
class Output:
    """One tensor of a reply."""

    name: str
    width: int
    """Number of values for each image."""
    is_logits: bool
    top_k: int
    """Number of labels for each image that replace the values; 0 means values."""
    is_binary: bool

    def render(self, results: Sequence[Classification]) -> tuple[dict[str, Any], bytes]:
        """Return the tensor as plain values, and its binary data for after the JSON."""
        import numpy as np

        rows = [one.answer.logits if self.is_logits else one.answer.probabilities for one in results]
        values = np.frombuffer(b"".join(row for row in rows if row is not None), np.float32)
        values = values.reshape(len(results), self.width)
        head: dict[str, Any] = {"name": self.name, "datatype": FLOAT_DATATYPE, "shape": list(values.shape)}
        content: bytes = b""
        if self.top_k:
            texts = [
                text for row in values for text in self._rank_labels(row, results[0].model.contract.labels)
            ]
            head |= {"datatype": ENCODED_DATATYPE, "shape": [len(results), self.top_k]}
            if self.is_binary:
                content = pack_elements([text.encode() for text in texts])
            else:
                head["data"] = texts
        elif self.is_binary:
            content = values.tobytes()
        else:
            head["data"] = values.ravel()
        if self.is_binary:
            head["parameters"] = {"binary_data_size": len(content)}
        return head, content

    def _rank_labels(self, row: npt.NDArray[np.float32], labels: Sequence[str]) -> list[str]:
        """Return `value:index:label`, the highest value first.

        Nine digits distinguish every float32 from its neighbours. The single logit of a binary model has no
        label.
        """
        import numpy as np

        best = np.argsort(-row, kind="stable")[: self.top_k].tolist()
        suffixes = [f":{labels[index]}" if len(labels) == len(row) else "" for index in best]
        return [f"{row[index]:.9g}:{index}{name}" for index, name in zip(best, suffixes, strict=True)]


def _parse_infer_request(value: Any, request: InferenceRequest, binary_data: BinaryData) -> ParsedRequest:
    return parse_infer_value(value, request, binary_data, _InferFormat, is_binary=False)


def parse_infer_value(
    value: dict[str, Any],
    request: InferenceRequest,
    binary_data: BinaryData,
    create_format: Callable[[int, str | None, Sequence[Output]], ReplyFormat],
    *,
    is_binary: bool,
) -> ParsedRequest:
    """Parse an inference request from plain values: the JSON, or the fields of a gRPC message.

    `create_format` makes the format of the reply from the number of labels per image, the id of the request
    and the outputs. `is_binary` is the default of `binary_data_output`. Raises `BadRequest`.
    """
    infer_request = validate_json(InferRequest, value)
    parameters = infer_request.parameters or {}
    _check_spelling(value)
    outputs = _resolve_outputs(
        infer_request.outputs, read_parameter(parameters, "binary_data_output", is_binary), request.model
    )
    rows = ModelInputs(request.model.tensors).split_rows(infer_request.inputs, binary_data, request.settings)
    needs_logits = any(output.is_logits for output in outputs)
    images: list[Item] = [
        ImageRequest(row.content, row.tensor_name, needs_logits)
        if row.tensor_name or needs_logits
        else row.content
        for row in rows
    ]
    labels = sum(output.top_k or output.width // _VALUES_PER_LABEL for output in outputs)
    microseconds = read_parameter(parameters, "timeout", 0)  # 0 means no limit, as in Triton
    return ParsedRequest(images, create_format(labels, infer_request.id, outputs), microseconds / 1e6 or None)


def _check_spelling(value: dict[str, Any]) -> None:
    """Raise `BadRequest` for a misspelt name.

    Other unknown names are ignored, as the protocol requires: clients send parameters of other servers, such
    as `priority`.
    """
    check_spelling(value, InferRequest.model_fields, "the request's key")
    check_spelling(value.get("parameters") or (), _REQUEST_PARAMETERS, "the request's parameter")
    for kind, model, parameters in (
        ("inputs", InferInput, _INPUT_PARAMETERS),
        ("outputs", InferOutput, _OUTPUT_PARAMETERS),
    ):
        for one in value.get(kind) or ():
            check_spelling(one, model.model_fields, f"in {kind} the key")
            check_spelling(one.get("parameters") or (), parameters, f"in {kind} the parameter")


_REQUEST_PARAMETERS: Final = ("binary_data_output", "timeout")

_INPUT_PARAMETERS: Final = ("binary_data_size",)

_OUTPUT_PARAMETERS: Final = ("classification", "binary_data")
"""Supported parameters of a request, of each of its inputs, and of each of its outputs."""

_VALUES_PER_LABEL: Final = 50
"""Number of tensor values that take as long to write as one label."""


def _resolve_outputs(
    requested_outputs: Sequence[InferOutput] | None, is_binary: bool, model: LiveModel
) -> list[Output]:
    """Return the requested outputs; `is_binary` is the default for outputs that do not set `binary_data`.

    Raises `BadRequest` for an unknown output, or an output that is requested twice.
    """
    kinds = list_outputs(model)
    infer_outputs = requested_outputs or [InferOutput(name=model.contract.probabilities_name)]
    if len({one.name for one in infer_outputs}) < len(infer_outputs):
        raise BadRequest("an output is requested twice; request it once")
    outputs = []
    for one in infer_outputs:
        if one.name not in kinds:
            known = ", ".join(map(repr, kinds))
            raise BadRequest(f"the model has no output {shorten_value(one.name)}; it has {known}")
        parameters, (width, is_logits) = check_parameters(one.parameters), kinds[one.name]
        outputs.append(
            Output(
                one.name,
                width,
                is_logits,
                top_k=min(read_parameter(parameters, "classification", 0), width),
                is_binary=read_parameter(parameters, "binary_data", is_binary),
            )
        )
    return outputs


class _InferFormat(NamedTuple):
    """The content of a reply: the requested outputs."""

    labels_per_image: int
    request_id: str | None
    outputs: Sequence[Output]

    def render(self, results: Sequence[Classification], model: LiveModel, record: RequestRecord) -> Reply:
        """Render the results (`service.api.adapter.ReplyFormat`)."""
        value: dict[str, Any] = {"model_name": model.name, "model_version": model.version}
        if self.request_id is not None:
            value["id"] = self.request_id
        if warnings := format_warnings([one.answer.warnings for one in results]):
            value["parameters"] = {"warnings": warnings}
        outputs = [output.render(results) for output in self.outputs]
        value["outputs"] = [head for head, _ in outputs]
        json_content = orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY)
        if not any("parameters" in head for head, _ in outputs):
            return Reply(json_content)
        content = b"".join([json_content, *(content for _, content in outputs)])
        return Reply(content, {_JSON_LENGTH_HEADER: str(len(json_content))}, "application/octet-stream")
