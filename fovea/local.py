"""Models in this process: `fovea.load`.

A model has one ONNX Runtime session in each process. `_Predictors` holds the sessions of this process, and
models that are loaded from the same file share one. A child process that was forked loads the file again,
because the threads of a session do not survive `fork`.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Generator, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from functools import partial
from itertools import repeat
from typing import Any, Literal, TypeAlias, overload
from weakref import WeakValueDictionary

from fovea.images import (
    BoxList,
    ImageError,
    ImageSource,
    check_on_error,
    encode_source,
    list_boxes,
    list_images,
    name_error,
)
from fovea.results import Result
from fovea.service.api.native.outcomes import render_model_name, render_outcome
from fovea.service.artifact.contract import Contract, Coverage
from fovea.service.artifact.repository import ModelVersion
from fovea.service.errors import BadRequest, FileError, RequestError
from fovea.service.inference.boxes import Boxes
from fovea.service.inference.preprocess import configure_pillow
from fovea.service.providers import ProviderSetting
from fovea.service.runners.batch_messages import Answer, BoxAnswers, ImageRequest, Item
from fovea.service.runners.load_messages import LoadCommand
from fovea.service.serving.classifier import BoxClassification, Classification
from fovea.service.serving.live_model import LiveModel
from fovea.service.serving.ranking import find_coverage
from fovea.service.serving.standalone import create_load, load_predictor
from fovea.service.settings import load_settings
from fovea.sources import find_model

_Outcome: TypeAlias = Answer | BoxAnswers | RequestError | FileError


def load(
    source: str | os.PathLike[str] | None = None,
    *,
    version: str | int | None = None,
    provider: ProviderSetting | None = None,
    threads: int | None = None,
) -> Model:
    """Load a model into this process, and check it against its golden set.

    `source` is a model folder such as `zoo/pets`, a repository with one model or a default model, a version
    folder such as `zoo/pets/3`, an ONNX file with a contract, or `hf:OWNER/MODEL[@REVISION]` on the Hugging
    Face hub, which is imported once for each commit (`fovea.hub_models`). By default it is what `fovea serve`
    serves: `FOVEA_MODELS`, `zoo`, or the model of the installation. `version` chooses a version of a model
    folder or a repository; by default the one that the service would serve.

    `provider` is an execution provider, such as `cpu` or `cuda`. `threads` is the number of processors that
    the model may use; by default all. The other settings are those of the service, from `FOVEA_*` variables.

    Raises `StartError`: `ModelError` if there is no such model or it does not compute what its contract
    states, `SettingsError` for a wrong variable.
    """
    if threads is not None and threads < 1:
        raise ValueError(f"threads is {threads}; it must be at least 1")
    if source is None:
        source = load_settings().models
    found = find_model(source, None if version is None else str(version))
    return Model(found, provider, threads)


class Model:
    """A model in this process, made by `load`.

    All methods may be called from several threads at once. A model can be pickled, as its path: another
    process loads the file again.
    """

    def __init__(self, version: ModelVersion, provider: ProviderSetting | None, threads: int | None) -> None:
        """Load the model file, or share the session that this process has for it."""
        overrides: dict[str, Any] = {"models": version.path}
        changes: dict[str, Any] = {}
        if provider is not None:
            overrides["provider"], changes["provider"] = provider, None
        if threads is not None:
            overrides["runners"] = overrides["runner_threads"] = 0
            changes["threads"] = None
        settings = load_settings(**overrides)
        self._arguments = str(version.path), version.name, version.version, provider, threads
        version = replace(version, config=version.config.model_copy(update=changes))
        self._max_bytes, self._max_pixels = settings.body_bytes, settings.image_pixels
        self._load = create_load(version, settings, threads)
        self._predictor = _predictors.get(self._load)
        self._live_model = LiveModel.from_load_result(
            version, self._load, self._predictor.predictor.loaded_model, settings
        )

    @property
    def name(self) -> str:
        """Name of the model."""
        return self._live_model.name

    @property
    def version(self) -> str:
        """Version of the model."""
        return self._live_model.version

    @property
    def labels(self) -> tuple[str, ...]:
        """Labels in the order of the outputs; `Prediction.index` counts from 0 in this order."""
        return self.contract.labels

    @property
    def contract(self) -> Contract:
        """Description inside the model file: task, labels, geometry, thresholds, accuracy."""
        return self._live_model.contract

    @property
    def provider(self) -> str:
        """Execution provider that runs the model."""
        return self._live_model.load_result.provider

    @overload
    def classify(  # type: ignore[overload-overlap]  # a path is an iterable of strings
        self,
        images: ImageSource,
        *,
        top_k: int = 5,
        coverage: float | None = None,
        embedding: bool = False,
        boxes: None = None,
        on_error: Literal["raise"] = "raise",
    ) -> Result: ...

    @overload
    def classify(  # type: ignore[overload-overlap]  # a path is an iterable of strings
        self,
        images: ImageSource,
        *,
        top_k: int = 5,
        coverage: float | None = None,
        embedding: bool = False,
        boxes: None = None,
        on_error: Literal["return"],
    ) -> Result | ImageError: ...

    @overload
    def classify(
        self,
        images: Iterable[ImageSource],
        *,
        top_k: int = 5,
        coverage: float | None = None,
        embedding: bool = False,
        boxes: None = None,
        on_error: Literal["raise"] = "raise",
    ) -> list[Result]: ...

    @overload
    def classify(
        self,
        images: Iterable[ImageSource],
        *,
        top_k: int = 5,
        coverage: float | None = None,
        embedding: bool = False,
        boxes: None = None,
        on_error: Literal["return"],
    ) -> list[Result | ImageError]: ...

    @overload
    def classify(  # type: ignore[overload-overlap]  # a path is an iterable of strings
        self,
        images: ImageSource,
        *,
        top_k: int = 5,
        coverage: float | None = None,
        embedding: bool = False,
        boxes: BoxList,
        on_error: Literal["raise"] = "raise",
    ) -> list[Result]: ...

    @overload
    def classify(  # type: ignore[overload-overlap]  # a path is an iterable of strings
        self,
        images: ImageSource,
        *,
        top_k: int = 5,
        coverage: float | None = None,
        embedding: bool = False,
        boxes: BoxList,
        on_error: Literal["return"],
    ) -> list[Result] | ImageError: ...

    @overload
    def classify(
        self,
        images: Iterable[ImageSource],
        *,
        top_k: int = 5,
        coverage: float | None = None,
        embedding: bool = False,
        boxes: Iterable[BoxList],
        on_error: Literal["raise"] = "raise",
    ) -> list[list[Result]]: ...

    @overload
    def classify(
        self,
        images: Iterable[ImageSource],
        *,
        top_k: int = 5,
        coverage: float | None = None,
        embedding: bool = False,
        boxes: Iterable[BoxList],
        on_error: Literal["return"],
    ) -> list[list[Result] | ImageError]: ...

    def classify(
        self,
        images: Any,
        *,
        top_k: int = 5,
        coverage: float | None = None,
        embedding: bool = False,
        boxes: Any = None,
        on_error: Literal["raise", "return"] = "raise",
    ) -> Any:
        """Classify one image, or each image of a list; return a `Result`, or a list of results.

        An image is a path, an encoded image as bytes, a PIL image, or an array of pixels (`ImageSource`).
        `top_k` is the number of labels in each result; 0 for all. `coverage` adds the set of labels that
        contains the true label this often, such as 0.95. `embedding` adds the vector that the model's last
        layer reads; the first call with it loads the file once more. `boxes` are regions of the image, each
        left, top, right and bottom in pixels of the upright image: the result is then a list with a `Result`
        for each box. For a list of images, `boxes` is a list with the boxes of each image.

        Raises `FileError` for a file that cannot be read, and `RequestError` for an image that cannot be
        decoded, for a box that is not inside its image (`BadBox`), for a negative `top_k`, and for a
        `coverage` or `embedding` that the model does not have. With `on_error="return"`, the error of an
        image takes the place of its result. Raises `TypeError` for a value that is no image.
        """
        sources, is_single = list_images(images)
        check_on_error(on_error)
        if top_k < 0:
            raise BadRequest(f"top_k is {top_k}; it must be at least 0")
        label_set = None if coverage is None else find_coverage(self.contract, coverage)
        if embedding:
            self._live_model.require_embedding()
        box_lists = None if boxes is None else list_boxes(boxes, None if is_single else len(sources))
        results: list[Result | list[Result] | ImageError] = []
        # Closing the outcomes cancels the batches that have not begun, after an error and after Ctrl-C.
        predictor = self._get_predictor()
        with closing(
            predictor.predict(sources, box_lists, self._max_bytes, self._max_pixels, embedding=embedding)
        ) as outcomes:
            for index, outcome in enumerate(outcomes):
                if isinstance(outcome, Answer):
                    reply = self._render(Classification(self._live_model, outcome), top_k, label_set)
                    results.append(Result.from_reply(reply, self._count_labels(top_k)))
                elif isinstance(outcome, BoxAnswers):
                    assert box_lists is not None  # noqa: S101 - only boxes have such an outcome
                    classification = BoxClassification(self._live_model, box_lists[index], outcome)
                    reply = self._render(classification, top_k, label_set)
                    results.append(Result.list_from_reply(reply, self._count_labels(top_k)))
                elif on_error == "return":
                    results.append(outcome)
                else:
                    raise name_error(outcome, sources[index], None if is_single else index)
        return results[0] if is_single else results

    def _render(
        self, outcome: Classification | BoxClassification, top_k: int, coverage: Coverage | None
    ) -> dict[str, Any]:
        """Return the reply of the service to one image, as plain values."""
        reply = render_outcome(outcome, top_k=top_k, coverage=coverage)
        return reply | {"model": render_model_name(self._live_model)}

    def _count_labels(self, top_k: int) -> int:
        return 0 if top_k >= len(self.labels) else top_k

    def _get_predictor(self) -> _SharedPredictor:
        """Return the predictor of this process, which may be a child of the process that loaded the model."""
        if self._predictor.pid != os.getpid():
            self._predictor = _predictors.get(self._load)
        return self._predictor

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the path and the options, not the session."""
        return _restore_model, self._arguments

    def __copy__(self) -> Model:
        """Return the same model, which never changes."""
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Model:
        """Return the same model, which never changes."""
        return self

    def __repr__(self) -> str:
        """Return name, version, labels and path in one line."""
        return (
            f"<Model {self.name} version {self.version}, {len(self.labels)} labels, on {self.provider}, "
            f"from {str(self._load.path)!r}>"
        )


