"""Facts that a source states about its model, with their origin."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from fovea.export.importer.foreign_model import Array
from fovea.export.importer.graph_input import Layout
from fovea.export.importer.preprocessing import Normalization
from fovea.service.artifact.contract import Task
from fovea.service.artifact.geometry import Step

T = TypeVar("T")


@dataclass(frozen=True)
class Stated(Generic[T]):
    """A value, and the file or program that states it."""

    value: T
    origin: str


@dataclass(frozen=True)
class StatedGeometry:
    """The steps from an image of any size to the model's input of `height` x `width` pixels."""

    height: int
    width: int
    steps: tuple[Step, ...]


@dataclass(frozen=True)
class ImageFacts:
    """The preprocessing that a configuration states; None for what it does not state."""

    normalization: Normalization | None = None
    geometry: StatedGeometry | None = None
    problems: tuple[str, ...] = ()
    """A reason for each part that the configuration states and that Fovea cannot reproduce."""


@dataclass(frozen=True)
class SourceFacts:
    """Everything that a source states; None for what it does not state."""

    name: str | None = None
    """Name for the model in the repository."""
    labels: Stated[Path] | None = None
    """File with the labels, in a form that `read_labels` reads."""
    normalization: Stated[Normalization] | None = None
    geometry: Stated[StatedGeometry] | None = None
    layout: Stated[Layout] | None = None
    task: Stated[Task] | None = None
    licence: str | None = None
    library: str | None = None
    """Program that made the model, such as `transformers`."""
    note: str = ""
    """Remark on the source for the report."""
    problems: tuple[str, ...] = ()
    """Reasons why facts could not be read, for the message about missing options."""


@dataclass(frozen=True)
class ReferenceAnswers:
    """The results of a source's own pipeline for some images."""

    name: str
    """Name for people, such as `ViTImageProcessor of transformers 5.24.0`."""
    values: Array
    """Input of the network, float32 (n, 3, H, W)."""
    outputs: Array | None
    """Output of the source's own network, (n, labels); None if only the preprocessing ran."""


@dataclass(frozen=True)
class ReferencePipeline:
    """The pipeline of the source's own library."""

    name: str
    """Name of the library."""
    run: Callable[[Sequence[Path]], ReferenceAnswers]
    """Run the pipeline on image files. Raises `ImportRefused` if the library cannot run."""
    has_network: bool = False
    """True if the network runs in the library too. Otherwise the original file runs in ONNX Runtime."""


@dataclass(frozen=True)
class NetworkAnswers:
    """The outputs of a converted file in its own library."""

    name: str
    """Name for people, such as `the network in torch 2.13.0`."""
    outputs: Array
    """Output of the network, (n, labels)."""


@dataclass(frozen=True)
class ReferenceNetwork:
    """The network of a converted file in its own library, for files that state no preprocessing."""

    run: Callable[[Array], NetworkAnswers]
    """Run the network on inputs as the converted graph takes them, (n, …). Raises `ImportRefused` if the
    library cannot run."""


@dataclass(frozen=True)
class Source:
    """A source that has been resolved."""

    file: Path
    """ONNX file on this machine."""
    file_name: str
    """Name of this file in the source, for messages and records."""
    origin: str
    """The source for messages and records, with the revision, such as `hf:owner/model@<commit>`."""
    facts: SourceFacts
    work: Path
    """Folder for temporary files of the import."""
    reference: ReferencePipeline | None = None
    network: ReferenceNetwork | None = None
    """The original network, where `reference` does not run it."""
    is_local: bool = True
    """True for a file or folder on this machine."""
    original: Path | None = None
    """File that was converted to `file`; None if nothing was converted."""
    not_compared: str = ""
    """Reason why there is no pipeline of the source's own, if one may be expected."""


@dataclass(frozen=True)
class Provenance:
    """The origin of an imported model and of its facts, for the report and the contract."""

    source: str
    """Source with its revision."""
    file: str
    """Name of the file in the source."""
    is_local: bool = True
    """True for a file or folder on this machine."""
    original: Path | None = None
    """File on this machine that was converted; None if nothing was converted."""
    note: str = ""
    """Remark on the source for the report."""
    size: str | None = None
    """Origin of the input's size, if the source states it and the graph does not."""
    layout: str | None = None
    """Origin of the input's layout, if the source states it and the graph does not."""
    labels: str | None = None
    """Origin of the labels, if the source states them and no option replaces them."""
    normalization: str | None = None
    """Origin of the normalisation, if it is the source's; options that replace single values are named."""
    geometry: str | None = None
    """Origin of the geometry, as for the normalisation."""
    steps: tuple[Step, ...] | None = None
    """Steps from an image to the input, if they are the source's."""
    licence: str | None = None
    library: str | None = None
    task: str | None = None
    """Origin of the task, if the source states it."""
    reference: ReferencePipeline | None = None
    """Pipeline to compare with; None if there is none."""
    network: ReferenceNetwork | None = None
    """Network to compare with if there is no pipeline; None if there is none."""
    not_compared: str = ""
    """Reason why the import is not compared with the source's own pipeline."""
