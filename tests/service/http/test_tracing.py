"""Traces that a real collector receives, by OTLP over HTTP."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from fovea.service.access.caller import Scope
from fovea.service.access.key_editor import add_key
from fovea.service.http.request_record import RequestRecord, TimeSpan
from fovea.service.http.tracing import Tracing
from fovea.service.observability.metrics import STAGES
from tests.pictures import make_jpeg
from tests.servers import Server, run_service

pytestmark = pytest.mark.long

CLASSIFY = "/v1/classify"
TRACE = bytes.fromhex("4bf92f3577b34da6a3ce929d0e0e4736")
PARENT = bytes.fromhex("00f067aa0ba902b7")
SAMPLED = f"00-{TRACE.hex()}-{PARENT.hex()}-01"
SERVER_KIND = 2
ERROR = 2


class Collector:
    """A collector that keeps the spans that are sent to it."""

    def __init__(self) -> None:
        self.spans: list[Any] = []
        self.services: set[str] = set()
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                content = self.rfile.read(int(self.headers["Content-Length"]))
                collector.add_spans(ExportTraceServiceRequest.FromString(content))
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                """Log nothing."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.settings = {
            "FOVEA_TRACES": "true",
            "OTEL_BSP_SCHEDULE_DELAY": "50",
            "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{self.server.server_port}",
        }

    def add_spans(self, request: ExportTraceServiceRequest) -> None:
        for resource in request.resource_spans:
            attributes = {
                attribute.key: attribute.value.string_value for attribute in resource.resource.attributes
            }
            self.services.add(attributes["service.name"])
            for scope in resource.scope_spans:
                self.spans += scope.spans

    def find_spans(self, name: str) -> list[Any]:
        return [span for span in self.spans if span.name == name]


@pytest.fixture
def collector() -> Iterator[Collector]:
    instance = Collector()
    yield instance
    instance.server.shutdown()
    instance.server.server_close()


def read_span_attributes(span: Any) -> dict[str, Any]:
    return {
        attribute.key: attribute.value.string_value or attribute.value.int_value
        for attribute in span.attributes
    }  # fmt: skip


def test_request_has_a_span_per_stage_in_the_caller_trace(collector: Collector, small_zoo: Path) -> None:
    before = time.time_ns()
    with Server(FOVEA_MODELS=str(small_zoo), **collector.settings) as server:
        headers = {"traceparent": SAMPLED, "tracestate": "vendor=7", "X-Request-Id": "my-own-id"}
        assert server.client.post(CLASSIFY, content=make_jpeg(), headers=headers).status_code == 200
    (request,) = collector.find_spans(f"POST {CLASSIFY}")
    assert (request.trace_id, request.parent_span_id, request.trace_state) == (TRACE, PARENT, "vendor=7")
    assert request.kind == SERVER_KIND
    assert read_span_attributes(request) == {
        "http.request.method": "POST", "http.route": CLASSIFY, "http.response.status_code": 200,
        "fovea.request_id": "my-own-id", "fovea.images": 1, "fovea.model": "small", "fovea.version": "1",
    }  # fmt: skip
    child_spans = [span for span in collector.spans if span.parent_span_id == request.span_id]
    ordered_spans = sorted(child_spans, key=lambda span: span.start_time_unix_nano)
    assert [span.name for span in ordered_spans] == list(STAGES)
    assert {span.trace_id for span in child_spans} == {TRACE}
    for span in (request, *child_spans):
        assert before < request.start_time_unix_nano <= span.start_time_unix_nano
        assert span.start_time_unix_nano < span.end_time_unix_nano <= request.end_time_unix_nano
    assert request.end_time_unix_nano < time.time_ns()
    (inference,) = collector.find_spans("inference")
    expected = {"fovea.model": "small", "fovea.version": "1", "fovea.batch_images": 1}
    assert read_span_attributes(inference) == expected
    (batch,) = collector.find_spans("batch")
    assert read_span_attributes(batch) == expected
    assert batch.parent_span_id == b"" and batch.trace_id != TRACE
    assert [(link.trace_id, link.span_id) for link in batch.links] == [(TRACE, request.span_id)]
    assert [(link.trace_id, link.span_id) for link in inference.links] == [(batch.trace_id, batch.span_id)]
    assert collector.services == {"fovea"}


def test_span_names_the_key_and_never_contains_it(
    collector: Collector, small_zoo: Path, tmp_path: Path
) -> None:
    key = add_key(tmp_path / "keys", "phone-app", frozenset({Scope.CLASSIFY}))
    settings = {**collector.settings, "FOVEA_KEYS": str(tmp_path / "keys")}
    with Server(FOVEA_MODELS=str(small_zoo), **settings) as server:
        for value, status in ((f"Bearer {key}", 200), (f"Bearer {key}x", 401)):
            reply = server.client.post(CLASSIFY, content=make_jpeg(), headers={"Authorization": value})
            assert reply.status_code == status
    spans = sorted(collector.find_spans(f"POST {CLASSIFY}"), key=lambda span: span.start_time_unix_nano)
    callers = [read_span_attributes(span).get("fovea.caller") for span in spans]
    assert callers == ["phone-app", None]
    assert key not in str(collector.spans)