def _restore_model(
    path: str, name: str | None, version: str | None, provider: ProviderSetting | None, threads: int | None
) -> Model:
    """Load a pickled model.

    The process then keeps the session: a pool unpickles the model for every task.
    """
    model = Model(find_model(path, None, (name, version)), provider, threads)
    _predictors.keep(model._predictor)
    return model


class _SharedPredictor:
    """The predictor of a file in this process, with the threads that classify lists of images."""

    def __init__(self, load: LoadCommand) -> None:
        """Load the file. Raises `ModelError`."""
        self.pid = os.getpid()
        self.predictor = load_predictor(load)
        self._workers = load.plan.processes
        self._executor = ThreadPoolExecutor(self._workers, thread_name_prefix="fovea")
        self._lock = threading.Lock()
        self._call_count = 0
        """Number of calls of the predictor that run now."""

    def predict(
        self,
        sources: Sequence[Any],
        box_lists: Sequence[Boxes] | None,
        max_bytes: int,
        max_pixels: int,
        *,
        embedding: bool = False,
    ) -> Generator[_Outcome, None, None]:
        """Yield the outcome of each image, in order, with its `embedding` if requested.

        With `box_lists`, the boxes of each image are classified, and not the images.

        Like the service at full load, each thread decodes and classifies batches of its own. A single batch
        gets all processors.
        """
        if not sources:
            return
        # As many batches as threads if the images suffice, so that no thread is idle.
        batch_size = min(self.predictor.loaded_model.batch_max, -(-len(sources) // self._workers))
        pairs = [*zip(sources, box_lists or repeat(None, len(sources)), strict=True)]
        batches = [pairs[start : start + batch_size] for start in range(0, len(pairs), batch_size)]
        if len(batches) == 1 or self._workers == 1:
            for batch in batches:
                yield from self._predict_batch(batch, max_bytes, max_pixels, embedding, is_alone=True)
            return
        predict_batch = partial(
            self._predict_batch,
            max_bytes=max_bytes,
            max_pixels=max_pixels,
            embedding=embedding,
            is_alone=False,
        )
        # Closing this generator closes the map, which cancels the batches that have not begun.
        for outcomes in self._executor.map(predict_batch, batches):
            yield from outcomes

    def _predict_batch(
        self,
        batch: Sequence[tuple[Any, Boxes | None]],
        max_bytes: int,
        max_pixels: int,
        embedding: bool,
        is_alone: bool,
    ) -> list[_Outcome]:
        """Read, decode and classify a batch; a failed image gets its error, and the others their answers.

        With `is_alone` no other batch of the same call runs, though other calls may.
        """
        items: list[Item] = []
        outcomes: list[_Outcome | None] = []
        for source, boxes in batch:
            try:
                content = encode_source(source, max_bytes=max_bytes, max_pixels=max_pixels)
                items.append(
                    ImageRequest(content, include_embedding=embedding, boxes=boxes)
                    if embedding or boxes is not None
                    else content
                )
                outcomes.append(None)
            except (RequestError, FileError) as error:
                outcomes.append(error.with_traceback(None))  # its frames would keep the pixels alive
        if not items:
            return [outcome for outcome in outcomes if outcome is not None]
        with self._lock:
            self._call_count += 1
            is_exclusive = is_alone and self._call_count == 1
        try:
            answers = iter(self.predictor.predict_batch(items, exclusive=is_exclusive).answers)
        finally:
            with self._lock:
                self._call_count -= 1
        return [next(answers) if outcome is None else outcome for outcome in outcomes]


class _Predictors:
    """The predictors of this process, one for each file and plan.

    A predictor ends with the last model that uses it, unless `keep` was called.
    """

    def __init__(self) -> None:
        self._is_initialized = False
        self._reset()

    def _reset(self) -> None:
        self._lock = threading.Lock()
        self._shared: WeakValueDictionary[LoadCommand, _SharedPredictor] = WeakValueDictionary()
        self._kept: set[_SharedPredictor] = set()

    def get(self, load: LoadCommand) -> _SharedPredictor:
        """Return the predictor for a load; load the file if this process has not. Raises `ModelError`."""
        key = replace(load, path=load.file)  # the path in messages may be another one to the same file
        with self._lock:
            if not self._is_initialized:
                configure_pillow()
                os.register_at_fork(after_in_child=self._forget_parent)
                self._is_initialized = True
            predictor = self._shared.get(key)
            if predictor is None:
                predictor = self._shared[key] = _SharedPredictor(load)
            return predictor

    def keep(self, predictor: _SharedPredictor) -> None:
        """Keep a predictor until the process ends."""
        with self._lock:
            self._kept.add(predictor)

    def _forget_parent(self) -> None:
        """Start anew in a forked child; called in the child, before any other code.

        The sessions of the parent must neither run here nor be destroyed: they wait for their threads, which
        only the parent has. Their reference counts are raised, so that not even the end of the interpreter
        destroys them. The lock may be held by a thread of the parent, so it is replaced.
        """
        for predictor in list(self._shared.values()):
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(predictor))
        self._reset()


_predictors = _Predictors()
