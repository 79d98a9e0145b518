"""Repositories on the Hugging Face hub, by `huggingface_hub`: its cache, its token and its progress bar."""

from __future__ import annotations

import errno
import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, Final

from fovea.export.importer.foreign_model import ImportRefused
from fovea.export.importer.sources.config_values import ConfigError, read_json, to_mapping
from fovea.export.importer.sources.facts import Source
from fovea.export.importer.sources.folder import (
    CONFIG_FILE,
    PROCESSOR_FILES,
    WEIGHTS_FILE,
    WEIGHTS_INDEX_FILE,
    complete_source,
    explain_missing_onnx,
    has_safetensors,
    list_files,
    to_model_name,
)
from fovea.export.importer.sources.model_config import require_image_classifier
from fovea.export.importer.sources.onnx_choice import choose_onnx_file
from fovea.service.artifact.model_card import CARD_FILE
from fovea.service.errors import to_one_line

HUB_PREFIX: Final = "hf:"

_WEIGHTS: Final = re.compile(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?")
"""Files with safetensors, in one or several parts."""

_REPOSITORY: Final = re.compile(r"(?!.*(?:--|\.\.|\.git$))\w(?:[\w.-]*\w)?/\w(?:[\w.-]{0,94}\w)?", re.ASCII)
"""Names of repositories that the hub allows. `huggingface_hub` raises an error of its own for others."""

_SHOWN_COMMIT: Final = 12
"""Number of digits of a commit in messages; records have all."""

_TIMEOUT: Final = 30.0
"""Time limit for the answer about a repository, in seconds. Downloads have the limit of `huggingface_hub`."""

_STORAGE_ERRORS: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EROFS)
"""Errors of the disk with the cache, and not of the network."""

_CACHED_FILES: Final = (CONFIG_FILE, "onnx/model.onnx", "model.onnx", *PROCESSOR_FILES, CARD_FILE)
"""Files by which a snapshot in the cache is found."""


@dataclass(frozen=True)
class HubReference:
    """A repository and its revision, as the user wrote them."""

    repository: str
    revision: str | None

    @classmethod
    def parse(cls, text: str) -> HubReference:
        """Parse `hf:OWNER/MODEL[@REVISION]`. Raises `ImportRefused`."""
        repository, separator, revision = text.removeprefix(HUB_PREFIX).partition("@")
        if not _REPOSITORY.fullmatch(repository) or (separator and not revision):
            raise ImportRefused(
                f"{text!r} is not hf:OWNER/MODEL or hf:OWNER/MODEL@REVISION, such as hf:google/vit-base@main"
            )
        return cls(repository, revision or None)

    def __str__(self) -> str:
        return f"{HUB_PREFIX}{self.repository}{f'@{self.revision}' if self.revision else ''}"


@dataclass(frozen=True)
class _Snapshot:
    """One commit of a repository."""

    reference: HubReference
    commit: str
    sizes: Mapping[str, int | None]
    """Files of the commit, or the cached files if the hub cannot be reached, with their bytes."""
    pipeline_tag: str | None
    cached_folder: Path | None
    """Folder in the cache if the hub cannot be reached."""
    reason: str = ""
    """Reason why the hub cannot be reached."""

    def fetch(self, name: str) -> Path:
        """Return the path of a file, downloaded or cached. Raises `ImportRefused`."""
        if self.cached_folder is not None:
            return self.cached_folder / name
        path = _download(self.reference, self.commit, name, force=False)
        size = self.sizes[name]
        if size is not None and path.stat().st_size != size:  # an earlier copy of the cache was cut short
            path = _download(self.reference, self.commit, name, force=True)
            if path.stat().st_size != size:
                raise ImportRefused(
                    f"{name} of {self.reference} has {path.stat().st_size} bytes after the download, and the "
                    f"hub says {size}; try again later"
                )
        return path

    def record_revision(self, name: str) -> None:
        """Let the cache know which commit the revision is, for imports without a network.

        `name` is a file that has been downloaded. Files are downloaded by commit, and the cache then learns
        no name of a branch.
        """
        if self.cached_folder is None and self.reference.revision != self.commit:
            with suppress(ImportRefused):  # the revision has just moved
                _download(self.reference, self.reference.revision, name, force=False)


