"""Bodies of infer requests, read as the service reads them, without a server: for fuzzing.

`python -m tests.service.infer_bodies` lets atheris look for what the parser does not expect, by how its code
is run through; what it has found is in `test_infer_bodies.py`.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import numpy as np
from starlette.datastructures import QueryParams

from service.api.bodies import Received
from service.api.oip import Infer
from service.api.translation import Asked, Heard
from service.layout import Found
from service.messages import Load, Loaded, Plan, Query
from service.repository import LiveModel
from service.settings import Settings
from service.tensors import Tensor
from tests.graphs import build, contract_of

_PLAN = Plan("cpu", 4, 1, 0, 1, 1_000_000, 1 << 28, 1)

SETTINGS = Settings(json_bytes=100_000, request_images=8)


def model() -> LiveModel:
    """One that takes small tensors of two kinds."""
    loaded = Loaded(contract_of(build()).to_json(), "cpu", 4, 1e6, 0.0, {})
    live = LiveModel.of(
        Found(Path("model.onnx"), None, None, ()), Load(0, "", "", (), _PLAN), loaded, SETTINGS
    )
    live.tensors = (
        Tensor("pixels", np.dtype(np.uint8), (2, 2, 3)),
        Tensor("input", np.dtype(np.float32), (3, 2, 2)),
    )
    return live


def read(live: LiveModel, header: bytes | None, body: bytes) -> Asked:
    """What a request asks. Raises `RequestError`."""
    headers = {} if header is None else {b"inference-header-content-length": header}
    heard = Heard(Received(body, len(body)), headers, QueryParams(), live, SETTINGS)
    return asyncio.run(Infer().read(heard))


def check(live: LiveModel, asked: Asked, size: int) -> None:
    """Whatever was accepted has images, and no more than there may be; all of them lie in the body, and rows
    are whole. Raises `ValueError`."""
    sizes = {tensor.name: tensor.size for tensor in live.tensors}
    if not 0 < len(asked.images) <= SETTINGS.request_images:
        raise ValueError(f"{len(asked.images)} images")
    for image in asked.images:
        if isinstance(image, Query) and image.tensor and len(image.content) != sizes[image.tensor]:
            raise ValueError(f"a row of {len(image.content)} bytes")
    contents = [image.content if isinstance(image, Query) else image for image in asked.images]
    if sum(map(len, contents)) > 4 * size:  # a number of JSON may become a float32
        raise ValueError("more than there was")


def main() -> None:
    """Fuzz until stopped, or as libFuzzer's arguments say."""
    import atheris

    from service.errors import RequestError

    live = model()

    def one_input(data: bytes) -> None:
        provider = atheris.FuzzedDataProvider(data)
        header = str(provider.ConsumeIntInRange(-1, 500)).encode() if provider.ConsumeBool() else None
        body = provider.ConsumeBytes(len(data))
        try:
            check(live, read(live, header, body), len(body))
        except RequestError as error:
            str(error).encode()

    atheris.instrument_all()
    atheris.Setup(sys.argv, one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
