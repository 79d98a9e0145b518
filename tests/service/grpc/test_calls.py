"""Calls over gRPC with a plain stub: values in both forms, bad input, limits, deadlines and cancellation."""

from __future__ import annotations

import json
import os
import signal
import socket
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from fovea.service.grpc import inference_pb2 as pb
from tests.export.classifiers import build_classifier
from tests.export.imports import import_graph
from tests.graphs import add_to_repository, build_model
from tests.pictures import make_jpeg
from tests.servers import Server, wait_until
from tests.service.grpc.channels import create_stub, grpc_address, open_channel, read_error
from tests.service.grpc.raw_calls import RawConnection

IMAGES = [make_jpeg(64 + seed, 48, seed) for seed in range(2)]
ROW = np.linspace(-1, 1, 3 * 16 * 16, dtype=np.float32)
INFER = "/inference.GRPCInferenceService/ModelInfer"


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trained model `small`, and `thing`, which was imported."""
    folder = tmp_path_factory.mktemp("grpc")
    import_graph(build_classifier(), folder)
    add_to_repository(build_model(), folder / "zoo")
    return folder / "zoo"


@pytest.fixture(scope="module")
def grpc_server(zoo: Path) -> Iterator[Server]:
    with Server(
        FOVEA_MODELS=str(zoo),
        FOVEA_GRPC_PORT="0",
        FOVEA_BODY_BYTES="2000000",
        FOVEA_JSON_BYTES="100000",
        FOVEA_RUNNERS="1",
        FOVEA_LOG_REQUESTS="100000",
    ) as server:
        yield server


@pytest.fixture
def channel(grpc_server: Server) -> Iterator[grpc.Channel]:
    with open_channel(grpc_server) as channel:
        yield channel


@pytest.fixture
def stub(channel: grpc.Channel) -> Any:
    return create_stub(channel)


def prefix_lengths(images: list[bytes]) -> bytes:
    return b"".join(struct.pack("<I", len(image)) + image for image in images)


def make_request(
    name: str,
    datatype: str,
    shape: list[int],
    raw: bytes | None = None,
    /,
    model: str = "thing",
    **contents: Any,
) -> pb.ModelInferRequest:
    """Return a request with one input, with raw contents or with typed contents."""
    tensor = pb.ModelInferRequest.InferInputTensor(name=name, datatype=datatype, shape=shape)
    if contents:
        tensor.contents.MergeFrom(pb.InferTensorContents(**contents))
    raw_contents = [] if raw is None else [raw]
    return pb.ModelInferRequest(model_name=model, inputs=[tensor], raw_input_contents=raw_contents)


def image_request(images: list[bytes] = IMAGES, **options: Any) -> pb.ModelInferRequest:
    return make_request("image", "BYTES", [len(images)], prefix_lengths(images), **options)


def row_request(**contents: Any) -> pb.ModelInferRequest:
    return make_request("image", "FP32", [1, 3, 16, 16], contents.pop("raw", None), **contents)


def send_bytes(channel: grpc.Channel, content: bytes, path: str = INFER, **options: Any) -> bytes:
    reply: bytes = channel.unary_unary(path)(content, timeout=30, **options)
    return reply


def expect_error(call: Callable[[], object]) -> tuple[grpc.StatusCode, str, dict[str, str]]:
    """Return the error of a call."""
    with pytest.raises(grpc.RpcError) as info:
        call()
    return read_error(info.value)


# --- values --------------------------------------------------------------------------------------


def test_typed_and_raw_contents_get_equal_replies(stub: Any) -> None:
    pixels = np.linspace(0, 255, 768).astype(np.uint8)
    pairs = [
        (image_request(), make_request("image", "BYTES", [2], bytes_contents=IMAGES)),
        (row_request(raw=ROW.tobytes()), row_request(fp32_contents=ROW)),
        (
            make_request("pixels", "UINT8", [1, 16, 16, 3], pixels.tobytes()),
            make_request("pixels", "UINT8", [1, 16, 16, 3], uint_contents=pixels.tolist()),
        ),
    ]
    for raw, typed in pairs:
        reply = stub.ModelInfer(raw, timeout=30)
        assert reply == stub.ModelInfer(typed, timeout=30)
        (values,) = reply.raw_output_contents
        assert np.isclose(np.frombuffer(values, np.float32).reshape(-1, 5).sum(axis=1), 1).all()


def test_floats_may_come_in_pieces_or_one_by_one(channel: grpc.Channel) -> None:
    """Both are legal on the wire, although no encoder of Protocol Buffers writes them."""
    expected = send_bytes(channel, row_request(raw=ROW.tobytes()).SerializeToString())
    pieces = (packed_floats(ROW[:100]), packed_floats(ROW[100:]))
    single = b"".join(b"\x35" + struct.pack("<f", value) for value in ROW)  # field 6, four bytes
    assert send_bytes(channel, encode_row(b"".join(pieces))) == expected
    assert send_bytes(channel, encode_row(single)) == expected
    status, message, _ = expect_error(lambda: send_bytes(channel, encode_row(single + pieces[0])))
    assert status == grpc.StatusCode.INVALID_ARGUMENT and "not packed" in message


def packed_floats(values: np.ndarray[Any, Any]) -> bytes:
    return encode_field(6, values.astype("<f4").tobytes())


def encode_row(contents: bytes) -> bytes:
    """Return a request for `thing` whose contents are encoded by hand."""
    tensor = pb.ModelInferRequest.InferInputTensor(name="image", datatype="FP32", shape=[1, 3, 16, 16])
    head: bytes = pb.ModelInferRequest(model_name="thing").SerializeToString()
    return head + encode_field(5, tensor.SerializeToString() + encode_field(5, contents))


def encode_field(number: int, content: bytes) -> bytes:
    """Return a field with a length."""
    length = len(content)
    encoded = bytearray()
    while length > 0x7F:
        encoded.append(length & 0x7F | 0x80)
        length >>= 7
    return bytes([number << 3 | 2, *encoded, length]) + content


def test_outputs_are_typed_if_the_request_says_so(stub: Any) -> None:
    request = image_request(model="small")
    raw = stub.ModelInfer(request, timeout=30)
    request.parameters["binary_data_output"].bool_param = False
    request.id = "seven"
    labels = request.outputs.add(name="probabilities")
    labels.parameters["classification"].int64_param = 2
    request.outputs.add(name="logits")
    typed = stub.ModelInfer(request, timeout=30)
    assert typed.id == "seven" and not typed.raw_output_contents
    first, second = typed.outputs
    assert (
        list(first.shape) == [2, 2] and first.datatype == "BYTES" and len(first.contents.bytes_contents) == 4
    )
    assert len(second.contents.fp32_contents) == np.prod(second.shape)
    (values,) = raw.raw_output_contents
    best = np.frombuffer(values, np.float32).reshape(2, -1).max(axis=1)
    assert np.allclose([float(text.split(b":")[0]) for text in first.contents.bytes_contents[::2]], best)


# --- bad input -----------------------------------------------------------------------------------

SHAPE = [1, 3, 16, 16]

BAD_REQUESTS: dict[str, tuple[pb.ModelInferRequest, str]] = {
    "no input": (pb.ModelInferRequest(model_name="thing"), "inputs"),
    "no values": (row_request(), "has no values"),
    "both": (row_request(raw=ROW.tobytes(), fp32_contents=ROW), "contents and also raw_input_contents"),
    "both, images": (
        make_request("image", "BYTES", [1], prefix_lengths(IMAGES[:1]), bytes_contents=IMAGES[:1]),
        "contents and also raw_input_contents",
    ),
    "truncated": (row_request(raw=ROW.tobytes()[:-1]), "raw_input_contents has 3071 bytes"),
    "too many bytes": (row_request(raw=ROW.tobytes() + b"x"), "raw_input_contents has 3073 bytes"),
    "too few values": (row_request(fp32_contents=ROW[1:]), "fp32_contents has 3068 bytes"),
    "truncated images": (
        make_request("image", "BYTES", [2], prefix_lengths(IMAGES)[:-1]),
        "do not fit: raw_input_contents has",
    ),
    "too few images": (make_request("image", "BYTES", [2], bytes_contents=IMAGES[:1]), "must be 2 values"),
    "an unknown input": (make_request("x", "FP32", SHAPE, ROW.tobytes()), "no input 'x'"),
    "a wrong datatype": (make_request("image", "FP64", SHAPE, ROW.tobytes()), "of datatype 'FP64'"),
    "a wrong field": (row_request(fp64_contents=ROW.tolist()), "has fp64_contents; send fp32_contents"),
    "two fields": (row_request(fp32_contents=ROW, int_contents=[1]), "fp32_contents, int_contents"),
    "typed halves": (make_request("image", "FP16", SHAPE, fp32_contents=ROW), "send raw_input_contents"),
    "a wrong shape": (make_request("image", "FP32", [1, 16, 16, 3], ROW.tobytes()), "must be [N, 3, 16, 16]"),
    "no images": (make_request("image", "FP32", [0, 3, 16, 16], b""), "must be [N, 3, 16, 16]"),
    "many images": (make_request("image", "BYTES", [1 << 40], b""), "at most 64"),
    "many axes": (make_request("image", "FP32", [1] * 65, b""), "64"),
    "large pixels": (
        make_request("pixels", "UINT8", [1, 16, 16, 3], uint_contents=[256] * 768),
        "out of the range of UINT8",
    ),
    "NaN": (row_request(raw=np.full(768, np.nan, np.float32).tobytes()), "not finite"),
    "two raw contents": (
        pb.ModelInferRequest(
            model_name="thing", inputs=row_request().inputs, raw_input_contents=[ROW.tobytes()] * 2
        ),
        "raw_input_contents has 2 elements",
    ),
    "an unknown output": (
        pb.ModelInferRequest(
            model_name="thing",
            inputs=row_request().inputs,
            outputs=[pb.ModelInferRequest.InferRequestedOutputTensor(name="x")],
            raw_input_contents=[ROW.tobytes()],
        ),
        "no output 'x'",
    ),
    "shared memory": (
        pb.ModelInferRequest(
            model_name="thing",
            inputs=[
                pb.ModelInferRequest.InferInputTensor(
                    name="image",
                    datatype="FP32",
                    shape=SHAPE,
                    parameters={"shared_memory_region": pb.InferParameter(string_param="x")},
                )
            ],
            raw_input_contents=[ROW.tobytes()],
        ),
        "shared_memory_region is not supported",
    ),
    "a misspelt parameter": (
        pb.ModelInferRequest(
            model_name="thing",
            inputs=row_request().inputs,
            parameters={"timeot": pb.InferParameter(int64_param=1)},
            raw_input_contents=[ROW.tobytes()],
        ),
        "timeout",
    ),
    "a timeout of text": (
        pb.ModelInferRequest(
            model_name="thing",
            inputs=row_request().inputs,
            parameters={"timeout": pb.InferParameter(string_param="1")},
            raw_input_contents=[ROW.tobytes()],
        ),
        "timeout is '1'",
    ),
}


@pytest.mark.parametrize("case", BAD_REQUESTS)
def test_bad_request_is_an_invalid_argument(stub: Any, case: str) -> None:
    request, expected = BAD_REQUESTS[case]
    status, message, trailers = expect_error(lambda: stub.ModelInfer(request, timeout=30))
    assert (status, trailers["code"]) == (grpc.StatusCode.INVALID_ARGUMENT, "bad_request"), message
    assert expected in message
    assert stub.ModelInfer(row_request(raw=ROW.tobytes()), timeout=30).model_name == "thing"


BAD_BYTES = {
    "noise": b"\xff" * 100,
    "truncated field": row_request(raw=ROW.tobytes()).SerializeToString()[:-1],
    "group": b"\x0b\x0c",
    "field 0": b"\x02\x00",
    "endless number": b"\x08" + b"\xff" * 20,
    "name that is not UTF-8": b"\x0a\x02\xff\xfe",
    "wrong type": b"\x08\x01" * 3 + b"\x2a\x02\x0a\x7f",
    "floats of three bytes": encode_row(encode_field(6, b"abc")),
    "many empty inputs": b"\x2a\x00" * 10_000,
    "many empty images": encode_row(b"\x42\x00" * 10_000),
    "many empty parameters": b"\x32" + b"\xa0\x9c\x01" + b"\x12\x00" * 10_000,
}


@pytest.mark.parametrize("case", BAD_BYTES)
def test_bytes_that_are_no_request_are_an_invalid_argument(channel: grpc.Channel, case: str) -> None:
    status, _, trailers = expect_error(lambda: send_bytes(channel, BAD_BYTES[case]))
    assert (status, trailers["code"]) == (grpc.StatusCode.INVALID_ARGUMENT, "bad_request")


def test_unknown_model_and_version_are_not_found(stub: Any) -> None:
    for request in (
        image_request(model=""),
        image_request(model="nothing"),
        pb.ModelInferRequest(model_name="thing", model_version="9"),
    ):
        status, message, trailers = expect_error(lambda request=request: stub.ModelInfer(request, timeout=30))  # type: ignore[misc]
        assert (status, trailers["code"]) == (grpc.StatusCode.NOT_FOUND, "model_not_found"), message
    question = pb.ModelMetadataRequest(name="nothing")
    for method in (stub.ModelMetadata, stub.ModelConfig, stub.ModelStatistics):
        status, _, _ = expect_error(lambda method=method: method(question, timeout=30))  # type: ignore[misc]
        assert status == grpc.StatusCode.NOT_FOUND


def test_errors_have_the_message_of_http_beyond_ascii(grpc_server: Server, stub: Any) -> None:
    name = "größe" * 10
    reply = grpc_server.client.get(f"/v2/models/{name}").json()
    request = pb.ModelMetadataRequest(name=name)
    _, message, trailers = expect_error(lambda: stub.ModelMetadata(request, timeout=30))
    assert (message, trailers["code"]) == (reply["error"], reply["code"])


def test_unknown_methods_are_unimplemented(grpc_server: Server, channel: grpc.Channel, stub: Any) -> None:
    for path in ("/inference.GRPCInferenceService/Nothing", "/other.Service/Call", "/"):
        status, _, trailers = expect_error(lambda path=path: send_bytes(channel, b"", path))  # type: ignore[misc]
        assert (status, trailers["code"]) == (grpc.StatusCode.UNIMPLEMENTED, "method_not_allowed")
    with pytest.raises(grpc.RpcError) as info:
        list(stub.ModelStreamInfer(iter([image_request()]), timeout=30))
    assert info.value.code() == grpc.StatusCode.UNIMPLEMENTED


# --- limits --------------------------------------------------------------------------------------


def test_messages_over_the_limits_are_refused(grpc_server: Server, channel: grpc.Channel, stub: Any) -> None:
    reasons = {"reason": "body_too_large"}
    before = grpc_server.read_metric("fovea_errors_total", **reasons)
    large = image_request([bytes(2_100_000)])
    status, message, _ = expect_error(lambda: stub.ModelInfer(large, timeout=30))
    assert status == grpc.StatusCode.RESOURCE_EXHAUSTED and "2000000" in message
    head = pb.ModelInferRequest(model_name="x" * 100_001)
    status, message, trailers = expect_error(lambda: stub.ModelInfer(head, timeout=30))
    assert (status, trailers["code"]) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "body_too_large")
    assert "FOVEA_JSON_BYTES" in message
    question = pb.ModelMetadataRequest(name="x" * 5000)
    status, message, _ = expect_error(lambda: stub.ModelMetadata(question, timeout=30))
    assert status == grpc.StatusCode.RESOURCE_EXHAUSTED and "at most 4096" in message
    status, message, _ = expect_error(lambda: list(channel.stream_stream(INFER)(iter([]), timeout=30)))
    assert status == grpc.StatusCode.RESOURCE_EXHAUSTED and "no message" in message
    grpc_server.wait_for_metric(before + 4, "fovea_errors_total", **reasons)
    images = image_request([IMAGES[0]] * 30 + [b"x" * 1_500_000])  # far above the limit of the head
    assert expect_error(lambda: stub.ModelInfer(images, timeout=30))[0] == grpc.StatusCode.INVALID_ARGUMENT


def test_compressed_messages_are_refused_before_they_are_unpacked(
    grpc_server: Server, channel: grpc.Channel
) -> None:
    memory = read_peak_memory(grpc_server.process.pid)
    bomb = bytes(200_000_000)
    status, message, _ = expect_error(
        lambda: channel.unary_unary(INFER)(bomb, timeout=60, compression=grpc.Compression.Gzip)
    )
    assert status == grpc.StatusCode.UNIMPLEMENTED and "gzip" in message
    assert read_peak_memory(grpc_server.process.pid) < memory + 50_000_000


def read_peak_memory(pid: int) -> int:
    """Return the peak of a process's resident memory in bytes."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    (line,) = (one for one in lines if one.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def test_refused_calls_leave_no_memory(grpc_server: Server, stub: Any) -> None:
    """An error must not keep its frames, and so its images, until the next full garbage collection."""
    request = pb.ModelInferRequest(model_name="thing", raw_input_contents=[bytes(1_900_000)])
    for number in range(110):
        if number == 10:  # everything is imported and every buffer has its size
            memory = read_peak_memory(grpc_server.process.pid)
        expect_error(lambda: stub.ModelInfer(request, timeout=30))
    assert read_peak_memory(grpc_server.process.pid) < memory + 60_000_000


