"""Calls of Triton's own clients, in a process of its own: their messages have the names of ours.

Run as a program: it reads a JSON object with the address, the steps and the files of images from stdin, and
writes the results as JSON.
"""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import tritonclient.grpc as triton
import tritonclient.grpc.aio as triton_aio
from google.protobuf.json_format import MessageToDict
from tritonclient.grpc import model_config_pb2, service_pb2
from tritonclient.utils import InferenceServerException

from tests.service.grpc.descriptors import describe_file


def describe_descriptors() -> dict[str, Any]:
    """Return Triton's messages, enumerations and methods as plain values."""
    files = [describe_file(module.DESCRIPTOR) for module in (service_pb2, model_config_pb2)]
    return {kind: {**files[0][kind], **files[1][kind]} for kind in files[0]}


def make_inputs(images: list[bytes], name: str = "image") -> list[Any]:
    """Return encoded images as the input of a request."""
    infer_input = triton.InferInput(name, [len(images)], "BYTES")
    infer_input.set_data_from_numpy(np.array(images, dtype=object))
    return [infer_input]


def make_row(name: str, datatype: str, shape: list[int]) -> list[Any]:
    """Return a tensor of growing numbers as the input of a request."""
    kind = {"FP32": np.float32, "UINT8": np.uint8}[datatype]
    values = np.linspace(0, 1 if datatype == "FP32" else 255, int(np.prod(shape))).astype(kind).reshape(shape)
    infer_input = triton.InferInput(name, shape, datatype)
    infer_input.set_data_from_numpy(values)
    return [infer_input]


def read_outputs(result: Any) -> dict[str, Any]:
    """Return the outputs of a reply by name, as plain values."""
    outputs = {}
    for output in result.get_response().outputs:
        values = result.as_numpy(output.name)
        outputs[output.name] = (
            [[text.decode() for text in row] for row in values] if values.dtype == object else values.tolist()
        )
    return outputs


def to_dict(message: Any) -> Any:
    """Return a message as plain values."""
    return MessageToDict(message, preserving_proto_field_name=True)


def call_all(address: str, images: list[bytes]) -> dict[str, Any]:
    """Call every method with the synchronous client, and return the answers."""
    with triton.InferenceServerClient(address) as client:
        inputs = make_inputs(images)
        labels = triton.InferRequestedOutput("probabilities", class_count=2)
        logits = triton.InferRequestedOutput("logits")
        answers = {
            "live": client.is_server_live(),
            "ready": client.is_server_ready(),
            "server": to_dict(client.get_server_metadata()),
            "model_ready": [
                client.is_model_ready("small"),
                client.is_model_ready("small", "1"),
                client.is_model_ready("small", "2"),
                client.is_model_ready("nothing"),
            ],
            "metadata": to_dict(client.get_model_metadata("small", "1")),
            "config": to_dict(client.get_model_config("small")),
            "probabilities": read_outputs(client.infer("small", inputs)),
            "labels": read_outputs(client.infer("small", inputs, outputs=[labels, logits])),
            "id": client.infer("small", inputs, request_id="42").get_response().id,
            "float": read_outputs(
                client.infer("thing", make_row("image", "FP32", [2, 3, 16, 16]), outputs=[logits])
            ),
            "pixels": read_outputs(client.infer("small", make_row("pixels", "UINT8", [2, 16, 16, 3]))),
            "statistics": to_dict(client.get_inference_statistics("small")),
            "all_statistics": to_dict(client.get_inference_statistics()),
            "index": to_dict(client.get_model_repository_index()),
            "errors": {},
        }
        failures = {
            "unknown model": lambda: client.infer("nothing", inputs),
            "bad image": lambda: client.infer("small", make_inputs([b"no image"])),
            "unknown output": lambda: client.infer(
                "small", inputs, outputs=[triton.InferRequestedOutput("x")]
            ),
            "compressed": lambda: client.infer("small", inputs, compression_algorithm="gzip"),
            "load": lambda: client.load_model("small"),
            "shared memory": client.get_system_shared_memory_status,
        }
        for name, call in failures.items():
            try:
                call()
            except InferenceServerException as error:
                answers["errors"][name] = [str(error.status()), error.message()]
        return answers


def manage(address: str) -> list[Any]:
    """Unload and load a model, and return its states."""
    with triton.InferenceServerClient(address) as client:
        states: list[Any] = [client.is_model_ready("small")]
        client.unload_model("small")
        states.append(client.is_model_ready("small"))
        client.load_model("small")
        states.append(client.is_model_ready("small"))
        try:
            client.load_model("nothing")
        except InferenceServerException as error:
            states.append([str(error.status()), error.message()])
        return states


async def call_async(address: str, images: list[bytes], count: int) -> list[Any]:
    """Send `count` requests at the same time with the asyncio client, and return the labels."""
    async with triton_aio.InferenceServerClient(address) as client:
        assert await client.is_server_ready()
        labels = triton.InferRequestedOutput("probabilities", class_count=1)
        results = await asyncio.gather(
            *(client.infer("small", make_inputs(images), outputs=[labels]) for _ in range(count))
        )
        return [read_outputs(result)["probabilities"] for result in results]


def main() -> None:
    """Take the steps that stdin asks for."""
    order = json.load(sys.stdin)
    images = [Path(path).read_bytes() for path in order.get("images", ())]
    results: dict[str, Any] = {}
    for step in order["steps"]:
        match step:
            case "descriptors":
                results[step] = describe_descriptors()
            case "sync":
                results[step] = call_all(order["address"], images)
            case "aio":
                results[step] = asyncio.run(call_async(order["address"], images, 20))
            case "manage":
                results[step] = manage(order["address"])
    json.dump(results, sys.stdout)


if __name__ == "__main__":
    main()
