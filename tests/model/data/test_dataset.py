"""Labelled images from folders, archives and the CIFAR-10 release."""

from __future__ import annotations

import gzip
import hashlib
import os
import socket
import tarfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socketserver import BaseRequestHandler, StreamRequestHandler, TCPServer

import numpy as np
import pytest
import torch
from torch import Tensor

from fovea.model.data import cifar10
from fovea.model.data.dataset import DataError, Dataset, load_dataset, square_geometry
from fovea.model.data.decoding import MAX_PIXELS
from fovea.model.data.pixels import Pixels
from fovea.service.artifact.contract import PixelPath, Task
from fovea.service.inference.preprocess import decode_image
from tests.pictures import draw_picture, encode_image, make_jpeg
from tests.training import draw_images, stack_pixels


def read_dataset(
    source: Path | None, *, size: int | None = 16, validation: float = 0.2, seed: int = 0
) -> Dataset:
    return load_dataset(source, size=size, validation=validation, seed=seed)


def make_archive(folder: Path, target: Path, mode: str = "w:gz") -> Path:
    """Write `folder` as a tar archive to `target`."""
    with tarfile.open(target, mode, format=tarfile.GNU_FORMAT) as file:  # type: ignore[call-overload]  # the mode is a variable
        file.add(folder, folder.name)
    return target


def list_image_bytes(pixels: Pixels) -> list[bytes]:
    """Return the pixels of each image as bytes, which can be compared and sorted."""
    return [image.numpy().tobytes() for image in stack_pixels(pixels)]


def list_examples(data: Dataset) -> list[tuple[int, bytes]]:
    """Return label and pixels of all images, sorted."""
    parts = (data.train, data.validation, data.conformal, data.test)
    return sorted(
        pair
        for part in parts
        for pair in zip(part.targets.tolist(), list_image_bytes(part.pixels), strict=True)
    )


# --- folders and archives ------------------------------------------------------------------------


def test_folder_names_become_labels(tmp_path: Path) -> None:
    data = read_dataset(draw_images(tmp_path / "squares"))
    assert (data.name, data.labels) == ("squares", ("blue", "green", "red"))
    assert data.geometry == square_geometry(16)
    assert (len(data.train), len(data.validation), len(data.test)) == (12, 3, 0)
    for examples in (data.train, data.validation):
        assert (stack_pixels(examples.pixels).dtype, examples.targets.dtype) == (torch.uint8, torch.int64)
        # 0 is red, 2 is blue
        brightest = stack_pixels(examples.pixels).float().mean(dim=(1, 2)).argmax(dim=1)
        assert torch.equal(examples.targets, 2 - brightest)


@pytest.mark.parametrize(("mode", "name"), [("w", "set.tar"), ("w:gz", "set.tar.gz"), ("w:gz", "anything")])
def test_archive_is_read_like_its_folder(tmp_path: Path, mode: str, name: str) -> None:
    folder = draw_images(tmp_path / "squares")
    archive_data = read_dataset(make_archive(folder, tmp_path / name, mode))
    assert archive_data.name == name
    assert archive_data.labels == ("blue", "green", "red")
    assert list_examples(archive_data) == list_examples(read_dataset(folder))


@pytest.mark.parametrize("is_packed", [False, True])
def test_train_and_test_folders_are_kept_apart(tmp_path: Path, is_packed: bool) -> None:
    draw_images(tmp_path / "squares" / "train", count=4)
    draw_images(tmp_path / "squares" / "test", count=2, seed=1)
    source = tmp_path / "squares"
    data = read_dataset(make_archive(source, tmp_path / "squares.tar") if is_packed else source)
    assert data.labels == ("blue", "green", "red")
    assert data.test.targets.tolist() == [0, 0, 1, 1, 2, 2]
    test_part = read_dataset(tmp_path / "squares" / "test", validation=0.5)
    assert list_examples(test_part) == sorted(
        zip(data.test.targets.tolist(), list_image_bytes(data.test.pixels), strict=True)
    )
    assert sorted(data.test.names)[0].endswith("test/blue/0.png")
    assert len(data.train) + len(data.validation) == 12