@contextmanager
def paused_runners(server: Server) -> Iterator[None]:
    """Pause the runners, so that accepted calls have no answer."""
    pids = server.runner_pids
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)


def test_cancelled_call_releases_what_was_admitted(grpc_server: Server, stub: Any) -> None:
    before = grpc_server.read_metric("fovea_errors_total", reason="client_left")
    with paused_runners(grpc_server):
        calls = [stub.ModelInfer.future(image_request(), timeout=60) for _ in range(3)]
        grpc_server.wait_for_metric(6, "fovea_images_in_flight")
        for call in calls:
            call.cancel()
        grpc_server.wait_for_metric(0, "fovea_images_in_flight")
        grpc_server.wait_for_metric(before + 3, "fovea_errors_total", reason="client_left")
    assert stub.ModelInfer(image_request(), timeout=30).model_name == "thing"


def test_deadline_of_the_call_counts(grpc_server: Server, stub: Any) -> None:
    before = grpc_server.read_metric("fovea_errors_total", reason="deadline_exceeded")
    with paused_runners(grpc_server):
        call = stub.ModelInfer.future(image_request(), timeout=0.5)
        assert call.exception().code() == grpc.StatusCode.DEADLINE_EXCEEDED
        status, _, trailers = expect_error(
            lambda: stub.ModelInfer(image_request(), timeout=30, metadata=(("x-deadline-ms", "200"),))
        )
        assert (status, trailers["code"]) == (grpc.StatusCode.DEADLINE_EXCEEDED, "deadline_exceeded")
        request = image_request()
        request.parameters["timeout"].int64_param = 200_000
        status, _, trailers = expect_error(lambda: stub.ModelInfer(request, timeout=30))
        assert (status, trailers["code"]) == (grpc.StatusCode.DEADLINE_EXCEEDED, "deadline_exceeded")
        grpc_server.wait_for_metric(before + 3, "fovea_errors_total", reason="deadline_exceeded")
        grpc_server.wait_for_metric(0, "fovea_images_in_flight")
    bad = expect_error(
        lambda: stub.ModelInfer(image_request(), timeout=30, metadata=(("x-deadline-ms", "soon"),))
    )
    assert bad[0] == grpc.StatusCode.INVALID_ARGUMENT and "X-Deadline-Ms" in bad[1]


