"""Labelled images from folders, archives and the CIFAR-10 release."""

from __future__ import annotations

import gzip
import hashlib
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

from model.data import CIFAR10_LABELS, MAX_PIXELS, Data, DataError, download_cifar10, load, square
from service.contract import PixelPath
from service.images import decode
from tests.pictures import encode, jpeg, picture
from tests.training import draw


def read(source: Path | None, *, size: int = 16, validation: float = 0.2, seed: int = 0) -> Data:
    return load(source, size=size, validation=validation, seed=seed)


def archive(folder: Path, target: Path, mode: str = "w:gz") -> Path:
    """`folder` as a tar archive."""
    with tarfile.open(target, mode, format=tarfile.GNU_FORMAT) as file:  # type: ignore[call-overload]  # the mode is a variable
        file.add(folder, folder.name)
    return target


def contents(pixels: Tensor) -> list[bytes]:
    """Each image as a value that can be compared."""
    return [image.numpy().tobytes() for image in pixels]


def everything(data: Data) -> list[tuple[int, bytes]]:
    """Label and pixels of all images, in no particular order."""
    parts = (data.train, data.validation, data.test)
    return sorted(
        pair for part in parts for pair in zip(part.targets.tolist(), contents(part.pixels), strict=True)
    )


# --- folders and archives ------------------------------------------------------------------------


def test_labels_are_the_names_of_the_folders(tmp_path: Path) -> None:
    data = read(draw(tmp_path / "squares"))
    assert (data.name, data.labels) == ("squares", ("blue", "green", "red"))
    assert data.geometry == square(16)
    assert (len(data.train), len(data.validation), len(data.test)) == (12, 3, 0)
    for examples in (data.train, data.validation):
        assert (examples.pixels.dtype, examples.targets.dtype) == (torch.uint8, torch.int64)
        brightest = examples.pixels.float().mean(dim=(1, 2)).argmax(dim=1)  # 0 is red, 2 is blue
        assert torch.equal(examples.targets, 2 - brightest)


@pytest.mark.parametrize(("mode", "name"), [("w", "set.tar"), ("w:gz", "set.tar.gz"), ("w:gz", "anything")])
def test_an_archive_is_the_folder_that_is_in_it(tmp_path: Path, mode: str, name: str) -> None:
    folder = draw(tmp_path / "squares")
    packed = read(archive(folder, tmp_path / name, mode))
    assert packed.name == name
    assert packed.labels == ("blue", "green", "red")
    assert everything(packed) == everything(read(folder))


@pytest.mark.parametrize("packed", [False, True])
def test_train_and_test_folders_are_kept_apart(tmp_path: Path, packed: bool) -> None:
    draw(tmp_path / "squares" / "train", count=4)
    draw(tmp_path / "squares" / "test", count=2, seed=1)
    source = tmp_path / "squares"
    data = read(archive(source, tmp_path / "squares.tar") if packed else source)
    assert data.labels == ("blue", "green", "red")
    assert data.test.targets.tolist() == [0, 0, 1, 1, 2, 2]
    test = read(tmp_path / "squares" / "test", validation=0.5)
    assert everything(test) == sorted(
        zip(data.test.targets.tolist(), contents(data.test.pixels), strict=True)
    )
    assert len(data.train) + len(data.validation) == 12


def test_images_are_read_as_they_will_be_served(tmp_path: Path) -> None:
    """Each through `service.images.decode`, whatever its format and shape."""
    files = {
        "photo.jpg": jpeg(
            200, 150, seed=1, exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0"
        ),
        "grey.PNG": encode(picture(40, 30, 2).convert("L"), "PNG"),
        "strip.webp": encode(picture(90, 17, 3), "WEBP"),
        "late.gif": encode(picture(20, 44, 4).quantize(16), "GIF"),
    }
    draw(tmp_path / "set", "blue")
    (tmp_path / "set" / "any").mkdir()
    for name, content in files.items():
        (tmp_path / "set" / "any" / name).write_bytes(content)
    data = read(tmp_path / "set", size=24)
    expected = sorted(
        decode(content, square(24), max_pixels=MAX_PIXELS).pixels.tobytes() for content in files.values()
    )
    assert [pixels for target, pixels in everything(data) if target == 0] == expected
    assert data.geometry.pixel_path is PixelPath.FAST


def test_files_that_are_no_images_or_have_no_label_are_passed_over(tmp_path: Path) -> None:
    folder = draw(tmp_path / "squares")
    before = everything(read(folder))
    (folder / "cover.png").write_bytes((folder / "red" / "0.png").read_bytes())
    (folder / "red" / "notes.txt").write_text("not an image")
    after = read(folder)
    assert everything(after) == before
    assert after.labels == ("blue", "green", "red")


