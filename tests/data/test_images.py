from __future__ import annotations

import importlib
import io
import os

import datasets
import numpy as np
import pytest
from PIL import Image

from modeling_pico.data import BadImageError, check_images, decode_image


images = importlib.import_module("modeling_pico.data.images")
decoding = importlib.import_module("modeling_pico.model.image_decoding_pico")


def encode(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def decode_bytes(content):
    return decode_image({"bytes": content, "path": None})


def noise(width=64, height=48):
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def test_every_kind_of_value(tmp_path):
    picture = noise()
    expected = np.asarray(picture)
    path = tmp_path / "a.png"
    picture.save(path)
    values = [path, str(path), {"path": str(path), "bytes": None}, {"bytes": path.read_bytes(), "path": None}]
    for value in [*values, picture, {"bytes": path.read_bytes(), "path": "does-not-exist.png"}]:
        decoded = decode_image(value)
        assert decoded.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(decoded), expected)


def test_exif_orientation():
    picture = Image.new("RGB", (4, 2), "white")
    picture.putpixel((0, 0), (255, 0, 0))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    decoded = decode_bytes(encode(picture, exif=exif))
    assert decoded.size == (2, 4)
    assert decoded.getpixel((1, 0)) == (255, 0, 0)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_a_decoded_image_is_not_turned_again(kind):
    """The processor decodes what a data set gives, which is decoded already."""
    exif = Image.Exif()
    exif[0x0112] = 6
    decoded = decode_bytes(encode(Image.new("RGB", (4, 2), "white"), kind, exif=exif))
    assert decoded.size == decode_image(decoded).size == (2, 4)


def test_transparency_is_laid_on_white():
    picture = Image.new("RGBA", (3, 1), (0, 0, 0, 0))
    picture.putpixel((1, 0), (0, 0, 255, 255))
    picture.putpixel((2, 0), (0, 0, 0, 51))
    decoded = decode_bytes(encode(picture))
    assert [decoded.getpixel((x, 0)) for x in range(3)] == [(255, 255, 255), (0, 0, 255), (204, 204, 204)]
    grey = Image.new("LA", (1, 1), (0, 0))
    assert decode_bytes(encode(grey)).getpixel((0, 0)) == (255, 255, 255)


def test_palette_with_and_without_transparency():
    picture = Image.new("P", (2, 1))
    picture.putpalette([255, 0, 0, 0, 255, 0])
    picture.putpixel((1, 0), 1)
    decoded = decode_bytes(encode(picture))
    assert [decoded.getpixel((x, 0)) for x in range(2)] == [(255, 0, 0), (0, 255, 0)]
    assert decode_bytes(encode(picture, transparency=0)).getpixel((0, 0)) == (255, 255, 255)


def test_sixteen_bits_are_scaled_and_not_clipped():
    levels = np.array([[0, 257, 128 * 257, 65535]], dtype=np.uint16)
    content = encode(Image.fromarray(levels))
    for decoded in (decode_bytes(content), decode_image(Image.fromarray(levels.astype(np.int32)))):
        assert [decoded.getpixel((x, 0))[0] for x in range(4)] == [0, 1, 128, 255]
    shares = Image.fromarray(np.array([[0.0, 1.0]], dtype=np.float32))
    assert decode_image(shares).getpixel((1, 0)) == (255, 255, 255)


def test_cmyk_grey_and_bilevel():
    red = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    for kind in ("JPEG", "TIFF"):
        assert np.abs(np.array(decode_bytes(encode(red, kind)).getpixel((4, 4))) - (255, 0, 0)).max() < 10
    assert decode_bytes(encode(Image.new("L", (1, 1), 90))).getpixel((0, 0)) == (90, 90, 90)
    assert decode_bytes(encode(Image.new("1", (1, 1), 1))).getpixel((0, 0)) == (255, 255, 255)


def test_animation_gives_its_first_frame():
    frames = [Image.new("RGB", (2, 2), color) for color in ("red", "blue")]
    assert decode_bytes(encode(frames[0], "GIF", save_all=True, append_images=frames[1:])).getpixel((0, 0)) == (
        255,
        0,
        0,
    )