def test_probes_do_not_wait_for_messages_that_do_not_arrive(zoo: Path) -> None:
    sizes = {"FOVEA_BODY_BYTES": "1000000", "FOVEA_BODIES_BYTES": "2000000"}  # two messages at once
    with (
        Server(FOVEA_MODELS=str(zoo), FOVEA_GRPC_PORT="0", **sizes) as server,
        RawConnection(server) as connection,
        open_channel(server) as channel,
    ):
        for _ in range(2):
            connection.start_call(INFER.encode())
        server.wait_for_metric(3, "fovea_requests_in_flight")  # with the request of this metric
        health = health_pb2_grpc.HealthStub(channel)
        assert health.Check(health_pb2.HealthCheckRequest(), timeout=30).status == 1
        assert server.read_metric("fovea_errors_total") == 0  # no message was cut off for the probe


def test_call_counts_for_its_caller_before_its_message_arrives(zoo: Path) -> None:
    with (
        Server(FOVEA_MODELS=str(zoo), FOVEA_GRPC_PORT="0", FOVEA_CALLER_IMAGES="1") as server,
        open_channel(server, enable_retries=0) as channel,
    ):
        stub, request = create_stub(channel), image_request(IMAGES[:1])
        with RawConnection(server) as connection:
            connection.start_call(INFER.encode())
            server.wait_for_metric(2, "fovea_requests_in_flight")  # with the request of this metric
            status, _, trailers = expect_error(lambda: stub.ModelInfer(request, timeout=30))
            assert (status, trailers["code"]) == (
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                "too_many_in_flight",
            )
        server.wait_for_metric(1, "fovea_requests_in_flight")
        assert stub.ModelInfer(request, timeout=30).model_name == "thing"