def test_unreadable_images_are_listed_and_left_out(tmp_path: Path) -> None:
    folder = draw(tmp_path / "squares")
    whole = (folder / "red" / "0.png").read_bytes()
    (folder / "red" / "0.png").write_bytes(whole[: len(whole) // 2])
    (folder / "blue" / "3.png").write_bytes(b"")
    (folder / "green" / "9.jpg").write_text("hello")
    data = read(folder)
    assert [line.split(":")[0] for line in data.unreadable] == ["blue/3.png", "green/9.jpg", "red/0.png"]
    assert "empty" in data.unreadable[0]
    assert "not an image" in data.unreadable[1]
    assert torch.cat([data.train.targets, data.validation.targets]).bincount().tolist() == [4, 5, 4]


def test_the_folder_at_hand_has_its_own_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(draw(tmp_path / "squares"))
    assert read(Path()).name == "squares"


# --- what cannot be used -------------------------------------------------------------------------


def nothing(folder: Path) -> Path:
    folder.mkdir()
    return folder


def all_unreadable(folder: Path) -> Path:
    for file in draw(folder).rglob("*.png"):
        file.write_bytes(b"GIF89a")
    return folder


def one_image(folder: Path) -> Path:
    for file in list(draw(folder).glob("red/*.png"))[1:]:
        file.unlink()
    return folder


def text_file(path: Path) -> Path:
    path.write_text("red, green, blue\n" * 100)
    return path


def truncated(path: Path) -> Path:
    whole = archive(draw(path.parent / "squares"), path).read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    return path


def damaged_header(path: Path) -> Path:
    """A plain archive in which one member's header is not one."""
    content = archive(draw(path.parent / "squares"), path, "w").read_bytes()
    path.write_bytes(content.replace(b"squares/green/2.png", b"squares/green/2.xxx", 1))
    return path


def corrupt(path: Path) -> Path:
    """Random bytes from the middle on."""
    whole = archive(draw(path.parent / "squares"), path).read_bytes()
    half = len(whole) // 2
    path.write_bytes(whole[:half] + np.random.default_rng(0).bytes(half))
    return path


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path, "there is no "),
        (nothing, "at least two; found none"),
        (lambda path: draw(path, "red"), "at least two; found only 'red'"),
        (one_image, "label 'red' has 1 readable images; at least 2 are needed"),
        (all_unreadable, "label 'blue' has 0 readable images; at least 2 are needed"),
        (text_file, "neither a folder nor a tar archive"),
        (truncated, "neither a folder nor a tar archive"),
        (damaged_header, "cut short or damaged"),
        (corrupt, "neither a folder nor a tar archive"),
    ],
)
def test_data_that_cannot_be_used_are_refused_in_a_sentence(
    tmp_path: Path, make: Callable[[Path], Path], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        read(make(tmp_path / "source"))


# --- hold-out ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("fraction", "held"), [(0.01, 1), (0.1, 1), (0.3, 3), (0.5, 5)])
def test_the_same_part_of_every_label_is_held_out(tmp_path: Path, fraction: float, held: int) -> None:
    data = read(draw(tmp_path / "squares", count=10), validation=fraction)
    assert data.validation.targets.bincount().tolist() == [(held + 1) // 2] * 3
    assert data.conformal.targets.bincount(minlength=3).tolist() == [held // 2] * 3
    assert data.train.targets.bincount().tolist() == [10 - held] * 3


def test_no_image_is_both_trained_on_and_held_out_and_none_is_lost(tmp_path: Path) -> None:
    data = read(draw(tmp_path / "squares", count=8), validation=0.5)
    parts = [set(contents(part.pixels)) for part in (data.train, data.validation, data.conformal)]
    assert [len(part) for part in parts] == [12, 6, 6]
    assert len(set.union(*parts)) == 24


def test_the_seed_decides_what_is_held_out(tmp_path: Path) -> None:
    folder = draw(tmp_path / "squares", count=10)
    first, again, other = (
        set(contents(read(folder, validation=0.5, seed=seed).validation.pixels)) for seed in (3, 3, 4)
    )
    assert first == again
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
    (folder / "batches.meta.txt").write_text("\n".join(CIFAR10_LABELS))
    return folder, torch.from_numpy(pixels)


@pytest.mark.parametrize("packed", [False, True])
def test_the_cifar_10_release_is_read_with_its_colours_and_labels(
    tmp_path: Path, release: tuple[Path, Tensor], packed: bool
) -> None:
    folder, pixels = release
    data = read(archive(folder, tmp_path / "release.tar.gz") if packed else folder, size=32)
    assert (data.name, data.labels, data.geometry) == ("CIFAR-10", CIFAR10_LABELS, square(32))
    assert torch.equal(data.test.pixels, pixels[5])
    assert data.test.targets.tolist() == list(range(10))
    assert data.validation.targets.bincount().tolist() == [1] * 10
    trained = sorted(
        (label, contents(batch[label : label + 1])[0]) for batch in pixels[:5] for label in range(10)
    )
    tested = list(zip(data.test.targets.tolist(), contents(data.test.pixels), strict=True))
    assert everything(data) == sorted(trained + tested)


def test_without_a_source_the_downloaded_release_is_read(
    tmp_path: Path, release: tuple[Path, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    archive(release[0], Path("data/cifar-10-binary.tar.gz"))
    assert torch.equal(read(None, size=32).test.pixels, release[1][5])


def test_an_incomplete_release_is_refused(release: tuple[Path, Tensor]) -> None:
    file = release[0] / "data_batch_3.bin"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(DataError, match="incomplete"):
        read(release[0], size=32)


def test_cifar_10_is_not_of_another_size(release: tuple[Path, Tensor]) -> None:
    with pytest.raises(DataError, match="CIFAR-10 is 32 x 32 px, not 64"):
        read(release[0], size=64)


# --- download ------------------------------------------------------------------------------------

CONTENT = gzip.compress(np.random.default_rng(0).bytes(3 << 20))
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Quiet(SimpleHTTPRequestHandler):
    """Serves a folder and writes no log."""

    def log_message(self, format: str, *args: object) -> None:
        pass


class Garbage(StreamRequestHandler):
    """Answers, but not in HTTP."""

    def handle(self) -> None:
        self.rfile.readline()
        self.wfile.write(b"who goes there?\r\n\r\n")


class Short(StreamRequestHandler):
    """Promises all and sends half."""

    def handle(self) -> None:
        while self.rfile.readline().strip():
            pass
        self.wfile.write(b"HTTP/1.0 200 OK\r\nContent-Length: %d\r\n\r\n" % len(CONTENT))
        self.wfile.write(CONTENT[: len(CONTENT) // 2])


@contextmanager
def serving(handler: Callable[..., BaseRequestHandler], server: type[TCPServer] = TCPServer) -> Iterator[str]:
    """A server on a free port; gives the address of `set.tar.gz` on it."""
    with server(("127.0.0.1", 0), handler) as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{running.server_address[1]}/set.tar.gz"
        finally:
            running.shutdown()
            thread.join()


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "*")


@pytest.fixture
def served(tmp_path: Path) -> Path:
    """A folder with one archive to download."""
    folder = tmp_path / "served"
    folder.mkdir()
    (folder / "set.tar.gz").write_bytes(CONTENT)
    return folder


def test_a_download_is_checked_kept_and_not_made_twice(tmp_path: Path, served: Path) -> None:
    folder = tmp_path / "deep" / "data"
    with serving(partial(Quiet, directory=str(served)), ThreadingHTTPServer) as url:
        first = download_cifar10(folder, url, SHA256)
    assert first == folder / "set.tar.gz"
    assert first.read_bytes() == CONTENT
    again = download_cifar10(folder, url, SHA256)  # there is no server any more
    assert again == first
    assert list(folder.iterdir()) == [first]


def test_another_hash_is_refused_and_nothing_kept(tmp_path: Path, served: Path) -> None:
    with (
        serving(partial(Quiet, directory=str(served)), ThreadingHTTPServer) as url,
        pytest.raises(DataError, match=f"has SHA-256 {SHA256}, not {'0' * 64}"),
    ):
        download_cifar10(tmp_path / "data", url, "0" * 64)
    assert not list((tmp_path / "data").iterdir())


@pytest.mark.parametrize(
    ("handler", "message"),
    [
        (Garbage, "cannot download"),
        (Short, "has SHA-256"),
        (partial(Quiet, directory="/nowhere"), "cannot download .*404"),
    ],
)
def test_a_server_that_fails_leaves_nothing(
    tmp_path: Path, handler: Callable[..., BaseRequestHandler], message: str
) -> None:
    with serving(handler) as url, pytest.raises(DataError, match=message):
        download_cifar10(tmp_path / "data", url, SHA256)
    assert not list((tmp_path / "data").iterdir())


def test_a_dead_server_leaves_nothing(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
    with pytest.raises(DataError, match=r"cannot download .* `--data` takes a folder of images"):
        download_cifar10(tmp_path / "data", f"http://127.0.0.1:{port}/set.tar.gz", SHA256)
    assert not list((tmp_path / "data").iterdir())
