"""Parsing of multipart forms into encoded images and options."""

from __future__ import annotations

from typing import Any, Final

from python_multipart.multipart import MultipartParser, parse_options_header

from fovea.service.api.base64_text import from_base64
from fovea.service.api.bodies import ParsedBody, parse_media_type, read_content
from fovea.service.api.json_bodies import validate_json
from fovea.service.api.options import (
    MAX_FIELD_BYTES,
    MAX_FIELDS,
    SEVERAL_IMAGES_WITH_BOXES,
    check_spelling,
)
from fovea.service.api.request_schemas import FormOptions
from fovea.service.errors import BadRequest
from fovea.service.runners.batch_messages import Image
from fovea.service.runners.shared_memory import SharedBuffer
from fovea.service.settings import MAX_REQUEST_IMAGES


def parse_form(body: bytes | SharedBuffer, size: int, content_type: bytes) -> ParsedBody:
    """Parse a form into its images and options.

    The images are not copied; they refer to their places in the body.
    """
    boundary = parse_options_header(content_type)[1].get(b"boundary", b"")
    if not boundary:
        raise BadRequest("the content type multipart/form-data has no boundary")
    content = read_content(body, size)
    parts, offset = _strip_preamble(content, boundary)
    collector = FormCollector(parts, offset)
    try:
        parser = MultipartParser(boundary, collector.callbacks())
        parser.write(parts)
        parser.finalize()
    except ValueError as error:  # the base class of the parser's own errors
        raise BadRequest(f"the multipart body is malformed: {error}") from None
    if not collector.is_complete:
        raise BadRequest("the multipart body ends before its last boundary")
    if not collector.file_ranges:
        raise BadRequest("the multipart body has no file; send one as `-F file=@photo.jpg`")
    check_spelling(collector.long_names, ["boxes"], "the form's field")
    options = _parse_form_options(collector.fields)
    images: list[Image] = []
    for index, (start, stop) in enumerate(collector.file_ranges):
        if index in collector.base64_files:
            text = content[start:stop].decode("ascii", "replace")
            images.append(from_base64(text, f"file {index}"))
        else:
            images.append(
                body.to_ref(start, stop) if isinstance(body, SharedBuffer) else memoryview(body)[start:stop]
            )
    if options.boxes is not None and len(images) > 1:
        raise BadRequest(SEVERAL_IMAGES_WITH_BOXES)
    return ParsedBody(
        images,
        options.top_k,
        options.threshold,
        options.coverage,
        options.embedding,
        () if options.boxes is None else (options.boxes,),
    )


def _strip_preamble(content: bytes, boundary: bytes) -> tuple[bytes, int]:
    """Return the body from its first delimiter on, and the number of bytes that were removed.

    RFC 2046, section 5.1.1, allows text before the first delimiter, and blanks at the end of its line.
    """
    delimiter = b"--" + boundary
    start = 0 if content.startswith(delimiter) else content.find(b"\n" + delimiter) + 1
    end = start + len(delimiter)
    line = content[end : end + _MAX_BLANKS]
    blanks = len(line) - len(line.lstrip(b" \t"))
    if not start and not blanks:
        return content, 0
    return delimiter + content[end + blanks :], start + blanks


_MAX_BLANKS: Final = 1000
"""Maximum number of blanks after the first delimiter."""


def _parse_form_options(fields: dict[str, str]) -> FormOptions:
    """Return the options among a form's text fields; other fields are ignored.

    Raises `BadRequest`.
    """
    known_names = list(FormOptions.model_fields)
    check_spelling(fields, known_names, "the form's field")
    return validate_json(FormOptions, {name: value for name, value in fields.items() if name in known_names})


_MAX_PARTS: Final = 2 * MAX_REQUEST_IMAGES
"""Maximum number of parts in a form; each part takes 10 us."""


