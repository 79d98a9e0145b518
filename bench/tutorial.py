"""The yardstick: an image classifier as tutorials for FastAPI and ONNX Runtime write it.

    TUTORIAL_MODEL=plain.onnx uvicorn bench.tutorial:app

Nothing is tuned: a `def` handler runs in FastAPI's pool of 40 threads, and ONNX Runtime chooses its threads.
The only difference is that the body is the raw image instead of a form, so that every server gets the same
bytes.
"""

from __future__ import annotations

import os
from io import BytesIO
from typing import Annotated, Any

import numpy as np
import onnxruntime as ort
from fastapi import Body, FastAPI
from PIL import Image

SIZE = int(os.environ["TUTORIAL_SIZE"])
RESIZE_TO = int(os.environ["TUTORIAL_RESIZE_TO"])
MEAN = np.array([0.485, 0.456, 0.406], np.float32)
STD = np.array([0.229, 0.224, 0.225], np.float32)

app = FastAPI()
session = ort.InferenceSession(os.environ["TUTORIAL_MODEL"], providers=["CPUExecutionProvider"])


def preprocess(image: Image.Image) -> Any:
    """Resize the shorter side to `RESIZE_TO`, crop the centre and normalise to float32 (1, 3, SIZE, SIZE)."""
    shorter = min(image.size)
    width, height = (RESIZE_TO * side // shorter for side in image.size)
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = round((width - SIZE) / 2), round((height - SIZE) / 2)
    image = image.crop((left, top, left + SIZE, top + SIZE))
    pixels = np.asarray(image, np.float32) / 255
    return ((pixels - MEAN) / STD).transpose(2, 0, 1)[None]


@app.post("/classify")
def classify(body: Annotated[bytes, Body(media_type="application/octet-stream")]) -> dict[str, Any]:
    """Return the five most probable labels."""
    image = Image.open(BytesIO(body)).convert("RGB")
    logits = session.run(None, {"pixels": preprocess(image)})[0][0]
    exponents = np.exp(logits - logits.max())
    probabilities = exponents / exponents.sum()
    best = np.argsort(-probabilities)[:5]
    return {
        "predictions": [
            {"label": f"label {index}", "index": int(index), "probability": float(probabilities[index])}
            for index in best
        ]
    }
