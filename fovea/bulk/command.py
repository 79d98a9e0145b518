"""`fovea classify --out`: the work behind the command."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from fovea.bulk.conditions import parse_condition
from fovea.bulk.engine import Engine
from fovea.bulk.entries import ImageEntry
from fovea.bulk.local_engine import LocalEngine
from fovea.bulk.table_run import TableRun, check_output
from fovea.bulk.tables.choice import choose_format
from fovea.service.cli import load_live_model
from fovea.service.inference.preprocess import configure_pillow
from fovea.service.serving.ranking import find_coverage
from fovea.service.settings import load_settings


def classify_to_table(
    sources: Sequence[str],
    out: Path,
    *,
    model: str | None,
    top_k: int,
    coverage: float | None,
    resume: bool,
    force: bool,
    where: str | None,
    engine: Literal["local", "ray"] = "local",
    address: str | None = None,
    **overrides: Any,
) -> None:
    """Classify all images of the sources, write a table, and print one line about the run.

    `engine` classifies in this process or in a Ray cluster at `address` (`RayEngine`). `overrides` are
    settings. Raises `StartError` for whatever hinders the run, also if there are no images,
    and `WriteError`; finished parts stay then. The error of an image is a row.
    """
    table_format = choose_format(out)
    condition = None if where is None else parse_condition(where)
    if not check_output(out, table_format, resume=resume, force=force):
        print(f"{out} is finished already; --force makes it anew")
        return
    settings = load_settings(**overrides)
    configure_pillow()
    predictor, live_model = load_live_model(settings, model)
    label_set = None if coverage is None else find_coverage(live_model.contract, coverage)
    classifier: Engine
    if engine == "ray":
        from fovea.bulk.ray_engine import RayEngine

        classifier = RayEngine(
            predictor, live_model, settings=settings, top_k=top_k, coverage=label_set, address=address
        )
    else:
        classifier = LocalEngine(
            predictor, live_model, top_k=top_k, coverage=label_set, max_bytes=settings.body_bytes
        )
    run = TableRun(classifier, out, table_format, sources=sources, where=where, condition=condition)

    def list_all() -> Iterator[ImageEntry]:
        return _list_entries(sources)

    print(f"wrote {out}: {run.write_table(list_all, resume=resume)}")


# --- until inputs are there ---
from dataclasses import dataclass  # noqa: E402

from fovea.service.cli import _expand_folders, _printable_name  # noqa: E402
from fovea.service.image_files import read_image_file  # noqa: E402


@dataclass(frozen=True)
class _FileEntry:
    path: Path
    is_named: bool

    @property
    def name(self) -> str:
        return _printable_name(self.path)

    def read(self, max_bytes: int) -> bytes:
        return read_image_file(self.path, max_bytes)


def _list_entries(sources: Sequence[str]) -> Iterator[ImageEntry]:
    for path, is_named in _expand_folders([Path(one) for one in sources]):
        yield _FileEntry(path, is_named)
