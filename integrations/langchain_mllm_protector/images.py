"""The images in a message, from content blocks of every shape that LangChain and its providers have had.

| shape | block |
|---|---|
| LangChain v1 | `{"type": "image", "base64" or "url" or "file_id": ...}` |
| LangChain v0 | `{"type": "image", "source_type": "base64" or "url" or "id", "data" or "url" or "id": ...}` |
| OpenAI | `{"type": "image_url", "image_url": url or {"url": ...}}` |
| OpenAI | `{"type": "input_image", "image_url" or "file_id": ...}` |
| Anthropic | `{"type": "image", "source": {"type": "base64" or "url" or "file", ...}}` |
| Google | `{"type": "media", "mime_type": "image/...", "data" or "file_uri": ...}` |
| Bedrock | `{"image": {"format": ..., "source": {"bytes": ...}}}` |
| files | `{"type": "file", "mime_type": "image/...", "base64" or "url" or "file_id": ...}` |
| files | `{"type": "file", "file": {"file_data": "data:image/..."}}` |

Base64 and data URLs are decoded. No address is ever fetched or opened: it stays as it was given.
"""

from __future__ import annotations

import base64
import binascii
import logging
from collections.abc import Mapping, Sequence
from typing import Any, Final
from urllib.parse import unquote_to_bytes

from mllm_protector_guard import ImageInput

__all__ = ["MAX_IMAGE_BYTES", "images_of"]

logger = logging.getLogger(__name__)

MAX_IMAGE_BYTES: Final = 20 * 2**20
"""Larger images, in bytes, stay undecoded: they reach the guard as their data URL."""

_IMAGE_TYPES = frozenset({"image", "image_url", "input_image"})
_FILE_TYPES = frozenset({"file", "file_data", "input_file", "media"})
_NESTED = ("image", "image_url", "file", "source", "s3Location")  # the outer ones first
_MEDIA_TYPES = ("mime_type", "media_type")
_CONTENTS = ("base64", "data", "bytes")
_ADDRESSES = ("url", "file_uri", "uri", "file_data", "file_url", "path")
_URL_SAFE = str.maketrans("-_", "+/")


def images_of(content: str | Sequence[str | Mapping[str, Any]]) -> list[ImageInput]:
    """The images in a message's content, in order.

    One that is too large or damaged stays as its data URL, one that a provider holds is `file-id:<id>`. A warning
    counts those, and the blocks in which no image was found.
    """
    blocks = [] if isinstance(content, str) else [block for block in content if isinstance(block, Mapping)]
    flat = [fields for fields in map(_fields, blocks) if fields is not None]
    images = [image for image in map(_image, flat) if image is not None]
    undecoded = sum(image.url is not None and _is_data_url(image.url) for image in images)
    if undecoded:
        logger.warning(
            "%d of %d images of a message stay undecoded: larger than %d bytes, or damaged",
            undecoded,
            len(flat),
            MAX_IMAGE_BYTES,
        )
    if len(images) < len(flat):
        logger.warning(
            "%d of %d image blocks of a message are of an unknown shape and left out",
            len(flat) - len(images),
            len(flat),
        )
    return images


def _fields(block: Mapping[str, Any]) -> dict[str, Any] | None:
    """All fields of an image block on one level; None if it is no image block."""
    kind = block.get("type")
    if kind == "non_standard" and isinstance(block.get("value"), Mapping):
        return _fields(block["value"])
    flat = dict(block)
    for key in _NESTED:
        held = flat.get(key)
        if isinstance(held, Mapping):
            flat |= held
        elif isinstance(held, str):
            flat.setdefault("url", held)
    if kind in _IMAGE_TYPES or (kind is None and isinstance(block.get("image"), Mapping)):
        return flat
    if kind in _FILE_TYPES and ((_media_type(flat) or "").startswith("image/") or _holds_image_url(flat)):
        return flat
    return None


def _image(flat: Mapping[str, Any]) -> ImageInput | None:
    media_type = _media_type(flat)
    content = _first(flat, _CONTENTS)
    if isinstance(content, bytes):
        return ImageInput(content=content, media_type=media_type)
    if content is not None:
        return _from_url(content if _is_data_url(content) else f"data:{media_type or ''};base64,{content}", media_type)
    address = _first(flat, _ADDRESSES)
    if isinstance(address, str):
        return _from_url(address, media_type)
    # Elsewhere `id` names the block.
    file_id = flat.get("id") if flat.get("source_type") == "id" else flat.get("file_id")
    return ImageInput(url=f"file-id:{file_id}", media_type=media_type) if isinstance(file_id, str) else None


def _from_url(url: str, media_type: str | None) -> ImageInput:
    if not _is_data_url(url):
        return ImageInput(url=url, media_type=media_type)
    header, _, data = url.partition(",")
    given, *parameters = header[len("data:") :].split(";")
    media_type = given or media_type
    try:
        content = _decoded(data, base64_coded="base64" in map(str.casefold, parameters))
    except (binascii.Error, ValueError):
        content = None
    return ImageInput(content=content, url=url if content is None else None, media_type=media_type)


def _decoded(data: str, *, base64_coded: bool) -> bytes | None:
    """The bytes that `data` stands for; None if they are too many."""
    if not base64_coded:
        return unquote_to_bytes(data) if len(data) <= MAX_IMAGE_BYTES else None
    if len(data) * 3 // 4 > MAX_IMAGE_BYTES:
        return None
    # Some write lines, the URL-safe alphabet, or no padding.
    compact = "".join(data.split()).translate(_URL_SAFE).rstrip("=")
    return base64.b64decode(compact + "=" * (-len(compact) % 4), validate=True)


def _media_type(flat: Mapping[str, Any]) -> str | None:
    given = _first(flat, _MEDIA_TYPES)
    if isinstance(given, str):
        return given
    return f"image/{flat['format']}" if isinstance(flat.get("format"), str) else None


def _holds_image_url(flat: Mapping[str, Any]) -> bool:
    address = _first(flat, _ADDRESSES)
    return isinstance(address, str) and address[:11].casefold() == "data:image/"


def _is_data_url(url: str) -> bool:
    return url[:5].casefold() == "data:"


def _first(flat: Mapping[str, Any], names: Sequence[str]) -> str | bytes | None:
    return next((flat[name] for name in names if isinstance(flat.get(name), (str, bytes))), None)
