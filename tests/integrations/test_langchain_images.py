"""The images of a question, out of content blocks of every shape, and none lost in silence."""

import base64
import json
import logging

import pytest
from langchain_core.messages import AIMessage, HumanMessage

from integrations.langchain_models import asked, keyword_guard
from langchain_mllm_protector import images
from langchain_mllm_protector.images import images_of
from langchain_mllm_protector.messages import question_of
from mllm_protector_guard import ImageInput

PIXELS = b"\xfb\xff\xfepixels"  # so that its base64 has all of +, / and =
PIXEL = base64.b64encode(PIXELS).decode()
ADDRESS = "https://a.example/i.png"
PNG = ImageInput(content=PIXELS, media_type="image/png")
AT = ImageInput(url=ADDRESS)
HELD = ImageInput(url="file-id:f-1")


def png_at(address: str) -> ImageInput:
    return ImageInput(url=address, media_type="image/png")


LANGCHAIN = [
    ({"type": "image", "base64": PIXEL, "mime_type": "image/png", "id": "lc_1"}, PNG),
    ({"type": "image", "url": ADDRESS, "id": "lc_1"}, AT),
    ({"type": "image", "file_id": "f-1", "id": "lc_1"}, HELD),
    ({"type": "image", "source_type": "base64", "data": PIXEL, "mime_type": "image/png"}, PNG),
    ({"type": "image", "source_type": "url", "url": ADDRESS}, AT),
    ({"type": "image", "source_type": "id", "id": "f-1"}, HELD),
    ({"type": "file", "base64": PIXEL, "mime_type": "image/png"}, PNG),
    ({"type": "file", "source_type": "id", "id": "f-1", "mime_type": "image/png"}, png_at("file-id:f-1")),
    ({"type": "non_standard", "value": {"type": "image", "source": {"type": "file", "file_id": "f-1"}}}, HELD),
]
PROVIDERS = [
    ({"type": "image_url", "image_url": {"url": ADDRESS, "detail": "low"}}, AT),
    ({"type": "image_url", "image_url": ADDRESS}, AT),
    ({"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PIXEL}"}}, PNG),
    ({"type": "image_url", "image_url": f"data:image/png;base64,{PIXEL}"}, PNG),
    ({"type": "input_image", "image_url": f"data:image/png;base64,{PIXEL}"}, PNG),
    ({"type": "input_image", "file_id": "f-1"}, HELD),
    ({"type": "file", "file": {"file_data": f"data:image/png;base64,{PIXEL}", "filename": "i.png"}}, PNG),
    ({"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": PIXEL}}, PNG),
    ({"type": "image", "source": {"type": "url", "url": ADDRESS}}, AT),
    ({"type": "image", "source": {"type": "file", "file_id": "f-1"}}, HELD),
    ({"type": "media", "mime_type": "image/png", "data": PIXEL}, PNG),
    ({"type": "media", "mime_type": "image/png", "data": PIXELS}, PNG),
    ({"type": "media", "mime_type": "image/png", "file_uri": "gs://bucket/i.png"}, png_at("gs://bucket/i.png")),
    ({"image": {"format": "png", "source": {"bytes": PIXELS}}}, PNG),
    ({"image": {"format": "png", "source": {"s3Location": {"uri": "s3://bucket/i.png"}}}}, png_at("s3://bucket/i.png")),
    ({"type": "image", "image": ADDRESS}, AT),
]


@pytest.mark.parametrize(("block", "image"), LANGCHAIN + PROVIDERS)
def test_every_shape_gives_its_image(
    block: dict[str, object], image: ImageInput, caplog: pytest.LogCaptureFixture
) -> None:
    question = question_of(HumanMessage([{"type": "text", "text": "What is it?"}, block]))
    assert question is not None
    assert (question.text, question.images) == ("What is it?", (image,))
    assert caplog.records == []


@pytest.mark.parametrize(
    "written",
    [
        f"data:image/png;base64,{PIXEL}",
        f"DATA:image/png;charset=utf-8;BASE64,{PIXEL}",
        f"data:image/png;base64,{PIXEL.rstrip('=')}",
        f"data:image/png;base64,{PIXEL.replace('+', '-').replace('/', '_')}",
        "data:image/png;base64," + "\r\n".join(PIXEL),
        "data:image/png,%FB%FF%FEpixels",
    ],
)
def test_data_urls_are_decoded_however_they_are_written(written: str) -> None:
    assert images_of([{"type": "image_url", "image_url": {"url": written}}]) == [PNG]
    assert images_of([{"type": "image", "data": written}]) == [PNG]


@pytest.mark.parametrize(
    "block",
    [
        {"type": "text", "text": "roses", "source": {"url": ADDRESS}},
        {"type": "file", "mime_type": "application/pdf", "base64": PIXEL},
        {"type": "media", "mime_type": "video/mp4", "file_uri": "gs://bucket/v.mp4"},
        {"type": "audio", "base64": PIXEL},
        {"type": "file", "file": {"file_data": "data:application/pdf;base64,aGk="}},
    ],
)
def test_other_blocks_give_none(block: dict[str, object], caplog: pytest.LogCaptureFixture) -> None:
    assert images_of([block]) == []
    assert images_of("a text") == []
    assert caplog.records == []


def test_what_is_too_large_or_damaged_stays_as_its_address_and_is_counted(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(images, "MAX_IMAGE_BYTES", 10)
    large, damaged = base64.b64encode(b"x" * 12).decode(), "not base64!"
    found = images_of(
        [
            {"type": "image", "base64": large, "mime_type": "image/png"},
            {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{damaged}"}},
            {"type": "image_url", "image_url": "data:image/svg+xml," + "y" * 11},
            {"type": "image", "base64": PIXEL, "mime_type": "image/png"},
        ]
    )
    assert [image.url for image in found] == [
        f"data:image/png;base64,{large}",
        f"data:image/png;base64,{damaged}",
        "data:image/svg+xml," + "y" * 11,
        None,
    ]
    (warning,) = caplog.messages
    assert warning == "3 of 4 images of a message stay undecoded: larger than 10 bytes, or damaged"


def test_an_image_at_the_limit_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "MAX_IMAGE_BYTES", len(PIXELS))
    assert images_of([{"type": "image", "base64": PIXEL, "mime_type": "image/png"}]) == [PNG]


@pytest.mark.parametrize("block", [{"type": "image"}, {"type": "image", "id": "lc_1"}, {"type": "image", "image": 3}])
def test_a_block_without_an_image_is_counted(block: dict[str, object], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert images_of([block, {"type": "image", "url": ADDRESS}]) == [AT]
    assert caplog.messages == ["1 of 2 image blocks of a message are of an unknown shape and left out"]


def test_images_reach_the_detector_and_the_count_the_record() -> None:
    guard = keyword_guard()
    question = HumanMessage(
        [{"type": "text", "text": "And?"}, {"type": "image_url", "image_url": {"url": ADDRESS}}, LANGCHAIN[0][0]]
    )
    out = guard.invoke({"question": [question], "answer": AIMessage("Roses.")})
    assert asked(guard)[0].images == (AT, PNG)
    assert out.response_metadata["protector"]["images"] == 2
    assert "a.example" not in json.dumps(out.response_metadata)
