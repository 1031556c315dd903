"""Read pictures: files, bytes, data URLs and `PIL` images. What cannot be read as it is meant is refused by name."""

from __future__ import annotations

import base64
import binascii
import io
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from PIL import Image, ImageOps, UnidentifiedImageError

_TURNED = (5, 6, 7, 8)  # EXIF orientations that swap width and height
_DEEP = ("I", "I;16", "I;16B", "I;16L", "I;16N", "F")
_STILL = ("MPO",)  # of phones: the first frame is the photograph, the others belong to it
ORIENTATION = 0x0112
_WIDTH, _HEIGHT = 0x0100, 0x0101  # tags of TIFF
_NAMES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".jp2")
_FILE_URL = "file://"
_BASE64 = re.compile(r"(?:iVBORw0KGgo|/9j/|R0lGOD|UklGR|[A-Za-z0-9+/]{256})[A-Za-z0-9+/\s]*={0,2}\s*")
"""Base64 of a PNG, JPEG, GIF or WebP, or of anything that is too long for the name of a file. It has no dot."""


@dataclass(frozen=True)
class Pictures:
    """How the pictures of a data set are read.

    Args:
        root: the folder that paths are relative to, and that they must not leave; None: no path is allowed.
        more_roots: other folders that paths and links may lead to.
        min_pixels, max_pixels: pictures are scaled to so many pixels at least and at most, before the processor sees
            them; None: no limit.
    """

    root: Path | None = None
    min_pixels: int | None = None
    max_pixels: int | None = None
    more_roots: tuple[Path, ...] = ()

    def size(self, source: Any) -> tuple[int, int]:
        """Width and height of a picture as the processor will see it, from its header.

        Raises:
            ValueError: it cannot be read.
        """
        with self._opened(source) as image:
            width, height = _size(image)
            return self.scaled(*((height, width) if _orientation(image) in _TURNED else (width, height)))

    def read(self, source: Any) -> Image.Image:
        """The picture, upright, in RGB.

        Raises:
            ValueError: it cannot be read.
        """
        name = _name(source)
        with self._opened(source) as image:
            turned = _orientation(image)
            try:
                image.load()
                if turned != 1:
                    image = ImageOps.exif_transpose(image)
                image = image.convert("RGB")
            except (OSError, ValueError, SyntaxError, EOFError) as error:
                raise ValueError(f"{name} cannot be decoded, it may be truncated: {error}") from error
        size = self.scaled(*image.size)
        return image if size == image.size else image.resize(size, Image.Resampling.BICUBIC)

    def scaled(self, width: int, height: int) -> tuple[int, int]:
        """The size of a picture of this size as the processor will see it."""
        pixels = width * height
        if self.max_pixels is not None and pixels > self.max_pixels:
            factor = math.sqrt(self.max_pixels / pixels)
            width, height = (max(1, math.floor(side * factor)) for side in (width, height))
            return min(width, self.max_pixels), min(height, self.max_pixels)  # of a line, which stays a pixel wide
        if self.min_pixels is not None and pixels < self.min_pixels:
            factor = math.sqrt(self.min_pixels / pixels)
            return math.ceil(width * factor), math.ceil(height * factor)
        return width, height

    def _opened(self, source: Any) -> Image.Image:
        if isinstance(source, Image.Image):
            return _checked(source.copy(), _name(source))
        name = _name(source)
        data = self._data(source)
        try:
            image = Image.open(data)
        except UnidentifiedImageError as error:
            raise ValueError(f"{name} is no picture that Pillow knows.") from error
        except Image.DecompressionBombError as error:
            raise ValueError(f"{name} is too large to be decoded safely: {error}") from error
        except (OSError, ValueError, SyntaxError) as error:
            raise ValueError(f"{name} cannot be read: {error}") from error
        return _checked(image, name)

    def _data(self, source: Any) -> Any:
        """A path or a stream of bytes."""
        if isinstance(source, bytes):
            return io.BytesIO(source)
        if isinstance(source, str | os.PathLike):
            text = str(source)
            if text.startswith("data:"):
                return io.BytesIO(_of_data_url(text))
            if _BASE64.fullmatch(text):
                return io.BytesIO(of_base64(text, "a picture given as a text"))
            return Path(self.path(text))
        if isinstance(source, dict):  # of `datasets.Image`
            found = next((source[key] for key in ("bytes", "path", "url") if source.get(key) is not None), None)
            if isinstance(found, bytes | str) and found:
                return self._data(found)
        raise ValueError(f"a picture is a {type(source).__name__}: {str(source)[:80]!r}. {ALLOWED}")

    def path(self, path: str, what: str = "picture") -> str:
        """Where a path inside `root` leads.

        Args:
            path: relative to it, or absolute.
            what: what messages call it.

        Raises:
            ValueError: there is no such file, or it leads out of `root`.
        """
        path = _of_file_url(path)
        if "://" in path:
            raise ValueError(
                f"{what} {path!r} is on the network, and training reads no network. Download the {what} and give its "
                "path."
            )
        if self.root is None:
            raise ValueError(
                f"{what} {path!r} is a path, and these rows come from no file whose folder it could be in: give "
                "image_root."
            )
        try:
            found = (self.root.resolve() / path).resolve()  # an absolute path stays as it is
            exists = found.is_file()
        except (OSError, ValueError) as error:  # it is too long, or has a character that no path has
            raise ValueError(f"{what} {_short(path)!r} cannot be the path of a file: {_short(str(error))}") from error
        if not any(found.is_relative_to(root.resolve()) for root in (self.root, *self.more_roots)):
            raise ValueError(
                f"{what} {path!r} leads out of image_root={str(self.root)!r}, to {str(found)!r}. Give the folder that "
                f"holds all {what}s as image_root; or a list of folders, the one that paths are relative to first, if "
                "links lead to others."
            )
        if not exists:
            where = "" if os.path.isabs(path) else f" in {self.root}"
            raise ValueError(f"{what} {path!r} does not exist{where}.")
        return str(found)


