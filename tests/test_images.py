"Pictures of every kind a person may have: converted, or refused by name and reason."
import io
import warnings

import numpy as np
import pytest
from hypothesis import example, given, settings, strategies as st
from PIL import Image

from rea2seg.images import ImageError, load_image
from stacks import picture

RGB = picture(20, 30)

def encoded(image, kind="PNG", **options) -> bytes:
    out = io.BytesIO(); (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(out, kind, **options)
    return out.getvalue()

@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM", "GIF", "WEBP"])
def test_lossless_formats_come_back_exactly(tmp_path, kind):
    few = RGB // 64 * 64 # a GIF has 256 colours
    options = dict(lossless=True) if kind == "WEBP" else {}
    path = tmp_path / f"some.{kind.lower()}"; path.write_bytes(encoded(few, kind, **options))
    for source in (path, str(path), path.read_bytes(), Image.open(path)): np.testing.assert_array_equal(load_image(source), few)

def test_suffixes_do_not_matter(tmp_path):
    (tmp_path / "photo.jpg").write_bytes(encoded(RGB)); np.testing.assert_array_equal(load_image(tmp_path / "photo.jpg"), RGB)
    (tmp_path / "photo").write_bytes(encoded(RGB)); np.testing.assert_array_equal(load_image(tmp_path / "photo"), RGB)

def test_result_is_owned_and_quiet():
    "Contiguous and writable: nothing downstream complains, nothing leaks back into the source."
    import torch
    source = Image.fromarray(RGB)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        array = load_image(source); torch.from_numpy(array)
    assert array.flags.writeable and array.flags.c_contiguous and array.dtype == np.uint8
    array[:] = 0
    np.testing.assert_array_equal(np.asarray(source), RGB)

# ---- modes ------------------------------------------------------------------------------------------------------------------

def test_cmyk():
    cmyk = Image.fromarray(RGB).convert("CMYK")
    np.testing.assert_array_equal(load_image(encoded(cmyk, "TIFF")), RGB)
    assert np.abs(load_image(encoded(cmyk, "JPEG", quality=95, subsampling=0)).astype(int) - RGB).mean() < 4

@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bits_are_scaled(kind):
    deep = np.linspace(0, 65535, 600).reshape(20, 30).astype(np.uint16)
    got = load_image(encoded(Image.fromarray(deep), kind))
    np.testing.assert_array_equal(got, np.repeat((deep / 257).round().astype(np.uint8)[..., None], 3, 2))

def test_16_bit_colour():
    import cv2
    deep = (RGB.astype(np.uint16) * 257)
    ok, blob = cv2.imencode(".png", deep[..., ::-1])
    assert ok; np.testing.assert_array_equal(load_image(blob.tobytes()), RGB)

def test_palette_grey_and_one_bit():
    few = RGB // 64 * 64
    np.testing.assert_array_equal(load_image(encoded(Image.fromarray(few).quantize(256))), few)
    np.testing.assert_array_equal(load_image(encoded(RGB[..., 0])), np.repeat(RGB[..., :1], 3, 2))
    bits = Image.fromarray(RGB[..., 0] > 99)
    np.testing.assert_array_equal(load_image(encoded(bits)), np.where(RGB[..., :1] > 99, 255, 0).repeat(3, 2))

def test_transparency_lies_over_white():
    alpha = np.dstack([RGB, np.where(np.arange(30) < 15, 255, 0) * np.ones((20, 1), int)]).astype(np.uint8)
    got = load_image(encoded(alpha))
    np.testing.assert_array_equal(got[:, :15], RGB[:, :15]); assert (got[:, 15:] == 255).all()
    palette = Image.fromarray(RGB // 128 * 128).quantize(8); palette.info["transparency"] = palette.getpixel((0, 0))
    got = load_image(encoded(palette, transparency=palette.getpixel((0, 0))))
    assert (got[0, 0] == 255).all()

@pytest.mark.parametrize("turn, undo", enumerate([lambda a: a, lambda a: a[:, ::-1], lambda a: a[::-1, ::-1], lambda a: a[::-1], lambda a: a.swapaxes(0, 1),
                                                 lambda a: np.rot90(a, -1), lambda a: a[::-1, ::-1].swapaxes(0, 1), np.rot90], 1), ids=str)
def test_exif_rotation(turn, undo):
    exif = Image.Exif(); exif[0x0112] = turn
    for source in (encoded(RGB, "PNG", exif=exif), Image.open(io.BytesIO(encoded(RGB, "TIFF", exif=exif)))):
        np.testing.assert_array_equal(load_image(source), undo(RGB))

def test_nonsense_exif_is_no_rotation():
    for exif in (b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x63\0\0\0\0\0\0\0", b"Exif\0\0garbage"):
        assert load_image(encoded(RGB, "JPEG", exif=exif)).shape == RGB.shape

@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (3000, 7), (7, 3000)])
def test_extreme_shapes(shape):
    array = np.full((*shape, 3), 200, np.uint8)
    np.testing.assert_array_equal(load_image(encoded(array)), array)

# ---- refused ----------------------------------------------------------------------------------------------------------------

LARGE = picture(200, 300)
def frames(kind): return encoded(RGB, kind, save_all=True, append_images=[Image.fromarray(255 - RGB)])

@pytest.mark.parametrize("content, says", [
    (b"", r"is empty \(0 bytes\)"),
    (b"just some text", "not a picture of a known format"),
    (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not a picture of a known format"),
    (encoded(RGB)[:20], "not a picture|cannot be read"),
    (encoded(LARGE)[:2000], "cannot be read"),
    (encoded(LARGE, "JPEG")[:2000], "cannot be read"),
    (encoded(LARGE, "BMP")[:2000], "cannot be read"),
    (encoded(LARGE, "TIFF")[:2000], "cannot be read"),
    (encoded(LARGE, "WEBP")[:1000], "cannot be read"),
    (frames("GIF"), r"animated or has pages \(2 frames\)"),
    (frames("WEBP"), r"animated or has pages \(2 frames\)"),
    (frames("PNG"), r"animated or has pages \(2 frames\)"),
    (frames("TIFF"), r"animated or has pages \(2 frames\)"),
], ids=["zero bytes", "text", "svg", "head only", "truncated png", "truncated jpeg", "truncated bmp", "truncated tiff", "truncated webp", "gif", "webp", "apng", "pages"])
def test_refused_files(tmp_path, content, says):
    path = tmp_path / "my picture.png"; path.write_bytes(content)
    with pytest.raises(ImageError, match=says) as e: load_image(path)
    assert "my picture.png" in str(e.value)
    with pytest.raises(ImageError, match=says): load_image(content)

def test_refused_places(tmp_path):
    for source, says in ((tmp_path / "none.png", "is not a file"), (tmp_path, "is a folder"), ("https://example.org/a.png", "download the picture first"), ("", "folder|not a file"),
                         ("x" * 5000, "not a file|cannot be read"), ("a\0b", "not a file|cannot be read"), (None, "expected a path.*NoneType"), (3, "got int")):
        with pytest.raises(ImageError, match=says): load_image(source)

@pytest.mark.parametrize("array, got", [(RGB[..., 0], r"uint8\[20, 30\]"), (RGB / 255, r"float64\[20, 30, 3\]"), (np.dstack([RGB, RGB[..., 0]]), r"uint8\[20, 30, 4\]"),
                                        (RGB[:0], r"uint8\[0, 30, 3\]"), (RGB.transpose(2, 0, 1), r"uint8\[3, 20, 30\]")])
def test_refused_arrays(array, got):
    with pytest.raises(ImageError, match=r"must be uint8\[H,W,3\], got " + got): load_image(array)

def test_over_the_limit():
    for source in (encoded(RGB), RGB, Image.fromarray(RGB)):
        with pytest.raises(ImageError, match="600 pixels, the limit is 599"): load_image(source, max_pixels=599)
        assert load_image(source, max_pixels=600).shape == RGB.shape

def test_a_bomb_is_refused_before_it_is_decoded():
    "A few bytes that claim gigapixels."
    import struct
    import zlib
    chunk = lambda kind, body: struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    for side, says in ((12_000, "144,000,000 pixels, the limit is 89,478,485"), (60_000, "cannot be read.*exceeds limit")):
        bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(ImageError, match=says): load_image(bomb)

def test_deep_values_that_are_no_picture(tmp_path):
    for values, says in ((np.array([[np.nan, 1]], np.float32), "NaN or infinite"), (np.array([[-3.0, 1]], np.float32), "values from -3 to 1"), (np.array([[0, 70000]], np.int32), "values from 0 to 70000")):
        path = tmp_path / "deep.tiff"; Image.fromarray(values).save(path)
        with pytest.raises(ImageError, match=says) as e: load_image(path)
        assert "deep.tiff" in str(e.value)
    np.testing.assert_array_equal(load_image(Image.fromarray(np.array([[0, .5, 1]], np.float32)))[0, :, 0], [0, 128, 255])

SAMPLES = {kind: encoded(RGB, kind, **options) for kind, options in dict(PNG={}, JPEG={}, GIF={}, TIFF={}, BMP={}, WEBP={}, PPM={}).items()} | {
    "EXIF": encoded(RGB, "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0"), "PALETTE": encoded(Image.fromarray(RGB).quantize(16)),
    "TIFF LZW": encoded(RGB, "TIFF", compression="tiff_lzw")}

@given(kind=st.sampled_from(sorted(SAMPLES)), places=st.lists(st.tuples(st.integers(0, 2**20), st.integers(0, 255)), max_size=6), cut=st.floats(0, 1) | st.just(1.0))
@example(kind="TIFF", places=[(130, 1)], cut=1.0) # a field of another type: TypeError inside Pillow
@settings(max_examples=300, deadline=None)
def test_damaged_bytes_give_a_picture_or_an_image_error(kind, places, cut):
    blob = bytearray(SAMPLES[kind])
    for at, value in places: blob[at % len(blob)] = value
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try: array = load_image(bytes(blob[:int(cut * len(blob))]), max_pixels=10**6)
        except ImageError as e: assert str(e)
        else: assert array.dtype == np.uint8 and array.ndim == 3 and array.shape[2] == 3 and array.size
