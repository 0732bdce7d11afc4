"""The open protocol without HTTP: messages, pixels, token, service; and what an environment of its own must have installed."""

import base64
import io
import json
import subprocess
import sys
import textwrap
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from common.errors import ConfigError, ScorerError
from reward_servers.wire.bearer import is_authorized, read_token
from reward_servers.wire.messages import RequestRefused, WireLimits, decode_request
from reward_servers.wire.pixels import PixelFormat, check_images, decode_image, encode_image
from reward_servers.wire.service import RewardService
from reward_servers.wire.settings import ServeSettings
from tests.wire_servers import VERSION, Level, level_images, token_file

ROOT = Path(__file__).resolve().parent.parent


def item(identity: str = "a", level: int = 7, **changes: Any) -> dict[str, Any]:
    """A request's item as a client would write it by hand."""
    return {"id": identity, "prompt": {"text": "a cat"}, "image": encode_image(level_images(level)[0], "png")} | changes


def body(*items: dict[str, Any], **changes: Any) -> bytes:
    """A request's bytes."""
    return json.dumps({"reward": "level", "items": list(items)} | changes).encode()


def encoded(image: Image.Image, kind: str, **options: Any) -> str:
    """Base64 of a file that Pillow writes."""
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return base64.b64encode(buffer.getvalue()).decode()


def answered(request: bytes, **limits: int) -> list[dict[str, Any]]:
    """What the service answers."""
    answer = RewardService(Level(), WireLimits(**limits)).answer(decode_request(request))
    results: list[dict[str, Any]] = json.loads(answer.model_dump_json())["results"]
    return results


def refused(request: bytes, **limits: int) -> RequestRefused:
    """How the service refuses."""
    with pytest.raises(RequestRefused) as caught:
        answered(request, **limits)
    return caught.value


@pytest.mark.parametrize("pixel_format", ["png", "webp"])
def test_an_image_comes_out_as_it_went_in(pixel_format: PixelFormat) -> None:
    image = np.random.default_rng(3).integers(0, 256, size=(17, 23, 3), dtype=np.uint8)
    assert np.array_equal(decode_image(encode_image(image, pixel_format), 17 * 23, "item"), image)


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("not base64!", "not base64"),
        ("", "neither PNG nor WebP"),
        (base64.b64encode(b"GIF89a").decode(), "neither PNG nor WebP"),
        (encoded(Image.new("RGB", (8, 8)), "JPEG"), "neither PNG nor WebP"),
        (encoded(Image.new("RGB", (8, 8), (9, 99, 199)), "WEBP", quality=50), "lossy"),
        (encoded(Image.new("RGBA", (8, 8)), "PNG"), "mode 'RGBA'"),
        (encoded(Image.new("L", (8, 8)), "PNG"), "mode 'L'"),
        (encoded(Image.fromarray(np.zeros((8, 8), dtype=np.uint16)), "PNG"), "8 bits"),
        (encode_image(level_images(1, size=64)[0], "png")[:80], "cannot be read"),
        (encode_image(level_images(1, size=64)[0], "webp")[:60], "cannot be read"),
    ],
)
def test_what_is_no_lossless_rgb_image_is_refused_with_its_rule(text: str, rule: str) -> None:
    with pytest.raises(RequestRefused, match=rule) as caught:
        decode_image(text, 1 << 20, "item 'a'")
    assert (caught.value.status, caught.value.code) == (422, "bad_image")
    assert "item 'a'" in str(caught.value)


def test_pixels_are_counted_before_they_are_decoded() -> None:
    """A PNG of a few hundred bytes whose header, with its checksum, promises 6,000 x 6,000 pixels."""
    content = bytearray(base64.b64decode(encode_image(level_images(1)[0], "png")))
    content[16:24] = (6_000).to_bytes(4, "big") * 2
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    with pytest.raises(RequestRefused, match="6000 x 6000 pixels") as caught:
        decode_image(base64.b64encode(bytes(content)).decode(), 1 << 22, "item")
    assert (caught.value.status, caught.value.code) == (413, "too_large")


@pytest.mark.parametrize(
    "images", [np.zeros((2, 8, 8, 3)), np.zeros((8, 8, 3), np.uint8), np.zeros((1, 8, 8, 4), np.uint8), np.zeros((1, 0, 8, 3), np.uint8)]
)
def test_a_batch_of_another_type_or_shape_is_an_error(images: Any) -> None:
    with pytest.raises(ScorerError, match="uint8 RGB"):
        check_images(images)