def read_hub_repository(text: str, work: Path, choice: str | None) -> Source:
    """Return the ONNX file of a repository on the hub and its facts.

    The weights are downloaded last: what is known before can rule the model out. Raises `ImportRefused`.
    """
    reference = HubReference.parse(text)
    _require_library(text)
    snapshot = _open_snapshot(reference)
    origin = f"{HUB_PREFIX}{reference.repository}@{snapshot.commit}"
    for name in (CONFIG_FILE, *PROCESSOR_FILES, CARD_FILE):
        if name in snapshot.sizes:
            folder = snapshot.fetch(name).parent
            snapshot.record_revision(name)
            if name == CONFIG_FILE:
                _require_image_classifier(reference, folder / name, snapshot.pipeline_tag)
    if CONFIG_FILE not in snapshot.sizes:
        require_image_classifier(str(reference), {}, snapshot.pipeline_tag)
    if snapshot.cached_folder is not None:
        _require_cached_weights(snapshot, choice)
    onnx_name = choose_onnx_file(str(reference), snapshot.sizes, choice)
    if onnx_name is None and not has_safetensors(snapshot.sizes):
        raise ImportRefused(explain_missing_onnx(str(reference), snapshot.sizes))
    file = None if onnx_name is None else _fetch_onnx_file(snapshot, onnx_name, work)
    first = onnx_name or ""
    if onnx_name is None:
        for first in (one for one in snapshot.sizes if _WEIGHTS.fullmatch(one)):
            snapshot.fetch(first)
    root = snapshot.fetch(first).parents[len(PurePosixPath(first).parts) - 1]
    source = complete_source(root, file, onnx_name, origin, work)
    facts = replace(
        source.facts,
        name=to_model_name(reference.repository.partition("/")[2]),
        note="from the local cache: the hub cannot be reached" if snapshot.cached_folder else "",
    )
    return replace(source, facts=facts, is_local=False)


def pin_reference(text: str) -> str:
    """Return `hf:OWNER/MODEL@COMMIT` for a reference, by the hub or, without it, by the cache.

    Raises `ImportRefused`.
    """
    reference = HubReference.parse(text)
    _require_library(text)
    return f"{HUB_PREFIX}{reference.repository}@{_open_snapshot(reference).commit}"


def _require_library(text: str) -> None:
    try:
        import huggingface_hub  # noqa: F401 - only whether it is installed
    except ImportError:
        raise ImportRefused(f"{text} needs huggingface_hub: pip install 'fovea-serve[hub]'") from None
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it warns of missing tokens


def _require_image_classifier(reference: HubReference, path: Path, tag: str | None) -> None:
    try:
        config: Mapping[str, Any] = read_json(path)
    except ConfigError:  # named with the missing options, if they are needed
        config = {}
    require_image_classifier(str(reference), config, tag)


def _fetch_onnx_file(snapshot: _Snapshot, name: str, work: Path) -> Path:
    """Return the path of the file, beside its external weights.

    The cache holds links to files elsewhere, and a model may not read files outside its folder.
    """
    others = [
        other
        for other in snapshot.sizes
        if other.startswith((f"{name}_data", f"{name}.data")) and not other.endswith(".onnx")
    ]
    if not others:
        return snapshot.fetch(name)
    folder = work / "onnx"
    folder.mkdir()
    for one in (name, *others):
        _link_or_copy(snapshot.fetch(one).resolve(), folder / PurePosixPath(one).name)
    return folder / PurePosixPath(name).name


def _link_or_copy(file: Path, target: Path) -> None:
    try:
        os.link(file, target)
    except OSError:  # on another disk, or without the right to make links
        shutil.copyfile(file, target)


# --- the hub -------------------------------------------------------------------------------------


def _open_snapshot(reference: HubReference) -> _Snapshot:
    from huggingface_hub import HfApi

    try:
        with _translate_errors(reference, "the list of its files"):
            info = HfApi().model_info(
                reference.repository, revision=reference.revision, files_metadata=True, timeout=_TIMEOUT
            )
    except _HubUnreachable as error:
        return _find_cached_snapshot(reference, str(error))
    sizes = {one.rfilename: one.size for one in info.siblings or ()}
    if info.sha is None:
        raise ImportRefused(f"the hub states no commit of {reference}; try again later")
    return _Snapshot(reference, info.sha, sizes, info.pipeline_tag, None)


def _find_cached_snapshot(reference: HubReference, reason: str) -> _Snapshot:
    """Return the snapshot in the local cache. Raises `ImportRefused` if there is none."""
    from huggingface_hub import constants, try_to_load_from_cache

    for name in _CACHED_FILES:
        path = try_to_load_from_cache(reference.repository, name, revision=reference.revision)
        if isinstance(path, str):
            folder = Path(path).parents[len(PurePosixPath(name).parts) - 1]
            return _Snapshot(reference, folder.name, list_files(folder), None, folder, reason)
    raise ImportRefused(
        f"{reference}: the hub cannot be reached ({reason}), and the cache {constants.HF_HUB_CACHE} has no "
        f"{_CACHED_FILES[0]} and no ONNX file of {reference.repository} at {reference.revision or 'main'}; "
        "connect this machine, or copy the repository here and import its folder"
    )