def test_batch_span_links_to_all_of_its_requests(collector: Collector, small_zoo: Path) -> None:
    settings = {
        **collector.settings,
        "FOVEA_RUNNERS": "1",
        "FOVEA_BATCH_WAIT_MS": "500",
        "FOVEA_BATCH_MAX": "4",
    }
    with Server(FOVEA_MODELS=str(small_zoo), **settings) as server, ThreadPoolExecutor(4) as pool:
        futures = [pool.submit(httpx.post, f"{server.url}{CLASSIFY}", content=make_jpeg()) for _ in range(4)]
        assert [future.result().status_code for future in futures] == [200] * 4
        form_reply = server.client.post(CLASSIFY, files=[("image", make_jpeg())] * 4)
        assert form_reply.status_code == 200
    requests = {span.span_id: span for span in collector.find_spans(f"POST {CLASSIFY}")}
    batches = collector.find_spans("batch")
    assert len(requests) == 5
    assert sum(read_span_attributes(batch)["fovea.batch_images"] for batch in batches) == 8
    images = {
        span.span_id: read_span_attributes(requests[span.parent_span_id])["fovea.images"]
        for span in collector.find_spans("inference")
    }
    # one span for each model call of each request
    assert len(images) == sum(len(batch.links) for batch in batches)
    for batch in batches:
        linked_ids = {link.span_id for link in batch.links}
        assert len(linked_ids) == len(batch.links) and linked_ids <= set(requests)
        assert (
            sum(read_span_attributes(requests[span_id])["fovea.images"] for span_id in linked_ids)
            >= read_span_attributes(batch)["fovea.batch_images"]
        )
    assert max(len(batch.links) for batch in batches) >= 2  # at least two requests shared a batch


def test_errors_and_refusals_are_traced(collector: Collector, small_zoo: Path) -> None:
    with Server(FOVEA_MODELS=str(small_zoo), FOVEA_QUEUE_IMAGES="64", **collector.settings) as server:
        server.client.post(CLASSIFY, content=b"nonsense")
        late_reply = server.client.post(
            CLASSIFY, content=make_jpeg(2000, 2000), headers={"X-Deadline-Ms": "0.001"}
        )
        assert late_reply.status_code == 504
    refused_span, late_span = collector.find_spans(f"POST {CLASSIFY}")
    assert read_span_attributes(refused_span)["error.type"] == "unsupported_format"
    assert refused_span.status.code != ERROR  # a client error is no error of the service
    assert (late_span.status.code, late_span.status.message) == (ERROR, "deadline_exceeded")
    assert collector.find_spans("batch") == []


def test_otel_variables_set_the_sampler_and_service_name(
    collector: Collector, small_zoo: Path, tmp_path: Path
) -> None:
    settings = {
        **collector.settings, "OTEL_SERVICE_NAME": "photos", "OTEL_TRACES_SAMPLER": "parentbased_always_off",
    }  # fmt: skip
    with (
        (tmp_path / "log").open("w") as log,
        Server({"stderr": log}, FOVEA_MODELS=str(small_zoo), **settings) as server,
    ):
        server.client.post(CLASSIFY, content=make_jpeg())
        server.client.post(CLASSIFY, content=make_jpeg(), headers={"traceparent": SAMPLED})
    assert {span.trace_id for span in collector.spans if span.name != "batch"} == {TRACE}
    assert (len(collector.find_spans("batch")), collector.services) == (1, {"photos"})
    lines = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    unsampled_id, sampled_id = (line["trace_id"] for line in lines if line["event"] == "request")
    assert sampled_id == TRACE.hex()
    assert len(unsampled_id) == 32 and unsampled_id != sampled_id


@pytest.mark.parametrize("header", ["", "nonsense", f"00-{32 * '0'}-{PARENT.hex()}-01", "00-ÿ-1-01"])
def test_request_without_a_valid_trace_starts_one(collector: Collector, small_zoo: Path, header: str) -> None:
    with Server(FOVEA_MODELS=str(small_zoo), **collector.settings) as server:
        headers = [(b"traceparent", header.encode("latin-1"))]
        assert server.client.post(CLASSIFY, content=make_jpeg(), headers=headers).status_code == 200
    (request,) = collector.find_spans(f"POST {CLASSIFY}")
    assert (len(request.trace_id), request.parent_span_id) == (16, b"")


PATIENT_EXPORT = {"FOVEA_TRACES": "true", "OTEL_EXPORTER_OTLP_TIMEOUT": "600"}
"""Settings with which the exporter tries for ten minutes, longer than a test lets a service stop."""


def test_missing_collector_delays_neither_answers_nor_stop(small_zoo: Path) -> None:
    settings = {**PATIENT_EXPORT, "OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9"}
    with Server(FOVEA_MODELS=str(small_zoo), **settings) as server:
        for _ in range(20):
            assert server.client.post(CLASSIFY, content=make_jpeg()).status_code == 200
    assert server.process.returncode == 0


