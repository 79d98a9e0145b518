"""Texts about the commands: an example of each, and short summaries."""

from __future__ import annotations

from typing import Final

EXAMPLES: Final = {
    "train": "fovea train --data photos --export zoo/pets/1",
    "export": "fovea export runs/pets --out zoo/pets/1",
    "import": "fovea import model.onnx --labels labels.txt --name pets --out zoo --preset imagenet",
    "serve": "fovea serve zoo --port 8000",
    "publish": "fovea publish model.onnx --models zoo --name pets",
    "classify": "fovea classify cat.jpg photos --top-k 3",
    "explain": "fovea explain cat.jpg --out heat.png",
    "bench": "fovea bench http://127.0.0.1:8000 cat.jpg --rate 50",
    "doctor": "fovea doctor --seconds 10",
}
"""A call of each command, shown in its help and where something is missing."""

SUMMARIES: Final = {
    "export": "Turn a checkpoint into one ONNX file.",
    "import": "Import an ONNX classifier from elsewhere.",
    "publish": "Put a model into a repository.",
    "classify": "Classify images without a server.",
    "explain": "Show what the model looked at.",
    "doctor": "Say what limits the service on this machine.",
}
"""Lines of the list of commands, where the first sentence of the help is too long for it."""