def test_images_are_decoded_as_by_the_service(tmp_path: Path) -> None:
    """The pixels equal those of `service.inference.preprocess.decode_image` for each format and shape."""
    files = {
        "photo.jpg": make_jpeg(
            200, 150, seed=1, exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0"
        ),
        "grey.PNG": encode_image(draw_picture(40, 30, 2).convert("L"), "PNG"),
        "strip.webp": encode_image(draw_picture(90, 17, 3), "WEBP"),
        "late.gif": encode_image(draw_picture(20, 44, 4).quantize(16), "GIF"),
    }
    draw_images(tmp_path / "set", "blue")
    (tmp_path / "set" / "any").mkdir()
    for name, content in files.items():
        (tmp_path / "set" / "any" / name).write_bytes(content)
    data = read_dataset(tmp_path / "set", size=24)
    expected = sorted(
        decode_image(content, square_geometry(24), max_pixels=MAX_PIXELS).pixels.tobytes()
        for content in files.values()
    )
    assert [pixels for target, pixels in list_examples(data) if target == 0] == expected
    assert data.geometry.pixel_path is PixelPath.FAST


def test_non_images_and_unlabelled_images_are_ignored(tmp_path: Path) -> None:
    folder = draw_images(tmp_path / "squares")
    before = list_examples(read_dataset(folder))
    (folder / "cover.png").write_bytes((folder / "red" / "0.png").read_bytes())
    (folder / "red" / "notes.txt").write_text("not an image")
    after = read_dataset(folder)
    assert list_examples(after) == before
    assert after.labels == ("blue", "green", "red")