def test_silent_collector_delays_neither_answers_nor_stop(small_zoo: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent_socket:
        endpoint = f"http://127.0.0.1:{silent_socket.getsockname()[1]}"
        settings = {**PATIENT_EXPORT, "OTEL_EXPORTER_OTLP_ENDPOINT": endpoint}
        with Server(FOVEA_MODELS=str(small_zoo), **settings) as server:
            assert server.client.post(CLASSIFY, content=make_jpeg()).status_code == 200
        assert server.process.returncode == 0


def test_invalid_tracestate_is_not_logged(collector: Collector, small_zoo: Path) -> None:
    with Server(FOVEA_MODELS=str(small_zoo), **collector.settings) as server:
        for state in ("hunter2 is no member", "x" * 1000, "a=b,a=c"):
            headers = {"traceparent": SAMPLED, "tracestate": state}
            assert server.client.post(CLASSIFY, content=make_jpeg(), headers=headers).status_code == 200
    events = [json.loads(line)["event"] for line in server.log.splitlines()]
    assert events[1:] == ["request"] * 3
    assert "hunter2" not in server.log


def test_request_of_many_images_has_one_span_per_stage(collector: Collector, small_zoo: Path) -> None:
    with Server(FOVEA_MODELS=str(small_zoo), **collector.settings) as server:
        assert server.client.post(CLASSIFY, files=[("image", make_jpeg())] * 30).status_code == 200
    assert sorted(span.name for span in collector.spans) == sorted([*STAGES, "batch", f"POST {CLASSIFY}"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"OTEL_BSP_MAX_EXPORT_BATCH_SIZE": "4096"}, "max_export_batch_size"),
    ],
)
def test_invalid_trace_setting_is_a_one_line_error(
    small_zoo: Path, settings: dict[str, str], message: str
) -> None:
    result = run_service(FOVEA_MODELS=str(small_zoo), FOVEA_TRACES="true", **settings)
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert result.stderr.startswith("fovea: FOVEA_TRACES: ")
    assert message in result.stderr


def test_two_workers_send_all_their_traces(collector: Collector, small_zoo: Path) -> None:
    settings = {**collector.settings, "FOVEA_WORKERS": "2", "FOVEA_RUNNERS": "1"}
    with Server(FOVEA_MODELS=str(small_zoo), **settings) as server:
        for _ in range(6):
            assert httpx.post(f"{server.url}{CLASSIFY}", content=make_jpeg()).status_code == 200
    assert len(collector.find_spans(f"POST {CLASSIFY}")) == 6


def test_missing_trace_package_is_named_at_the_start(small_zoo: Path, tmp_path: Path) -> None:
    patch = "import sys; sys.modules['opentelemetry.exporter'] = None"
    (tmp_path / "sitecustomize.py").write_text(patch)
    result = run_service(FOVEA_MODELS=str(small_zoo), FOVEA_TRACES="true", PYTHONPATH=str(tmp_path))
    assert result.returncode == 2
    assert result.stderr == (
        "fovea: FOVEA_TRACES needs the extra `traces`: "
        "the module opentelemetry.exporter.otlp is not installed\n"
    )


# --- spans of made-up requests -------------------------------------------------------------------


def _make_record(*stages: TimeSpan) -> RequestRecord:
    record = RequestRecord("POST", {})
    record.model, record.version, record.status = "small", "1", 200
    record._stages = list(stages)
    record.images = sum(stage.name == "inference" for stage in stages)
    return record


def test_batch_span_waits_for_the_last_of_its_requests() -> None:
    """One of the requests has another image, in a later model call."""
    exporter = InMemorySpanExporter()

    async def run() -> None:
        tracing = Tracing(exporter)
        first_call, second_call = (
            TimeSpan("inference", 10.0, 0.01, batch_size=2),
            TimeSpan("inference", 20.0, 0.01, batch_size=1),
        )
        tracing.trace_request(_make_record(first_call), 0.1)
        await asyncio.sleep(0.02)
        tracing.trace_request(_make_record(first_call, second_call), 0.2)
        await asyncio.to_thread(tracing.close)

    asyncio.run(run())
    batches = [span for span in exporter.get_finished_spans() if span.name == "batch"]
    assert sorted(len(span.links) for span in batches) == [1, 2]


def test_only_few_images_have_decode_spans_of_their_own() -> None:
    def count_decode_spans(images: int) -> int:
        exporter = InMemorySpanExporter()
        stages = [TimeSpan("decode", float(image), 0.01) for image in range(images)]
        stages += [TimeSpan("inference", 100.0, 0.01, batch_size=images)] * images

        async def run() -> None:
            tracing = Tracing(exporter)
            tracing.trace_request(_make_record(*stages), 0.1)
            await asyncio.to_thread(tracing.close)

        asyncio.run(run())
        return sum(span.name == "decode" for span in exporter.get_finished_spans())

    assert [count_decode_spans(images) for images in (2, 8, 9, 64)] == [2, 8, 1, 1]