@pytest.fixture
def bad_files(tmp_path):
    content = encode(noise(), "JPEG")
    files = {
        "missing.jpg": (None, "does not exist"),
        "truncated.jpg": (content[: len(content) // 2], "truncated"),
        "truncated.png": (encode(noise())[:2000], "truncated|broken"),
        "text.jpg": (b"this is not an image", "not an image"),
        "empty.jpg": (b"", "not an image"),
    }
    for name, (data, _) in files.items():
        if data is not None:
            (tmp_path / name).write_bytes(data)
    return {str(tmp_path / name): message for name, (_, message) in files.items()}


def test_bad_files_are_named(bad_files):
    for path, message in bad_files.items():
        with pytest.raises(BadImageError, match=message) as error:
            decode_image({"path": path, "bytes": None})
        assert path in str(error.value)


def test_bad_values_are_named():
    with pytest.raises(BadImageError, match="an empty image entry"):
        decode_image({"path": None, "bytes": None})
    with pytest.raises(BadImageError, match="7 bytes is not an image"):
        decode_bytes(b"nothing")
    with pytest.raises(BadImageError, match="object of type NoneType"):
        decode_image(None)
    with pytest.raises(BadImageError, match="There is no image: got an object of type ndarray"):
        decode_image(np.zeros((2, 2), dtype=np.uint8))


@pytest.mark.parametrize("options", [{"kind": "JPEG"}, {"kind": "JPEG", "progressive": True}, {"kind": "PNG"}])
def test_check_and_decoding_agree_on_truncation(options):
    content = encode(noise(200, 150), **options)
    for share in (0.0, 0.05, 0.5, 0.9, 0.99, 1.0):
        value = {"bytes": content[: int(share * len(content))], "path": None}
        problem = images._find_problem(value)
        if share == 1.0:
            assert problem == ""
            decode_image(value)
        else:
            assert problem
            with pytest.raises(BadImageError):
                decode_image(value)


def image_dataset(paths):
    features = datasets.Features(image=datasets.Image(decode=False), number=datasets.Value("int64"))
    rows = {"image": [{"path": str(path), "bytes": None} for path in paths], "number": list(range(len(paths)))}
    return datasets.Dataset.from_dict(rows, features=features)


def test_check_images_reports_and_skips(bad_files, make_images, warnings_of):
    good = make_images("a.png", "b.png")
    dataset = image_dataset([good[0], *bad_files, good[1]])
    with pytest.raises(BadImageError, match="5 of 7 images cannot be read") as error:
        check_images(dataset)
    assert all(path in str(error.value) for path in bad_files)
    messages = warnings_of(images)
    with pytest.raises(ValueError, match="(?s)5 of 7 images cannot be read.*more than the share of 0.5"):
        check_images(dataset, on_bad_image="skip")
    assert check_images(dataset.select([0, 1, 6]), on_bad_image="skip")["number"][:] == [0, 6]
    assert len(messages) == 1
    assert messages[0].startswith("1 of 3 images cannot be read")
    with pytest.raises(ValueError, match="'error' or 'skip', got 'ignore'"):
        check_images(dataset, on_bad_image="ignore")


def test_check_images_lists_ten(tmp_path):
    with pytest.raises(BadImageError, match="and 2 more") as error:
        check_images(image_dataset([tmp_path / f"{i}.png" for i in range(12)]))
    assert str(error.value).count("does not exist") == 10


def test_second_check_reads_nothing_unless_a_file_changed(make_images, monkeypatch):
    paths = make_images("a.png", "b.png")
    dataset = image_dataset(paths)
    assert check_images(dataset) is dataset

    def forbidden(value):
        raise AssertionError("read again")

    with monkeypatch.context() as patch:
        patch.setattr(images, "_find_problem", forbidden)
        assert check_images(image_dataset(paths)).num_rows == 2
    paths[1].write_bytes(b"broken now")
    os.utime(paths[1], ns=(1, 1))
    with pytest.raises(BadImageError, match="1 of 2 images"):
        check_images(image_dataset(paths))


def test_check_images_with_bytes_processes_and_no_rows(make_images):
    content = [path.read_bytes() for path in make_images("a.png", "b.png")] + [b"bad"]
    features = datasets.Features(image=datasets.Image(decode=False))
    dataset = datasets.Dataset.from_dict({"image": [{"bytes": c, "path": None} for c in content]}, features=features)
    assert len(check_images(dataset, on_bad_image="skip", num_proc=2)) == 2
    assert len(check_images(dataset.select([]))) == 0


@pytest.mark.parametrize(
    ("kind", "mode"), [("JPEG", "RGB"), ("JPEG", "CMYK"), ("PNG", "RGB"), ("PNG", "RGBA"), ("PNG", "P")]
)
def test_large_images_are_reduced_by_averaging(kind, mode, monkeypatch):
    """A batch of the largest allowed images fits into memory."""
    monkeypatch.setattr(decoding, "MAX_DECODED_PIXELS", 40 * 30)
    ramp = np.linspace(0, 255, 400).astype(np.uint8)
    picture = Image.fromarray(np.broadcast_to(ramp, (300, 400)).copy()).convert("RGB").convert(mode)
    exif = Image.Exif()
    exif[0x0112] = 6
    decoded = decode_bytes(encode(picture, kind, exif=exif))
    assert decoded.size == (30, 40)
    np.testing.assert_allclose(np.asarray(decoded)[:, 15, 0], np.linspace(0, 255, 400).reshape(40, 10).mean(1), atol=6)
    # A PIL image, which is whole already, becomes the same.
    with Image.open(io.BytesIO(encode(picture, kind, exif=exif))) as opened:
        opened.load()
        np.testing.assert_allclose(np.asarray(decode_image(opened)), np.asarray(decoded), atol=3)
    assert decode_image(Image.new("RGB", (40, 30))).size == (40, 30)
    assert decode_image(Image.new("RGB", (41, 30))).size == (40, 29)


def test_a_large_jpeg_is_never_decoded_whole(monkeypatch):
    monkeypatch.setattr(decoding, "MAX_DECODED_PIXELS", 40 * 30)
    sizes = []
    convert = decoding._convert
    monkeypatch.setattr(decoding, "_convert", lambda image, size: sizes.append(image.size) or convert(image, size))
    decode_bytes(encode(Image.new("RGB", (400, 300)), "JPEG"))
    assert sizes == [(50, 38)]
