"""The small TFLite files of the tests, with random weights.

Run `python make_files.py` with TensorFlow 2.21.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import tensorflow as tf

FOLDER: Final = Path(__file__).parent


def build(side: int, convolution: int) -> Any:
    """Return a classifier of five labels, for one image of side x side pixels."""
    layers = tf.keras.layers
    network = tf.keras.Sequential(
        [
            layers.Input((side, side, 3), batch_size=1),
            layers.Conv2D(8, convolution, strides=2, activation="relu"),
            layers.DepthwiseConv2D(3, activation="relu6"),
            layers.GlobalAveragePooling2D(),
            layers.Dense(5),
            layers.Softmax(),
        ]
    )
    network.layers[3].set_weights([12 * one for one in network.layers[3].get_weights()])
    return network


def draw_examples(side: int) -> Iterator[list[Any]]:
    """Yield images from -1 to 1, for the ranges of the values."""
    random = np.random.default_rng(0)
    for _ in range(50):
        yield [(random.integers(0, 256, (1, side, side, 3)) / 127.5 - 1).astype(np.float32)]


def quantise(network: Any, side: int, kind: Any) -> bytes:
    """Return a network in whole numbers, with inputs and outputs of this type."""
    converter = tf.lite.TFLiteConverter.from_keras_model(network)
    converter.optimizations = [tf.lite.Optimize.DEFAULT]
    converter.representative_dataset = partial(draw_examples, side)
    converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
    converter.inference_input_type = converter.inference_output_type = kind
    content: bytes = converter.convert()
    return content


def main() -> None:
    """Write all files."""
    tf.keras.utils.set_random_seed(0)
    network = build(16, 3)
    (FOLDER / "float.tflite").write_bytes(tf.lite.TFLiteConverter.from_keras_model(network).convert())
    for name, kind in (("int8", tf.int8), ("uint8", tf.uint8)):
        (FOLDER / f"{name}.tflite").write_bytes(quantise(network, 16, kind))
    teachable = build(224, 7)
    converter = tf.lite.TFLiteConverter.from_keras_model(teachable)
    (FOLDER / "teachable.tflite").write_bytes(converter.convert())
    (FOLDER / "teachable-uint8.tflite").write_bytes(quantise(teachable, 224, tf.uint8))


if __name__ == "__main__":
    main()
