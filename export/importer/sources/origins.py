"""The source of an import in its report, contract and model card, and the comparison with its pipeline."""

from __future__ import annotations

from pathlib import Path

from fovea.export.importer.foreign_model import ImportRefused
from fovea.export.importer.graph_input import LAYOUT_OPTION, SIZE_OPTION
from fovea.export.importer.graph_output import TASK_OPTION
from fovea.export.importer.inspect import ForeignModel, ImportRequest
from fovea.export.importer.sources.comparison import PipelineRun, run_network, run_pipeline
from fovea.export.importer.sources.facts import Provenance, ReferenceNetwork
from fovea.service.artifact.geometry import Geometry
from fovea.service.artifact.model_card import ModelCard
from fovea.service.errors import to_one_line


def describe_source(provenance: Provenance | None) -> tuple[tuple[str, str], ...]:
    """Return the source, unless it is simply the file, and its licence, for the report."""
    if provenance is None:
        return ()
    note = f" ({provenance.note})" if provenance.note else ""
    is_file = Path(provenance.source).name == provenance.file
    source = () if is_file else (("source", f"{provenance.source}, {provenance.file}{note}"),)
    return (*source, *((("licence", provenance.licence),) if provenance.licence else ()))


def describe_data(request: ImportRequest) -> str:
    """Return the name of a file on this machine, or a published source with its revision."""
    provenance = request.provenance
    if provenance is None:
        return request.file.name
    return provenance.file if provenance.is_local else f"{provenance.source}, {provenance.file}"


def create_card(request: ImportRequest) -> ModelCard:
    """Return the facts of the source for the model card."""
    provenance = request.provenance
    return ModelCard(
        source=describe_data(request).encode(errors="replace").decode(),
        licence=(provenance.licence if provenance else None) or "",
        library=(provenance.library if provenance else None) or "",
    )


def name_origins(
    facts: tuple[tuple[str, str], ...], provenance: Provenance | None
) -> tuple[tuple[str, str], ...]:
    """Return the facts of the graph with the source's files in place of options that nobody gave."""
    if provenance is None:
        return facts
    origins = {
        "size": (SIZE_OPTION, provenance.size),
        "layout": (LAYOUT_OPTION, provenance.layout),
        "task": (TASK_OPTION, provenance.task),
    }
    named_facts = []
    for name, text in facts:
        option, origin = origins.get(name, ("", None))
        named_facts.append((name, text.replace(option, f"from {origin}") if origin else text))
    return tuple(named_facts)


def run_source(
    request: ImportRequest, foreign: ForeignModel, geometry: Geometry
) -> tuple[PipelineRun | None, str]:
    """Return a run of the source's own pipeline or network, or the reason why there is none.

    The reason is empty for a file alone. Before a network runs in the source's own library, this call closes
    the reference model, so that the weights are in memory only once.

    Raises `VerificationError` if it makes images of another size.
    """
    provenance = request.provenance
    reference = (provenance.reference or provenance.network) if provenance else None
    if reference is None:
        reason = provenance.not_compared if provenance else ""
        return None, f"not with the source's own pipeline: {reason}" if reason else ""
    user_images = sorted(one for one in request.check.rglob("*") if one.is_file()) if request.check else []
    if isinstance(reference, ReferenceNetwork) or reference.has_network:
        foreign.reference.close()
    try:
        if isinstance(reference, ReferenceNetwork):
            return run_network(reference, foreign, geometry, user_images), ""
        return run_pipeline(reference, foreign, geometry, user_images), ""
    except ImportRefused as error:
        return None, f"not with the source's own pipeline: {to_one_line(error)}"