def _require_cached_weights(snapshot: _Snapshot, choice: str | None) -> None:
    """Raise `ImportRefused` if the cache lacks the chosen ONNX file, or all or some of the weights."""
    problem = _find_cache_problem(snapshot, choice)
    if problem:
        raise ImportRefused(
            f"{snapshot.reference}: the hub cannot be reached ({snapshot.reason}), and {problem}; connect "
            "this machine, or copy the repository here and import its folder"
        )


def _find_cache_problem(snapshot: _Snapshot, choice: str | None) -> str:
    """Return a sentence on the files that the cache lacks; an empty text if it has enough."""
    names = sorted(snapshot.sizes)
    if choice is not None:
        try:
            choose_onnx_file("the cache", snapshot.sizes, choice)
        except ImportRefused as error:
            return str(error)
    elif not any(name.endswith(".onnx") for name in names):
        if not has_safetensors(names):
            return f"the cache has only {', '.join(names)}"
        missing_files = _find_missing_weights(snapshot)
        return f"the cache lacks {', '.join(missing_files)}" if missing_files else ""
    return ""


def _find_missing_weights(snapshot: _Snapshot) -> list[str]:
    """Return the files that the index of the weights names and the cache lacks."""
    if snapshot.cached_folder is None or WEIGHTS_FILE in snapshot.sizes:
        return []
    try:
        files = to_mapping("weight_map", read_json(snapshot.cached_folder / WEIGHTS_INDEX_FILE)["weight_map"])
    except (ConfigError, KeyError):  # the conversion explains it
        return []
    return sorted({str(name) for name in files.values()} - snapshot.sizes.keys())


def _download(reference: HubReference, commit: str | None, name: str, *, force: bool) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        with _translate_errors(reference, name):
            return Path(hf_hub_download(reference.repository, name, revision=commit, force_download=force))
    except _HubUnreachable as error:
        raise ImportRefused(
            f"cannot download {name} of {reference}: {error}; run the command again to go on"
        ) from None


class _HubUnreachable(Exception):
    """The hub does not answer; the message is the reason."""


@contextmanager
def _translate_errors(reference: HubReference, what: str) -> Iterator[None]:
    """Turn the errors of `huggingface_hub` into `ImportRefused` or `_HubUnreachable`."""
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError:
        raise ImportRefused(
            f"{reference} is gated: accept its terms at https://huggingface.co/{reference.repository}, then "
            "run `hf auth login` or set HF_TOKEN"
        ) from None
    except errors.RepositoryNotFoundError:
        raise ImportRefused(
            f"there is no repository {reference.repository} on the hub, or it is private; for a private one "
            "run `hf auth login` or set HF_TOKEN"
        ) from None
    except errors.RevisionNotFoundError:
        raise ImportRefused(_describe_revision(reference)) from None
    except errors.LocalEntryNotFoundError as error:
        raise _HubUnreachable(to_one_line(_find_cause(error))) from None
    except errors.EntryNotFoundError:
        raise ImportRefused(f"{reference} has no file {what} any more; run the command again") from None
    except errors.HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        if status in (401, 403):
            raise ImportRefused(
                f"the hub refuses {what} of {reference} (status {status}): run `hf auth login` again, or set "
                "HF_TOKEN to a token that may read this repository"
            ) from None
        raise _HubUnreachable(f"status {status}" if status else to_one_line(error)) from None
    except OSError as error:
        if error.errno in _STORAGE_ERRORS:
            raise ImportRefused(
                f"cannot store {what} of {reference} in {os.environ.get('HF_HOME', '~/.cache/huggingface')}: "
                f"{error.strerror}; free space, or set HF_HOME to another folder"
            ) from None
        raise _HubUnreachable(to_one_line(error)) from None
    except ImportRefused:
        raise
    except Exception as error:  # httpx and xet have no base class in common
        raise _HubUnreachable(to_one_line(error)) from None


def _find_cause(error: Exception) -> Exception:
    """Return the error that caused another one, or the error itself."""
    return error.__cause__ if isinstance(error.__cause__, Exception) else error


def _describe_revision(reference: HubReference) -> str:
    """Return a sentence on a revision that is missing, with the commit at which `main` is."""
    from huggingface_hub import HfApi

    try:
        commit = HfApi().model_info(reference.repository).sha or ""
    except Exception:  # as above; the sentence is complete without it
        commit = ""
    now = f"; main is at {commit[:_SHOWN_COMMIT]}" if commit else ""
    return f"{reference.repository} has no revision {reference.revision!r}, or not any more{now}"