def test_refusals_of_one_caller_are_delayed(zoo: Path) -> None:
    """Otherwise a caller that asks again at once takes the time of the event loop."""
    settings = {"FOVEA_CALLER_RATE": "0.001", "FOVEA_CALLER_BURST": "1"}
    with (
        Server(FOVEA_MODELS=str(zoo), FOVEA_GRPC_PORT="0", **settings) as server,
        open_channel(server, enable_retries=0) as channel,
    ):
        stub, request = create_stub(channel), image_request(IMAGES[:1])
        stub.ModelInfer(request, timeout=30)
        started_at = time.monotonic()
        calls = [stub.ModelInfer.future(request, timeout=30) for _ in range(60)]
        assert {call.exception().code() for call in calls} == {grpc.StatusCode.RESOURCE_EXHAUSTED}
        assert time.monotonic() - started_at > 1.5  # 20 at once, and 20 a second


def test_messages_count_while_their_model_is_loaded(zoo: Path) -> None:
    settings = {
        "FOVEA_BODY_BYTES": "1000000",
        "FOVEA_BODIES_BYTES": "3000000",
        "FOVEA_MODELS_LOADED": "1",
        "FOVEA_RUNNERS": "1",
    }
    with (
        Server(FOVEA_MODELS=str(zoo), FOVEA_GRPC_PORT="0", **settings) as server,
        open_channel(server, enable_retries=0) as channel,
    ):
        stub = create_stub(channel)
        stub.ModelInfer(image_request(), timeout=60)  # `small` is not loaded now
        large = image_request([make_jpeg().ljust(900_000, b"\0")], model="small")
        with paused_runners(server):
            calls = [stub.ModelInfer.future(large, timeout=60) for _ in range(6)]
            wait_until(lambda: any(call.done() for call in calls))
            refused = next(call for call in calls if call.done())
            assert "FOVEA_BODIES_BYTES" in refused.details()
        wait_until(lambda: all(call.done() for call in calls))
        assert sum(call.code() is grpc.StatusCode.OK for call in calls) == 3