ALLOWED = (
    "Allowed: a path inside image_root, bytes, a data URL (data:image/png;base64,…), a PIL image, or a value of "
    "datasets.Image."
)


def as_png(image: Image.Image) -> bytes:
    """A picture in memory as the bytes of a file, upright.

    Raises:
        ValueError: it has several frames or deep pixels.
    """
    upright = ImageOps.exif_transpose(_checked(image, _name(image)))
    stream = io.BytesIO()
    (upright if upright.mode in ("1", "L", "LA", "P", "RGB", "RGBA") else upright.convert("RGB")).save(stream, "PNG")
    return stream.getvalue()


def _checked(image: Image.Image, name: str) -> Image.Image:
    width, height = image.size
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and width * height > limit:
        raise ValueError(
            f"{name} has {width:,} × {height:,} pixels, more than {limit:,}: too large to be decoded safely. Make it "
            "smaller, or raise PIL.Image.MAX_IMAGE_PIXELS if you trust it."
        )
    if width < 1 or height < 1:
        raise ValueError(f"{name} has no pixels ({width} × {height}).")
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format not in _STILL:
        raise ValueError(
            f"{name} is animated or has several pages ({frames} frames, {image.format}), and a model sees one: "
            "save the frame that is meant as a picture."
        )
    if image.mode in _DEEP:
        raise ValueError(
            f"{name} has pixels of mode {image.mode!r} (16 bits or more), which 8-bit RGB would clip: convert it first."
        )
    return image


def _size(image: Image.Image) -> tuple[int, int]:
    """Width and height as they are stored. Of TIFF Pillow says those of the upright picture, in some versions."""
    tags = getattr(image, "tag_v2", None)
    return image.size if tags is None else (int(tags.get(_WIDTH, 0)), int(tags.get(_HEIGHT, 0)))


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 if there is none. It reads no pixels."""
    if image.format == "PNG" and not {"exif", "Raw profile type exif"} & image.info.keys():
        return 1
    try:
        return int(image.getexif().get(ORIENTATION, 1))
    except (OSError, ValueError, SyntaxError, TypeError):
        return 1


def _of_data_url(url: str) -> bytes:
    head, comma, body = url.partition(",")
    if not comma or not head.endswith(";base64"):
        raise ValueError(f"a picture's data URL begins {url[:40]!r}: it must be data:image/…;base64,…")
    return _decoded(body, f"a picture's data URL ({url[:40]!r})")


def is_picture(value: Any) -> bool:
    """Whether a value is a picture, by its class or its name. No file is opened."""
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, str):
        named = value.lower().endswith(_NAMES)
        return named or value.startswith("data:image/") or _BASE64.fullmatch(value) is not None
    return isinstance(value, bytes | Image.Image)


def of_base64(text: str, what: str) -> bytes:
    """The bytes that a text is the base64 of, or the data URL.

    Raises:
        ValueError: it is no base64.
    """
    if text.startswith("data:"):
        return _of_data_url(text)
    return _decoded("".join(text.split()), f"{what} ({_short(text)!r})")


def _decoded(text: str, what: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except binascii.Error as error:
        raise ValueError(f"{what} is no valid base64: {error}") from error


def _of_file_url(path: str) -> str:
    """The path of a `file://` URL, with its escapes read where no file has this very name. Other paths stay."""
    if not path.startswith(_FILE_URL):
        return path
    plain = path.removeprefix(_FILE_URL).removeprefix("localhost")
    return plain if os.path.exists(plain) else unquote(plain)


def _short(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:40]}…"


def _name(source: Any) -> str:
    if isinstance(source, str | os.PathLike):
        text = str(source)
        coded = text.startswith("data:") or len(text) > 255
        return f"picture {text[:40] + '…' if coded else text!r}"
    if isinstance(source, dict) and (path := source.get("path") or source.get("url")):
        return _name(path) if isinstance(path, str) else f"picture {path!r}"
    if isinstance(source, bytes | dict):
        return "a picture given as bytes"
    if isinstance(source, Image.Image):
        return "a picture in memory"
    return f"a {type(source).__name__}"
