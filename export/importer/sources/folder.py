"""A folder or an ONNX file on this machine, with the configuration files of the hub's layout beside it."""

from __future__ import annotations

import re
from collections.abc import Container, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from fovea.export.importer.file_format import describe_folder
from fovea.export.importer.foreign_model import ImportRefused
from fovea.export.importer.graph_input import Layout
from fovea.export.importer.sources.config_values import ConfigError, read_json
from fovea.export.importer.sources.facts import (
    ImageFacts,
    ReferencePipeline,
    Source,
    SourceFacts,
    Stated,
)
from fovea.export.importer.sources.library_models import convert_safetensors, create_reference
from fovea.export.importer.sources.metadata import add_metadata_facts
from fovea.export.importer.sources.model_config import (
    ModelConfig,
    is_timm_config,
    read_model_config,
    require_image_classifier,
    write_labels,
)
from fovea.export.importer.sources.onnx_choice import choose_onnx_file
from fovea.export.importer.sources.processor_config import find_class_name, read_processor_config
from fovea.export.importer.sources.timm_config import read_timm_config
from fovea.service.artifact.model_card import CARD_FILE, read_front_matter
from fovea.service.artifact.repository import MODEL_NAME_PATTERN

LABELS_FILE: Final = "labels.txt"
"""Labels in a folder without a configuration, as Azure Custom Vision and Teachable Machine write them."""

CONFIG_FILE: Final = "config.json"
PROCESSOR_FILES: Final = ("preprocessor_config.json", "processor_config.json")
WEIGHTS_FILE: Final = "model.safetensors"
WEIGHTS_INDEX_FILE: Final = "model.safetensors.index.json"

_USUAL_STEMS: Final = re.compile(r"model([_.-].*)?|onnx|saved_model")
"""Names of files that say nothing about the model."""

_PICKLES: Final = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def read_onnx_file(path: Path, work: Path) -> Source:
    """Return an ONNX file with the facts in the files beside it.

    The files may describe another model: those that cannot be used are ignored with a reason.
    """
    folders = [path.parent, path.parent.parent] if path.parent.name == "onnx" else [path.parent]
    files = HubFiles.find(folders)
    stem = path.stem
    if _USUAL_STEMS.fullmatch(stem):
        stem = folders[-1].absolute().name
    facts = add_metadata_facts(path, str(path), files.read_facts(to_model_name(stem), work), work)
    reference, reason = _find_reference(files, str(path), facts, work, with_model=False)
    return Source(path, path.name, str(path), facts, work, reference, not_compared=reason)


def read_folder(folder: Path, work: Path, choice: str | None, origin: str | None = None) -> Source:
    """Return the ONNX file in a folder of the hub's layout, and the facts that its files state.

    `origin` is the name of the folder in messages, if it is a temporary one. Raises `ImportRefused`.
    """
    sizes = list_files(folder)
    origin = origin or str(folder)
    files = HubFiles.find([folder])
    require_image_classifier(origin, files.config)
    name = choose_onnx_file(origin, sizes, choice)
    if name is None and not has_safetensors(sizes):
        raise ImportRefused(describe_folder(folder) or explain_missing_onnx(origin, sizes))
    return complete_source(folder, folder / name if name else None, name, origin, work)


def has_safetensors(names: Container[str]) -> bool:
    """Return whether a source has weights that can be converted."""
    return WEIGHTS_FILE in names or WEIGHTS_INDEX_FILE in names


def complete_source(folder: Path, file: Path | None, name: str | None, origin: str, work: Path) -> Source:
    """Return the source in a folder of the hub's layout.

    `file` is the ONNX file, which is called `name` in the folder. It is None for safetensors, which are
    converted. Raises `ImportRefused`.
    """
    folders = [(folder / name).parent, folder] if name and (folder / name).parent != folder else [folder]
    files = HubFiles.find(folders)
    facts = files.read_facts(to_model_name(folder.absolute().name), work)
    if facts.labels is None and (folder / LABELS_FILE).is_file():
        facts = replace(facts, labels=Stated(folder / LABELS_FILE, LABELS_FILE))
    original: Path | None = None
    if file is None:
        if facts.library is None:
            raise ImportRefused(
                f"{origin} has {WEIGHTS_FILE} without a {CONFIG_FILE} of transformers or timm, so its "
                "network is unknown; export it to ONNX"
            )
        name = WEIGHTS_FILE if (folder / WEIGHTS_FILE).is_file() else WEIGHTS_INDEX_FILE
        original = folder / name
        file, facts = convert_safetensors(folder, origin, facts, files.config, work)
    else:
        facts = add_metadata_facts(file, origin, facts, work)
    reference, reason = _find_reference(files, origin, facts, work, with_model=original is not None)
    return Source(
        file, name or file.name, origin, facts, work, reference, original=original, not_compared=reason
    )


def _find_reference(
    files: HubFiles, origin: str, facts: SourceFacts, work: Path, *, with_model: bool
) -> tuple[ReferencePipeline | None, str]:
    """Return the pipeline of the library that made the model, or the reason why it cannot run."""
    if facts.library not in ("transformers", "timm"):
        return None, ""
    folder = files.config_folder if facts.library == "timm" else files.processor_folder
    if folder is None:
        return None, f"there is no {PROCESSOR_FILES[0]}"
    reference = create_reference(folder, origin, facts.library, work, with_model=with_model)
    return reference, "" if reference else f"its own pipeline needs {facts.library}, which is not installed"