def test_replies_that_nobody_reads_have_a_limit(zoo: Path) -> None:
    sizes = {"FOVEA_BODY_BYTES": "1024", "FOVEA_BODIES_BYTES": "1024"}
    path = b"/inference.GRPCInferenceService/ModelMetadata"
    question = pb.ModelMetadataRequest(name="small")
    with (
        Server(FOVEA_MODELS=str(zoo), FOVEA_GRPC_PORT="0", **sizes) as server,
        open_channel(server, enable_retries=0) as channel,
    ):
        stub = create_stub(channel)
        assert stub.ModelMetadata(question, timeout=30).name == "small"
        with RawConnection(server, window=0) as connection:
            for _ in range(8):
                stream = connection.start_call(path)
                connection.send_message(stream, encode_message(question))
            connection.wait_for_end(stream)  # a refusal has no message
            status, message, trailers = expect_error(lambda: stub.ModelMetadata(question, timeout=30))
            assert (status, trailers["code"]) == (grpc.StatusCode.UNAVAILABLE, "overloaded")
            assert "clients have not read" in message
        server.wait_for_metric(1, "fovea_requests_in_flight")
        wait_until(lambda: has_answer(stub, question))


def encode_message(message: Any) -> bytes:
    content: bytes = message.SerializeToString()
    return b"\0" + struct.pack("!I", len(content)) + content