class FormCollector:
    """A handler of the parser's events that collects the positions of the files, and the text fields."""

    def __init__(self, body: bytes, offset: int = 0) -> None:
        """Collect the parts of `body`; stored positions are `offset` bytes greater than in `body`."""
        self.file_ranges: list[tuple[int, int]] = []
        """Start and end of each file, in bytes; the end is exclusive."""
        self.base64_files: set[int] = set()
        """Indices of the `file_ranges` that are base64."""
        self.fields: dict[str, str] = {}
        """Small text fields, by name."""
        self.long_names: list[str] = []
        """Names of text fields that are too long for an option, among them perhaps `boxes` misspelled."""
        self.is_complete = False
        self._body = body
        self._offset = offset
        self._name = b""
        self._value = b""
        self._headers: dict[bytes, bytes] = {}
        self._part_count = 0
        self._start = 0
        self._size = 0

    def callbacks(self) -> Any:
        """Return the functions that `MultipartParser` calls.

        The parser calls them in the order of the body, on the thread that calls `write`. An exception in one
        of them ends the parsing.
        """
        return {
            "on_part_begin": self._begin_part,
            "on_header_field": self._add_header_name,
            "on_header_value": self._add_header_value,
            "on_header_end": self._end_header,
            "on_part_data": self._add_part_data,
            "on_part_end": self._end_part,
            "on_end": self._end_form,
        }

    def _begin_part(self) -> None:
        self._part_count += 1
        if self._part_count > _MAX_PARTS:
            raise BadRequest(f"the multipart body has more than {_MAX_PARTS} parts")
        self._headers, self._start, self._size = {}, 0, 0

    def _add_header_name(self, data: bytes, start: int, end: int) -> None:
        self._name += data[start:end]

    def _add_header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _end_header(self) -> None:
        self._headers[self._name.lower()] = self._value
        self._name = self._value = b""

    def _add_part_data(self, data: bytes, start: int, end: int) -> None:
        """Record the position of a piece; the pieces of a part come without gaps.

        Some pieces are copies, of bytes that first looked like a boundary. The position of a part that
        consists only of such copies is unknown, but it is too short for an image.
        """
        if data is self._body:
            self._start = start - self._size
        self._size += end - start

    def _end_part(self) -> None:
        disposition = self._headers.get(b"content-disposition", b"")
        options = parse_options_header(disposition)[1]
        # RFC 7578 forbids RFC 5987's `filename*` in forms, but some clients send it. The name itself is not
        # used.
        extended_name = b"*" if b"filename*" in disposition.lower() else None
        filename = options.get(b"filename", extended_name)
        if filename is not None:
            # A part with neither name nor content means that no file was chosen.
            is_file = bool(filename or self._size)
        else:
            is_file = self._is_image_part()
        if is_file:
            encoding = self._headers.get(b"content-transfer-encoding", b"").strip().lower()
            if encoding not in _PLAIN_ENCODINGS and encoding != b"base64":
                name = encoding.decode("latin-1")
                raise BadRequest(f"a file has the transfer encoding {name!r}; send it as binary or base64")
            if encoding == b"base64":
                self.base64_files.add(len(self.file_ranges))
            start = self._start + self._offset
            self.file_ranges.append((start, start + self._size))
        elif filename is None:
            self._end_field(options.get(b"name", b""))

    def _end_field(self, raw_name: bytes) -> None:
        name = raw_name[:MAX_FIELD_BYTES].decode(errors="replace")
        if self._is_small_field(raw_name):
            value = self._body[self._start : self._start + self._size].decode(errors="replace")
            if name in FormOptions.model_fields and name in self.fields:
                raise BadRequest(f"the form has {name} twice; send it once")
            self.fields[name] = value
        elif len(self.long_names) < MAX_FIELDS:
            self.long_names.append(name)

    def _is_small_field(self, name: bytes) -> bool:
        """Return True if a text field is small enough for an option, and there are not too many fields.

        Raises `BadRequest` for boxes that are too long. Other long fields belong to other software.
        """
        if name == b"boxes" and self._size > _MAX_BOXES_BYTES:
            raise BadRequest(f"boxes: the field has {self._size} bytes; at most {_MAX_BOXES_BYTES}")
        limit = _MAX_BOXES_BYTES if name == b"boxes" else MAX_FIELD_BYTES
        return self._size <= limit and len(self.fields) < MAX_FIELDS

    def _is_image_part(self) -> bool:
        """Return True if a part without a file name is an image.

        RFC 7578 makes the file name optional.
        """
        content_type = parse_media_type(self._headers.get(b"content-type", b""))
        if content_type:
            return content_type.startswith(b"image/") or content_type == b"application/octet-stream"
        head = self._body[self._start : self._start + min(self._size, _SNIFF_BYTES)]
        # 32 is the first printable character.
        return any(byte < 32 and byte not in b"\t\r\n" for byte in head)

    def _end_form(self) -> None:
        self.is_complete = True


_MAX_BOXES_BYTES: Final = 8 << 10
"""Maximum size in bytes of boxes in a form: 128 for each of the most boxes that an image may have."""

_PLAIN_ENCODINGS: Final = (b"", b"binary", b"8bit", b"7bit")
"""Transfer encodings that leave a part unchanged."""

_SNIFF_BYTES: Final = 16
"""Number of bytes that are examined in a part without a type. Within these bytes every image format has
control characters that no text has, whatever its character set."""