def test_the_service_scores_images_of_several_sizes_in_the_requests_order() -> None:
    sizes = {"a": (7, 8), "b": (9, 16), "c": (11, 8)}
    items = [item(name, image=encode_image(level_images(level, size=size)[0], "webp")) for name, (level, size) in sizes.items()]
    results = answered(body(*items))
    assert [(one["id"], one["score"], one["error"], one["scorer_version"]) for one in results] == [
        ("a", 7.0, "", VERSION), ("b", 9.0, "", VERSION), ("c", 11.0, "", VERSION),
    ]  # fmt: skip
    assert [one["details"] for one in results] == [{"size": 8.0}, {"size": 16.0}, {"size": 8.0}]  # what is not finite stays away


def test_a_failing_item_is_null_with_its_reason_and_its_neighbors_are_scored() -> None:
    bad = item("b", prompt={"text": "", "metadata": {"raises": "value"}})
    results = answered(body(item("a"), bad, item("c", level=9)))
    assert [one["score"] for one in results] == [7.0, None, 9.0]
    assert results[1]["error"] == "ValueError: bad pixel"


@pytest.mark.parametrize(
    ("request_body", "says"),
    [
        (b"", "body"),
        (b"{", "body"),
        (b"[]", "body"),
        (b'{"reward": "level"}', "items"),
        (b"\xff\xfe", "body"),
        (body(), "items"),
        (body(item(), surprise=1), "surprise"),
        (body(item(surprise=1)), "items.0.surprise"),
        (body(item(id=3)), "items.0.id"),
        (body(item(image=None)), "items.0.image"),
        (body(item(prompt={"text": 4})), "items.0.prompt.text"),
        (body(item(prompt={"text": "x", "metadata": []})), "items.0.prompt.metadata"),
        (body(item("a"), item("b"), item("a")), "'a' stands on more than one item"),
        (b'{"reward": "level", "items": ' + b"[" * 5000 + b"]" * 5000 + b"}", "recursion limit"),
    ],
)
def test_a_body_that_breaks_the_protocol_is_refused_and_the_place_named(request_body: bytes, says: str) -> None:
    refusal = refused(request_body)
    assert (refusal.status, refusal.code) == (400, "bad_body")
    assert says in str(refusal)
    assert len(str(refusal)) <= 1000


def test_limits_and_foreign_rewards_are_refused_before_anything_is_scored() -> None:
    assert (refused(body(item(), reward="other")).status, refused(body(item("a"), item("b")), max_items=1).status) == (404, 413)
    assert refused(body(item()), max_pixels=63).status == 413  # an image has 64
    assert refused(body(item("a"), item("b")), max_total_pixels=127).status == 413
    assert len(answered(body(item("a"), item("b")), max_total_pixels=128, max_pixels=64)) == 2


def test_a_token_is_read_from_a_file_and_compared_whole(tmp_path: Path) -> None:
    token = read_token(token_file(tmp_path))
    assert is_authorized(f"Bearer {token}", token)
    assert is_authorized(f"bearer {token}", token)
    for header in ("", "Bearer", f"Basic {token}", f"Bearer {token}x", f"Bearer {token[:-1]}", "Bearer ü", token):
        assert not is_authorized(header, token)
    for text in ("", "two words", "zwölf"):
        (tmp_path / "bad").write_text(text, encoding="utf-8")
        with pytest.raises(ConfigError, match="token"):
            read_token(str(tmp_path / "bad"))
    with pytest.raises(ConfigError, match="cannot be read"):
        read_token(str(tmp_path / "absent"))


def test_an_address_that_others_reach_needs_a_token() -> None:
    for host in ("0.0.0.0", "::", "10.0.0.1", "example.org"):
        with pytest.raises(ValidationError, match="token_file"):
            ServeSettings(host=host)
        assert not ServeSettings(host=host, token_file="t").is_loopback
    assert all(ServeSettings(host=host).is_loopback for host in ("127.0.0.1", "::1", "localhost"))


def test_the_servers_process_imports_neither_torch_nor_ray_nor_arrow() -> None:
    program = """
        import sys
        for name in ("torch", "ray", "pyarrow", "transformers", "scipy", "rapidfuzz"):
            sys.modules[name] = None                      # an import of it now raises ImportError
        import reward_servers.wire.serve_main, reward_servers.wire.child, reward_servers.scorers.deqa
        import reward_servers.scorers.vlm_yes_no, reward_servers.scorers.unified_reward
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