def has_answer(stub: Any, question: pb.ModelMetadataRequest) -> bool:
    try:
        return bool(stub.ModelMetadata(question, timeout=30).name == "small")
    except grpc.RpcError:
        return False


def test_full_queue_is_unavailable_with_a_delay(zoo: Path) -> None:
    with (
        Server(
            FOVEA_MODELS=str(zoo), FOVEA_GRPC_PORT="0", FOVEA_QUEUE_IMAGES="2", FOVEA_REQUEST_IMAGES="2"
        ) as server,
        open_channel(server, enable_retries=0) as channel,
    ):
        stub = create_stub(channel)
        with paused_runners(server):
            waiting = stub.ModelInfer.future(image_request(), timeout=60)
            server.wait_for_metric(2, "fovea_images_in_flight")
            status, message, trailers = expect_error(lambda: stub.ModelInfer(image_request(), timeout=30))
            assert (status, trailers["code"]) == (grpc.StatusCode.UNAVAILABLE, "overloaded"), message
            assert int(trailers["retry-after"]) >= 1 and int(trailers["grpc-retry-pushback-ms"]) > 0
        assert waiting.result().model_name == "thing"


@pytest.mark.parametrize(
    "content", [b"\x00" * 1000, b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"\x16\x03\x01" * 99]
)
def test_garbage_on_the_port_ends_its_connection_only(grpc_server: Server, stub: Any, content: bytes) -> None:
    host, port = grpc_address(grpc_server).split(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        connection.sendall(content)
        while connection.recv(4096):
            pass
    assert stub.ServerLive(pb.ServerLiveRequest(), timeout=30).live


def test_metadata_and_paths_that_are_not_utf8_leave_nothing_in_the_log(zoo: Path) -> None:
    """The library logs such bytes with a traceback, and a key may be among them."""
    live = b"/inference.GRPCInferenceService/ServerLive"
    with Server(FOVEA_MODELS=str(zoo), FOVEA_GRPC_PORT="0") as server:
        with RawConnection(server) as connection:
            for path, value in ((live, b"Bearer fovea_secret\xff"), (live + b"\xff", b"Bearer x")):
                stream = connection.start_call(path, (b"authorization", value))
                connection.send_message(stream)
                connection.wait_for_end(stream)
        with open_channel(server) as channel:
            assert create_stub(channel).ServerLive(pb.ServerLiveRequest(), timeout=30).live
    assert "fovea_secret" not in server.log and "Traceback" not in server.log


# --- log, health, reflection ---------------------------------------------------------------------


def test_health_service_tells_readiness(grpc_server: Server, channel: grpc.Channel) -> None:
    health = health_pb2_grpc.HealthStub(channel)
    for name in ("", "inference.GRPCInferenceService", "grpc.health.v1.Health"):
        reply = health.Check(health_pb2.HealthCheckRequest(service=name), timeout=30)
        assert reply.status == health_pb2.HealthCheckResponse.SERVING
    unknown = health_pb2.HealthCheckRequest(service="x")
    assert expect_error(lambda: health.Check(unknown, timeout=30))[0] == grpc.StatusCode.NOT_FOUND
    watch = health.Watch(unknown, timeout=30)
    assert next(watch).status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
    watch.cancel()


def test_reflection_describes_the_service(channel: grpc.Channel) -> None:
    reflection = reflection_pb2_grpc.ServerReflectionStub(channel)
    questions = [
        reflection_pb2.ServerReflectionRequest(list_services=""),
        reflection_pb2.ServerReflectionRequest(file_containing_symbol="inference.GRPCInferenceService"),
    ]
    services, files = reflection.ServerReflectionInfo(iter(questions), timeout=30)
    assert {one.name for one in services.list_services_response.service} == {
        "inference.GRPCInferenceService", "grpc.health.v1.Health",
        "grpc.reflection.v1alpha.ServerReflection",
    }  # fmt: skip
    (content,) = files.file_descriptor_response.file_descriptor_proto
    assert content == pb.DESCRIPTOR.serialized_pb
    large = reflection_pb2.ServerReflectionRequest(file_by_filename="x" * 5000)
    status, _, _ = expect_error(lambda: list(reflection.ServerReflectionInfo(iter([large]), timeout=30)))
    assert status == grpc.StatusCode.RESOURCE_EXHAUSTED


def test_call_has_a_log_line_and_its_id(zoo: Path) -> None:
    trace_id = "4bf92f3577b34da6a3ce929d0e0e4736"
    metadata = (("x-request-id", "mine"), ("traceparent", f"00-{trace_id}-00f067aa0ba902b7-01"))
    with Server(FOVEA_MODELS=str(zoo), FOVEA_GRPC_PORT="0") as server, open_channel(server) as channel:
        _, call = create_stub(channel).ModelInfer.with_call(image_request(), timeout=30, metadata=metadata)
        assert dict(call.trailing_metadata())["x-request-id"] == "mine"
    lines = [json.loads(line) for line in server.log.splitlines()]  # nothing else is on this stream
    (line,) = (one for one in lines if one["event"] == "request")
    expected = {
        "request_id": "mine", "trace_id": trace_id, "client": "127.0.0.1", "protocol": "grpc",
        "route": INFER, "model": "thing", "version": "1", "status": 200, "images": 2,
    }  # fmt: skip
    assert expected.items() <= line.items()
    assert {"read", "queue", "decode", "inference", "encode"} <= line["stage_seconds"].keys()
