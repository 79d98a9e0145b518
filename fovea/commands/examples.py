"""Texts about the commands: an example of each, and short summaries."""

from __future__ import annotations

from typing import Final

EXAMPLES: Final = {
    "train": "fovea train --data photos --export zoo/pets/1",
    "export": "fovea export runs/pets --out zoo/pets/1",
    "import": "fovea import model.onnx --labels labels.txt --name pets --out zoo --preset imagenet",
    "quantize": "fovea quantize zoo/pets/1 --images photos",
    "serve": "fovea serve zoo --port 8000",
    "publish": "fovea publish model.onnx --models zoo --name pets",
    "models": "fovea models zoo",
    "show": "fovea show pets/1",
    "remove": "fovea remove pets/1 --models zoo",
    "keys": "fovea keys add phone-app --scope classify --file keys",
    "classify": "fovea classify cat.jpg photos --top-k 3",
    "explain": "fovea explain cat.jpg --out heat.png",
    "bench": "fovea bench http://127.0.0.1:8000 cat.jpg --rate 50",
    "doctor": "fovea doctor --seconds 10",
}
"""An example of each command, for its help and for messages about missing options."""

SUMMARIES: Final = {
    "export": "Export a checkpoint to one ONNX file.",
    "import": "Import a classifier from the hub or another tool.",
    "quantize": "Make a faster version in int8, proven on images.",
    "publish": "Add a model to a repository.",
    "models": "List the models in a repository.",
    "show": "Describe a model by its contract.",
    "remove": "Remove a version from a repository.",
    "keys": "Add, list or remove API keys.",
    "classify": "Classify images without a server.",
    "explain": "Draw a heat map of what the model looked at.",
    "doctor": "Find what limits the service on this machine.",
}
"""Short help of commands whose first sentence of help does not fit into the list of commands."""