def list_files(folder: Path) -> dict[str, int | None]:
    """Return the names of the files in a folder and its direct sub-folders, with their bytes."""
    try:
        paths = [path for pattern in ("*", "*/*") for path in folder.glob(pattern) if path.is_file()]
        return {path.relative_to(folder).as_posix(): path.stat().st_size for path in paths}
    except OSError as error:
        raise ImportRefused(f"cannot list {folder}: {error.strerror}") from None


def explain_missing_onnx(origin: str, names: Mapping[str, object]) -> str:
    """Return a sentence on a source without an ONNX file and without weights that can be converted."""
    pickles = [name for name in names if name.endswith(_PICKLES)]
    if pickles:
        return (
            f"{origin} has its weights in a pickle only ({pickles[0]}), which Fovea never loads, because a "
            "pickle can run any program; save the model with save_pretrained(..., safe_serialization=True), "
            "or export it to ONNX"
        )
    others = [name for name in names if name.endswith((".h5", ".msgpack", ".tflite", ".gguf"))]
    found = f"; it has {', '.join(sorted(others)[:3])}" if others else ""
    return f"{origin} has neither an ONNX file nor {WEIGHTS_FILE}{found}; export the model to ONNX first"


def to_model_name(text: str) -> str | None:
    """Return the text as a name for a model in a repository; None if nothing of it is left."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-._")
    return name if MODEL_NAME_PATTERN.fullmatch(name) else None


@dataclass(frozen=True)
class HubFiles:
    """The configuration files of a model in the hub's layout; {} for a file that is missing."""

    config: Mapping[str, Any]
    config_folder: Path | None
    processor: Mapping[str, Any]
    processor_name: str
    processor_folder: Path | None
    card: Mapping[str, str]
    problems: tuple[str, ...]

    @classmethod
    def find(cls, folders: list[Path]) -> HubFiles:
        """Read each file from the first of the folders that has it. A broken file is a problem."""
        problems: list[str] = []
        config = _read_first(folders, CONFIG_FILE, problems)
        config_folder = next((one for one in folders if (one / CONFIG_FILE).is_file()), None)
        processor: Mapping[str, Any] = {}
        processor_name = PROCESSOR_FILES[0]
        processor_folder: Path | None = None
        for name in PROCESSOR_FILES:
            values = _read_first(folders, name, problems)
            inner = values.get("image_processor")  # transformers 5 may write all processors to one file
            values = inner if isinstance(inner, dict) else values
            if values and not processor:
                processor, processor_name = values, name
                processor_folder = next(one for one in folders if (one / name).is_file())
        card: Mapping[str, str] = {}
        for folder in folders:
            card = card or read_front_matter(folder / CARD_FILE)
        return cls(config, config_folder, processor, processor_name, processor_folder, card, tuple(problems))

    @property
    def model_config(self) -> ModelConfig:
        """Facts in `config.json`."""
        return read_model_config(self.config)

    def read_facts(self, name: str | None, work: Path) -> SourceFacts:
        """Return the facts; labels are written to a file in `work`."""
        if not self.config and not self.processor:
            return SourceFacts(name, licence=self.card.get("license"), problems=self.problems)
        model = self.model_config
        labels = None
        if model.labels is not None:
            write_labels(model.labels, work / "labels.json")
            labels = Stated(work / "labels.json", CONFIG_FILE)
        images, origin = self._read_image_facts(model)
        geometry = images.geometry
        return SourceFacts(
            name=name,
            labels=labels,
            normalization=Stated(images.normalization, origin) if images.normalization else None,
            geometry=Stated(geometry, origin) if geometry else None,
            layout=Stated(Layout.NCHW, model.library) if model.library else None,
            task=Stated(model.task, f"problem_type in {CONFIG_FILE}") if model.task else None,
            licence=self.card.get("license"),
            library=model.library,
            problems=(*self.problems, *model.problems, *(f"{origin}: {one}" for one in images.problems)),
        )

    def _read_image_facts(self, model: ModelConfig) -> tuple[ImageFacts, str]:
        """Return the preprocessing and its origin."""
        pretrained = self.config.get("pretrained_cfg")
        if isinstance(pretrained, dict) or is_timm_config(self.config):
            return read_timm_config(self.config), f"{CONFIG_FILE} of timm"
        if not self.processor:
            return ImageFacts(problems=("there is none",)), PROCESSOR_FILES[0]
        facts = read_processor_config(self.processor, model.model_type)
        name = find_class_name(self.processor, model.model_type)
        return facts, f"{self.processor_name}{f', {name}ImageProcessor' if name else ''}"


def _read_first(folders: list[Path], name: str, problems: list[str]) -> dict[str, Any]:
    for folder in folders:
        if (folder / name).is_file():
            try:
                return read_json(folder / name)
            except ConfigError as error:
                problems.append(str(error))
                return {}
    return {}