def test_unreadable_images_are_listed_and_left_out(tmp_path: Path) -> None:
    folder = draw_images(tmp_path / "squares")
    content = (folder / "red" / "0.png").read_bytes()
    (folder / "red" / "0.png").write_bytes(content[: len(content) // 2])
    (folder / "blue" / "3.png").write_bytes(b"")
    (folder / "green" / "9.jpg").write_text("hello")
    data = read_dataset(folder)
    assert [line.split(":")[0] for line in data.unreadable_files] == [
        "blue/3.png",
        "green/9.jpg",
        "red/0.png",
    ]
    assert "empty" in data.unreadable_files[0]
    assert "not an image" in data.unreadable_files[1]
    assert torch.cat([data.train.targets, data.validation.targets]).bincount().tolist() == [4, 5, 4]


def test_two_labels_make_a_binary_task(tmp_path: Path) -> None:
    assert read_dataset(draw_images(tmp_path / "two", "blue", "red")).task is Task.BINARY
    assert read_dataset(draw_images(tmp_path / "three")).task is Task.MULTICLASS


def test_system_files_are_ignored(tmp_path: Path) -> None:
    folder = draw_images(tmp_path / "squares")
    before = read_dataset(folder)
    for name in ("red/.DS_Store", "red/._0.png", ".cache/0.png", "__MACOSX/red/0.png", "red/Thumbs.db"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"\0\5\x16\7")
    for data in (read_dataset(folder), read_dataset(make_archive(folder, tmp_path / "squares.tar"))):
        assert (list_examples(data), data.labels, data.unreadable_files) == (
            list_examples(before),
            before.labels,
            (),
        )


def test_links_are_followed_but_loops_are_not(tmp_path: Path) -> None:
    pool = draw_images(tmp_path / "pool")
    folder = tmp_path / "linked"
    for label in ("blue", "green"):
        (folder / label).mkdir(parents=True)
        for file in (pool / label).iterdir():
            (folder / label / file.name).symlink_to(file)
    (folder / "red").symlink_to(pool / "red")
    expected = list_examples(read_dataset(pool))
    (folder / "blue" / "up").symlink_to(folder)
    (folder / "blue" / "itself.png").symlink_to(folder / "blue" / "itself.png")
    (folder / "blue" / "gone.png").symlink_to(pool / "gone.png")
    assert list_examples(read_dataset(folder)) == expected
    assert list_examples(read_dataset(folder)) == expected


@pytest.mark.parametrize("is_symbolic", [False, True])
@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_links_in_an_archive_are_followed(tmp_path: Path, is_symbolic: bool, mode: str) -> None:
    folder = draw_images(tmp_path / "squares")
    for label in ("blue", "red"):
        link = folder / label / "copy.png"
        if is_symbolic:
            link.symlink_to("0.png")
        else:
            link.hardlink_to(folder / label / "0.png")
    archive_data = read_dataset(make_archive(folder, tmp_path / "set.tar", mode))
    assert len(list_examples(archive_data)) == 17
    assert list_examples(archive_data) == list_examples(read_dataset(folder))


def test_later_archive_member_of_the_same_name_wins(tmp_path: Path) -> None:
    folder = draw_images(tmp_path / "squares")
    path = make_archive(folder, tmp_path / "set.tar", "w")
    (folder / "red" / "0.png").write_bytes((folder / "red" / "1.png").read_bytes())
    with tarfile.open(path, "a") as file:
        file.add(folder / "red" / "0.png", "squares/red/0.png")
    assert list_examples(read_dataset(path)) == list_examples(read_dataset(folder))


@pytest.mark.parametrize("is_packed", [False, True])
@pytest.mark.parametrize(
    ("sides", "expected_size"),
    [
        ((20, 20, 20), 32),
        ((32, 32, 400), 32),
        ((47, 47, 47), 32),
        ((33, 64), 32),
        ((48, 48, 20), 48),
        ((90, 100, 300), 96),
        ((500,), 128),
    ],
)
def test_input_size_follows_from_the_images(
    tmp_path: Path, sides: tuple[int, ...], expected_size: int, is_packed: bool
) -> None:
    """The shorter sides of the images decide; a file without a size does not count."""
    labels = ("blue", "red")
    for number, side in enumerate(sides):
        draw_images(tmp_path / "set" / str(number), *labels, side=side, count=2)
        wide_image = encode_image(draw_picture(3 * side, side, number), "PNG")
        (tmp_path / "set" / str(number) / "red" / "0.png").write_bytes(wide_image)
    (tmp_path / "set" / "0" / "red" / "hole.png").write_bytes(b"GIF89a")
    source = tmp_path / "set"
    data = read_dataset(make_archive(source, tmp_path / "set.tar.gz") if is_packed else source, size=None)
    assert data.geometry == square_geometry(expected_size)
    assert data.train.pixels.shape[1:] == (expected_size, expected_size, 3)


def test_corrupt_files_do_not_affect_other_images(tmp_path: Path) -> None:
    """Names stay with their pixels, also with more images than one thread reads at a time."""
    folder = draw_images(tmp_path / "squares", count=70)
    corrupt_names = {f"{label}/{number}.png" for label in ("blue", "red") for number in range(0, 70, 7)}
    for name in corrupt_names:
        (folder / name).write_bytes(b"\x89PNG\r\n\x1a\n")
    data = read_dataset(folder)
    assert {line.split(":")[0] for line in data.unreadable_files} == corrupt_names
    parts = (data.train, data.validation, data.conformal)
    pixels_by_name = {
        name: image
        for part in parts
        for name, image in zip(part.names, list_image_bytes(part.pixels), strict=True)
    }
    assert len(pixels_by_name) == 190
    for name in ("blue/1.png", "green/0.png", "red/69.png"):
        content = (folder / name).read_bytes()
        assert (
            pixels_by_name[name]
            == decode_image(content, square_geometry(16), max_pixels=MAX_PIXELS).pixels.tobytes()
        )


def test_label_that_is_not_utf_8_is_refused(tmp_path: Path) -> None:
    folder = draw_images(tmp_path / "squares")
    (folder / "red" / "0.png").rename(folder / "red" / os.fsdecode(b"\xff.png"))
    data = read_dataset(folder)
    assert "red/?.png" in data.train.names + data.validation.names
    (folder / "red").rename(folder / os.fsdecode(b"r\xffd"))
    with pytest.raises(DataError, match="is not UTF-8; rename it"):
        read_dataset(folder)


def test_imbalanced_labels_give_a_warning(tmp_path: Path) -> None:
    folder = tmp_path / "squares"
    for seed, (label, count) in enumerate((("blue", 4), ("green", 4), ("red", 14))):  # noise never repeats
        draw_images(folder, label, count=count, seed=seed)
    data = read_dataset(folder)
    assert data.label_counts == (3, 3, 11)
    assert data.warnings == ("labels are imbalanced, 3.7 : 1: 11 training images of 'red', 3 of 'blue'",)
    for file in list((folder / "red").iterdir())[:4]:
        file.unlink()
    assert read_dataset(folder).label_counts == (3, 3, 8)
    assert read_dataset(folder).warnings == ()


def test_current_folder_gives_the_data_set_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(draw_images(tmp_path / "squares"))
    assert read_dataset(Path()).name == "squares"


# --- unusable data -------------------------------------------------------------------------------


def make_empty_folder(folder: Path) -> Path:
    folder.mkdir()
    return folder


def make_all_unreadable(folder: Path) -> Path:
    for file in draw_images(folder).rglob("*.png"):
        file.write_bytes(b"GIF89a")
    return folder


def leave_one_image(folder: Path) -> Path:
    for file in list(draw_images(folder).glob("red/*.png"))[1:]:
        file.unlink()
    return folder


def leave_one_readable(folder: Path) -> Path:
    for file in list(draw_images(folder).glob("red/*.png")):
        if file.name != "0.png":
            file.write_bytes(b"GIF89a")
    return folder


def repeat_one_picture(folder: Path) -> Path:
    for label in ("blue", "red"):
        for file in draw_images(folder, label).glob(f"{label}/*.png"):
            file.write_bytes((folder / label / "0.png").read_bytes())
    return folder


def write_text_file(path: Path) -> Path:
    path.write_text("red, green, blue\n" * 100)
    return path


def write_truncated(path: Path) -> Path:
    content = make_archive(draw_images(path.parent / "squares"), path).read_bytes()
    path.write_bytes(content[: len(content) // 2])
    return path


def write_damaged_header(path: Path) -> Path:
    """Write an uncompressed archive in which the header of one member is damaged."""
    content = make_archive(draw_images(path.parent / "squares"), path, "w").read_bytes()
    path.write_bytes(content.replace(b"squares/green/2.png", b"squares/green/2.xxx", 1))
    return path


def write_corrupt(path: Path) -> Path:
    """Write an archive with random bytes from the middle on."""
    content = make_archive(draw_images(path.parent / "squares"), path).read_bytes()
    half = len(content) // 2
    path.write_bytes(content[:half] + np.random.default_rng(0).bytes(half))
    return path


@pytest.mark.parametrize(
    ("make_source", "message"),
    [
        (lambda path: path, "there is no "),
        (make_empty_folder, "must have at least two labels.*found none"),
        (lambda path: draw_images(path, "red"), "must have at least two labels.*found only 'red'"),
        (
            lambda path: draw_images(path, "train", "test", colours=("red", "blue")),
            "directly in train/ and test/",
        ),
        (lambda path: draw_images(path / "test").parent, "label 'blue' has 0 readable images to train on"),
        (leave_one_image, "label 'red' has 1 readable images to train on; at least 2 are needed$"),
        (leave_one_readable, "label 'red' has 1 .* needed; 4 files cannot be read, such as red/1.png: "),
        (make_all_unreadable, "none of the 15 images of source can be read: blue/0.png: the GIF image"),
        (repeat_one_picture, "each label of source has only copies of one image"),
        (write_text_file, "neither a folder nor a tar archive"),
        (write_truncated, "neither a folder nor a tar archive"),
        (write_damaged_header, "cut short or damaged"),
        (write_corrupt, "neither a folder nor a tar archive"),
    ],
)
def test_unusable_data_is_refused(tmp_path: Path, make_source: Callable[[Path], Path], message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_dataset(make_source(tmp_path / "source"))


# --- hold-out ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("fraction", "held_out_count"), [(0.01, 1), (0.1, 1), (0.3, 3), (0.5, 5)])
def test_same_share_of_every_label_is_held_out(tmp_path: Path, fraction: float, held_out_count: int) -> None:
    data = read_dataset(draw_images(tmp_path / "squares", count=10), validation=fraction)
    assert data.validation.targets.bincount().tolist() == [(held_out_count + 1) // 2] * 3
    assert data.conformal.targets.bincount(minlength=3).tolist() == [held_out_count // 2] * 3
    assert data.train.targets.bincount().tolist() == [10 - held_out_count] * 3


def test_parts_are_disjoint_and_complete(tmp_path: Path) -> None:
    data = read_dataset(draw_images(tmp_path / "squares", count=8), validation=0.5)
    parts = [set(list_image_bytes(part.pixels)) for part in (data.train, data.validation, data.conformal)]
    assert [len(part) for part in parts] == [12, 6, 6]
    assert len(set.union(*parts)) == 24


def test_seed_decides_the_held_out_images(tmp_path: Path) -> None:
    folder = draw_images(tmp_path / "squares", count=10)
    first, repeated, other = (
        set(list_image_bytes(read_dataset(folder, validation=0.5, seed=seed).validation.pixels))
        for seed in (3, 3, 4)
    )
    assert first == repeated
    assert first != other


# --- CIFAR-10 ------------------------------------------------------------------------------------


@pytest.fixture
def release(tmp_path: Path) -> tuple[Path, Tensor]:
    """A release of ten images a file, one of each label, and their pixels, (6, 10, 32, 32, 3)."""
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (6, 10, 32, 32, 3), dtype=np.uint8)
    names = [f"data_batch_{number}.bin" for number in range(1, 6)] + ["test_batch.bin"]
    for name, images in zip(names, pixels, strict=True):
        rows = [
            bytes([label]) + b"".join(image[:, :, plane].tobytes() for plane in range(3))
            for label, image in enumerate(images)
        ]
        (folder / name).write_bytes(b"".join(rows))
    (folder / "batches.meta.txt").write_text("\n".join(cifar10.LABELS))
    return folder, torch.from_numpy(pixels)


@pytest.mark.parametrize("is_packed", [False, True])
def test_cifar_10_release_keeps_pixels_and_labels(
    tmp_path: Path, release: tuple[Path, Tensor], is_packed: bool
) -> None:
    folder, pixels = release
    data = read_dataset(make_archive(folder, tmp_path / "release.tar.gz") if is_packed else folder, size=32)
    assert (data.name, data.labels, data.geometry) == ("CIFAR-10", cifar10.LABELS, square_geometry(32))
    assert torch.equal(stack_pixels(data.test.pixels), pixels[5])
    assert data.test.targets.tolist() == list(range(10))
    assert data.validation.targets.bincount().tolist() == [1] * 10
    training_examples = sorted(
        (label, list_image_bytes(batch[label : label + 1])[0]) for batch in pixels[:5] for label in range(10)
    )
    test_examples = list(zip(data.test.targets.tolist(), list_image_bytes(data.test.pixels), strict=True))
    assert list_examples(data) == sorted(training_examples + test_examples)


def test_missing_source_reads_the_downloaded_release(
    tmp_path: Path, release: tuple[Path, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    make_archive(release[0], Path("data/cifar-10-binary.tar.gz"))
    assert torch.equal(stack_pixels(read_dataset(None, size=None).test.pixels), release[1][5])


def test_incomplete_release_is_refused(release: tuple[Path, Tensor]) -> None:
    file = release[0] / "data_batch_3.bin"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(DataError, match="incomplete"):
        read_dataset(release[0], size=32)


def test_release_with_an_unknown_label_is_refused(release: tuple[Path, Tensor]) -> None:
    file = release[0] / "data_batch_3.bin"
    file.write_bytes(b"\x0a" + file.read_bytes()[1:])
    with pytest.raises(DataError, match="is damaged: it has a label 10"):
        read_dataset(release[0], size=32)


def test_cifar_10_with_another_size_is_refused(release: tuple[Path, Tensor]) -> None:
    with pytest.raises(DataError, match="CIFAR-10 is 32 x 32 px, not 64"):
        read_dataset(release[0], size=64)


# --- download ------------------------------------------------------------------------------------

CONTENT = gzip.compress(np.random.default_rng(0).bytes(3 << 20))
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class QuietHandler(SimpleHTTPRequestHandler):
    """Serves a folder and writes no log."""

    def log_message(self, format: str, *args: object) -> None:
        pass


class GarbageHandler(StreamRequestHandler):
    """Answers, but not in HTTP."""

    def handle(self) -> None:
        self.rfile.readline()
        self.wfile.write(b"who goes there?\r\n\r\n")


class TruncatingHandler(StreamRequestHandler):
    """Announces the full length and sends half."""

    def handle(self) -> None:
        while self.rfile.readline().strip():
            pass
        self.wfile.write(b"HTTP/1.0 200 OK\r\nContent-Length: %d\r\n\r\n" % len(CONTENT))
        self.wfile.write(CONTENT[: len(CONTENT) // 2])


@contextmanager
def run_server(
    handler: Callable[..., BaseRequestHandler], server_class: type[TCPServer] = TCPServer
) -> Iterator[str]:
    """Run a server on a free port; yield the address of `set.tar.gz` on it."""
    with server_class(("127.0.0.1", 0), handler) as tcp_server:
        thread = threading.Thread(target=tcp_server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{tcp_server.server_address[1]}/set.tar.gz"
        finally:
            tcp_server.shutdown()
            thread.join()


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "*")


@pytest.fixture
def download_folder(tmp_path: Path) -> Path:
    """A folder with one archive to download."""
    folder = tmp_path / "served"
    folder.mkdir()
    (folder / "set.tar.gz").write_bytes(CONTENT)
    return folder


def test_download_is_checked_and_kept(tmp_path: Path, download_folder: Path) -> None:
    folder = tmp_path / "deep" / "data"
    with run_server(partial(QuietHandler, directory=str(download_folder)), ThreadingHTTPServer) as url:
        first_path = cifar10.download_release(folder, url, SHA256)
    assert first_path == folder / "set.tar.gz"
    assert first_path.read_bytes() == CONTENT
    second_path = cifar10.download_release(folder, url, SHA256)  # there is no server any more
    assert second_path == first_path
    assert list(folder.iterdir()) == [first_path]


def test_download_with_wrong_hash_is_refused_and_removed(tmp_path: Path, download_folder: Path) -> None:
    with (
        run_server(partial(QuietHandler, directory=str(download_folder)), ThreadingHTTPServer) as url,
        pytest.raises(DataError, match=f"has SHA-256 {SHA256}, not {'0' * 64}"),
    ):
        cifar10.download_release(tmp_path / "data", url, "0" * 64)
    assert not list((tmp_path / "data").iterdir())


@pytest.mark.parametrize(
    ("handler", "message"),
    [
        (GarbageHandler, "cannot download"),
        (TruncatingHandler, "has SHA-256"),
        (partial(QuietHandler, directory="/nowhere"), "cannot download .*404"),
    ],
)
def test_failing_server_leaves_no_file(
    tmp_path: Path, handler: Callable[..., BaseRequestHandler], message: str
) -> None:
    with run_server(handler) as url, pytest.raises(DataError, match=message):
        cifar10.download_release(tmp_path / "data", url, SHA256)
    assert not list((tmp_path / "data").iterdir())


def test_unreachable_server_leaves_no_file(tmp_path: Path) -> None:
    with (
        socket.socket() as unused_socket,
        pytest.raises(DataError, match=r"cannot download .* `--data` takes a folder of images"),
    ):
        unused_socket.bind(("127.0.0.1", 0))
        port = unused_socket.getsockname()[1]
        cifar10.download_release(tmp_path / "data", f"http://127.0.0.1:{port}/set.tar.gz", SHA256)
    assert not list((tmp_path / "data").iterdir())
