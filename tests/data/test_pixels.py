"""What image files hold: transparency and numbers of many depths. Expected values are those of the formats' specifications."""

import io
import struct

import numpy as np
import pytest
from folders import config, write, write_png
from PIL import Image

from speedit_jax.data.images import open_image, parse_background, read_image, read_whole
from speedit_jax.data.pixels import flatten
from speedit_jax.data.sources import open_source
from speedit_jax.errors import UserError

SIDE = 16
LEVEL = 1 / 127.5  # one of 256
RNG = np.random.default_rng(0)
ALPHA = np.repeat(np.linspace(0, 255, SIDE).round().astype(np.uint8)[:, None], SIDE, axis=1)
COLOUR = RNG.integers(0, 256, (SIDE, SIDE, 3), np.uint8)
GREY = COLOUR[..., 0]
RAMP = np.linspace(0, 1, SIDE * SIDE).reshape(SIDE, SIDE)


def read(path, channels=3, background=(255, 255, 255)):
    return read_image(path, (SIDE, SIDE, channels), background)


def over(colour, alpha, background):
    """The compositing of PNG's specification, 13.16, in [-1, 1]."""
    share = alpha[..., None] / 255
    return (share * colour + (1 - share) * np.array(background)) / 127.5 - 1


def test_grey_and_colour(tmp_path):
    write(tmp_path / "a.png", colour=(255, 0, 51))
    Image.new("L", (8, 8), 51).save(tmp_path / "b.png")
    Image.new("RGBA", (8, 8), (51, 51, 51, 255)).save(tmp_path / "c.png")
    colour = open_source(config(f"folder:{tmp_path}"))
    np.testing.assert_allclose([colour[i]["image"][3, 3] for i in range(3)], [[1, -1, -0.6], [-0.6] * 3, [-0.6] * 3], atol=1e-6)
    grey = open_source(config(f"folder:{tmp_path}", channels=1))
    luma = 2 * (0.299 * 255 + 0.114 * 51) / 255 - 1
    assert grey[0]["image"].shape == (8, 8, 1)
    # Pillow rounds to a grey value.
    np.testing.assert_allclose([grey[i]["image"][3, 3, 0] for i in range(3)], [luma, -0.6, -0.6], atol=1 / 127.5)


def test_sixteen_bits_are_scaled_and_not_clipped(tmp_path):
    grey = np.linspace(0, 65535, 8).round().astype(np.uint16)
    Image.fromarray(np.tile(grey, (8, 1))).save(tmp_path / "a.png")
    for channels in (1, 3):
        image = open_source(config(f"folder:{tmp_path}", channels=channels))[0]["image"]
        np.testing.assert_allclose(image, np.tile(np.linspace(-1, 1, 8)[:, None], (8, 1, channels)), atol=1 / 127.5)


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_photographs_stand_upright(tmp_path, suffix):
    """Cameras store the sensor's rows, and in EXIF tag 274 how the camera was held; 6 is a quarter turn clockwise."""
    stored = Image.fromarray(np.repeat(np.repeat(np.array([[0, 255]], np.uint8), 8, axis=0), 4, axis=1))
    exif = Image.Exif()
    exif[274] = 6
    stored.save(tmp_path / f"a.{suffix}", exif=exif)
    image = open_source(config(f"folder:{tmp_path}", channels=1))[0]["image"][..., 0]
    # JPEG rounds, though its blocks of 8 x 8 meet the edge halfway.
    np.testing.assert_allclose(image, np.repeat([[-1.0], [1.0]], 4, axis=0) * np.ones(8), atol=0.1 if suffix == "jpg" else 0)


@pytest.mark.parametrize("background", [(255, 255, 255), (0, 0, 0), (10, 200, 30)])
@pytest.mark.parametrize("suffix", ["png", "webp", "tif", "tga", "jp2"])
def test_colours_with_alpha_show_the_background(tmp_path, suffix, background):
    path = tmp_path / f"a.{suffix}"
    options = {"lossless": True, "exact": True} if suffix == "webp" else {}
    Image.fromarray(np.dstack([COLOUR, ALPHA])).save(path, **options)
    np.testing.assert_allclose(read(path, background=background), over(COLOUR, ALPHA, background), atol=LEVEL)
    luma = over(COLOUR, ALPHA, background) @ [0.299, 0.587, 0.114]
    np.testing.assert_allclose(read(path, 1, background)[..., 0], luma, atol=1.5 * LEVEL)  # rounded twice


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_greys_with_alpha_show_the_background(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    Image.merge("LA", (Image.fromarray(GREY), Image.fromarray(ALPHA))).save(path)
    for background in ((255, 255, 255), (90, 20, 200)):
        expected = over(np.repeat(GREY[..., None], 3, axis=2), ALPHA, background)
        np.testing.assert_allclose(read(path, background=background), expected, atol=LEVEL)


@pytest.mark.parametrize("mode", ["RGBA", "RGBa", "LA", "La", "PA"])
def test_every_mode_with_alpha(mode):
    """Also those that no file has but that a plugin may give."""
    if mode == "PA":
        image = Image.merge("LA", (Image.fromarray(GREY), Image.fromarray(ALPHA)))
        image.putpalette(np.repeat(np.arange(256), 3).tolist())
    else:
        image = Image.fromarray(np.dstack([np.repeat(GREY[..., None], 3, axis=2), ALPHA]))
        image = image.convert("LA").convert(mode) if mode in ("LA", "La") else image.convert(mode)
    assert image.mode == mode
    file = io.BytesIO()
    Image.new("L", (SIDE, SIDE)).save(file, "PNG")
    with open_image(file) as opened:
        opened.load()
        opened.im, opened._mode = image.im, image.mode
        if mode == "PA":
            opened.palette = image.palette
        flat, fault = flatten(opened, 3, (255, 0, 0))
    assert fault is None and flat.mode == "RGB"
    expected = (over(np.repeat(GREY[..., None], 3, axis=2), ALPHA, (255, 0, 0)) + 1) * 127.5
    # Where alpha is small, premultiplied numbers are coarse: half a level of them is up to half a level of the result.
    np.testing.assert_allclose(np.asarray(flat, float), expected, atol=1 if mode in ("RGBA", "LA", "PA") else 2)


def hidden(name):
    """(rows, PNG's colour type, bits, tRNS) of pictures of which the left half is clear and the right half (200, 200, 200)."""
    half = SIDE // 2
    if name == "rgb":
        return b"\0" + b"\x01\x02\x03" * half + b"\xc8" * 3 * half, 2, 8, struct.pack(">3H", 1, 2, 3)
    if name == "grey":
        return b"\0" + b"\x07" * half + b"\xc8" * half, 0, 8, struct.pack(">H", 7)
    if name == "rgb of 16 bits":
        row = struct.pack(">3H", 1234, 40000, 9) * half + struct.pack(">3H", *[200 * 257] * 3) * half
        return b"\0" + row, 2, 16, struct.pack(">3H", 1234, 40000, 9)
    row = struct.pack(">H", 1234) * half + struct.pack(">H", 200 * 257) * half
    return b"\0" + row, 0, 16, struct.pack(">H", 1234)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", ["rgb", "grey", "rgb of 16 bits", "grey of 16 bits"])
def test_one_clear_colour(tmp_path, name, channels):
    row, kind, bits, clear = hidden(name)
    write_png(tmp_path / "a.png", [row] * SIDE, SIDE, SIDE, bits=bits, kind=kind, clear=clear)
    for background in (255, 0):
        image = read(tmp_path / "a.png", channels, (background,) * 3)
        np.testing.assert_array_equal(image[:, : SIDE // 2], background / 127.5 - 1)
        np.testing.assert_allclose(image[:, SIDE // 2 :], 200 / 127.5 - 1, atol=1e-6)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_one_clear_grey_of_few_bits(tmp_path, bits):
    """Pillow spreads the greys over 0..255, but not the one that is clear."""
    levels = np.arange(16) % 2**bits
    row = np.packbits(np.unpackbits(levels.astype(np.uint8)[:, None], axis=1)[:, -bits:])
    for clear in range(2**bits):
        write_png(tmp_path / "a.png", [b"\0" + row.tobytes()], 16, 1, bits=bits, kind=0, clear=struct.pack(">H", clear))
        image = read_whole(tmp_path / "a.png", 3, (255, 0, 0))[0]
        greys = np.repeat(levels[:, None] * 255 // (2**bits - 1), 3, axis=1)
        np.testing.assert_array_equal(image, np.where(levels[:, None] == clear, (255, 0, 0), greys))


@pytest.mark.parametrize("suffix, clear", [("png", 0), ("png", bytes([0, 128, 255])), ("gif", 0)])
def test_palettes_with_clear_entries(tmp_path, suffix, clear):
    numbers = np.arange(SIDE * SIDE).reshape(SIDE, SIDE) % 3
    image = Image.fromarray(numbers.astype(np.uint8), "P")
    colours = np.array([[0, 255, 0], [255, 0, 0], [0, 0, 255]])
    image.putpalette(colours.ravel().tolist())
    image.save(tmp_path / f"a.{suffix}", transparency=clear)
    alpha = np.array(list(clear) if isinstance(clear, bytes) else [0, 255, 255])
    expected = over(colours[numbers], alpha[numbers], (255, 255, 255))
    np.testing.assert_allclose(read(tmp_path / f"a.{suffix}"), expected, atol=LEVEL)


def test_hidden_colours_are_hidden(tmp_path):
    """Before scaling: else they would bleed into the edges."""
    pixels = np.zeros((64, 64, 4), np.uint8)
    pixels[:, 24:40] = (200, 100, 50, 255)
    pictures = []
    for hidden_colour in ((0, 0, 0), (255, 255, 255), (255, 0, 255)):
        pixels[..., :3][pixels[..., 3] == 0] = hidden_colour
        Image.fromarray(pixels).save(tmp_path / "a.png")
        pictures.append(read(tmp_path / "a.png"))
    np.testing.assert_array_equal(pictures[0], pictures[1])
    np.testing.assert_array_equal(pictures[0], pictures[2])


def test_alpha_of_255_keeps_the_bits(tmp_path):
    for mode in ("RGBA", "LA"):
        image = Image.fromarray(np.dstack([COLOUR, ALPHA * 0 + 255])).convert(mode)
        image.save(tmp_path / "a.png")
        image.convert("L" if mode == "LA" else "RGB").save(tmp_path / "b.png")
        for channels in (1, 3):
            np.testing.assert_array_equal(read(tmp_path / "a.png", channels), read(tmp_path / "b.png", channels))


def test_the_background_of_the_config(tmp_path):
    Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(tmp_path / "a.png")
    for name, colour in (("white", 1), ("black", -1), ("#ffffff", 1), ("rgb(0,0,0)", -1)):
        np.testing.assert_array_equal(open_source(config(f"folder:{tmp_path}", background=name))[0]["image"], colour)
    old = config(f"folder:{tmp_path}")
    with old.unlocked():
        del old["background"]
    np.testing.assert_array_equal(open_source(old)[0]["image"], 1)


@pytest.mark.parametrize("name", ["", "whiet", "#12", "#ff00ff80", "255"])
def test_backgrounds_that_are_no_colours(name):
    with pytest.raises(UserError, match=rf"data\.background={name}: not a colour; give a name such as white, or #rrggbb"):
        parse_background(name)
    with pytest.raises(UserError, match="not a colour"):
        open_source(config("synthetic", background=name))


def deep(path, name):
    """Writes the ramp in numbers of many kinds."""
    of_16 = (RAMP * 65535).astype(">u2")

    def rows(channels):
        samples = np.repeat(of_16[..., None], channels, axis=2)
        if channels in (2, 4):
            samples[..., -1] = 65535
        return [b"\0" + row.tobytes() for row in samples]

    if name.startswith("png"):
        kind = {"png grey": (0, 1), "png grey alpha": (4, 2), "png rgb": (2, 3), "png rgb alpha": (6, 4)}[name]
        write_png(path, rows(kind[1]), SIDE, SIDE, bits=16, kind=kind[0])
    elif name in ("ppm", "pgm", "pgm of 12 bits", "ppm of 12 bits"):
        white, channels = (4095 if "12" in name else 65535), (3 if "ppm" in name else 1)
        samples = np.repeat((RAMP * white).astype(">u2")[..., None], channels, axis=2)
        path.write_bytes(b"P%d %d %d %d\n" % (5 + (channels == 3), SIDE, SIDE, white) + samples.tobytes())
    elif name == "tiff of 12 bits":
        write_tiff(path, twelve((RAMP * 4095).astype(int)), bits=[12])
    elif name == "tiff, white is 0":
        write_tiff(path, (65535 - of_16).astype("<u2").tobytes(), bits=[16], photometric=0)
    elif name == "tiff rgb":
        write_tiff(path, np.repeat(of_16.astype("<u2")[..., None], 3, axis=2).tobytes(), bits=[16] * 3, photometric=2)
    elif name == "tiff, big end first":
        Image.frombytes("I;16B", (SIDE, SIDE), of_16.tobytes()).save(path, format="TIFF")
    else:
        Image.fromarray(of_16.astype("<u2")).save(path, format=name.upper())


def twelve(numbers):
    """Pairs of 12 bits in three bytes."""
    first, second = numbers.reshape(-1, 2).T
    return np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], axis=1).astype(np.uint8).tobytes()


def write_tiff(path, content, bits, photometric=1, kind=1):
    """A little-endian TIFF of one strip; `kind` is its SampleFormat."""
    many, place = len(bits), 8 + len(content)
    values = struct.pack(f"<{many}H", *bits)
    tags = [(256, 3, 1, SIDE), (257, 3, 1, SIDE), (258, 3, many, bits[0] if many == 1 else place), (259, 3, 1, 1)]
    tags += [(262, 3, 1, photometric), (273, 4, 1, 8), (277, 3, 1, many), (278, 3, 1, SIDE), (279, 4, 1, len(content))]
    tags += [(339, 3, 1, kind)] if many == 1 else []
    table = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", *tag) for tag in tags) + bytes(4)
    path.write_bytes(b"II*\0" + struct.pack("<I", place + len(values)) + content + values + table)


DEEP = ["png grey", "png grey alpha", "png rgb", "png rgb alpha", "ppm", "pgm", "pgm of 12 bits", "ppm of 12 bits"]
DEEP += ["tiff", "tiff rgb", "tiff of 12 bits", "tiff, white is 0", "tiff, big end first", "jpeg2000"]


@pytest.mark.parametrize("name", DEEP)
def test_deep_numbers_with_a_range_are_scaled(tmp_path, name):
    Image.fromarray((RAMP * 255).astype(np.uint8)).save(tmp_path / "reference.png")
    deep(tmp_path / "a.image", name)
    for channels in (1, 3):
        image = read(tmp_path / "a.image", channels)
        np.testing.assert_allclose(image, read(tmp_path / "reference.png", channels), atol=1.001 * LEVEL)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_few_bits_reach_white(tmp_path, bits):
    numbers = np.arange(SIDE) % 2**bits
    packed = np.packbits((numbers[:, None] >> np.arange(bits - 1, -1, -1) & 1).astype(np.uint8)).tobytes()
    write_png(tmp_path / "a.png", [b"\0" + packed] * SIDE, SIDE, SIDE, bits=bits, kind=0)
    np.testing.assert_allclose(read(tmp_path / "a.png")[0, :, 0], numbers / (2**bits - 1) * 2 - 1, atol=LEVEL)


FLOAT, WIDE, FEW = "floats, which have no defined range", "signed or of 32 bits", "stay below 16384 of 65535"


@pytest.mark.parametrize(
    "numbers, options, message",
    [
        (RAMP.astype("<f4"), {"bits": [32], "kind": 3}, FLOAT),
        ((RAMP * 255).astype("<f4"), {"bits": [32], "kind": 3}, FLOAT),
        ((RAMP * (2**31 - 1)).astype("<i4"), {"bits": [32], "kind": 2}, WIDE),
        ((RAMP * 255).astype("<i4"), {"bits": [32], "kind": 2}, WIDE),
        ((RAMP * (2**32 - 1)).astype("<u4"), {"bits": [32]}, WIDE),
        ((RAMP * 32767).astype("<i2"), {"bits": [16], "kind": 2}, WIDE),
        ((RAMP * 1023).astype("<u2"), {"bits": [16]}, FEW),
        ((RAMP * 4095).astype("<u2"), {"bits": [16]}, FEW),
        ((RAMP * 16383).astype("<u2"), {"bits": [16]}, FEW),
        (np.repeat((RAMP * 4095).astype("<u2")[..., None], 3, axis=2), {"bits": [16] * 3, "photometric": 2}, FEW),
    ],
)
def test_numbers_without_a_range_are_refused(tmp_path, numbers, options, message):
    write_tiff(tmp_path / "a.tif", numbers.tobytes(), **options)
    with pytest.raises(UserError, match=f"cannot read the image .*a.tif: its .*{message}.*save it with 8 bits") as error:
        open_source(config(f"folder:{tmp_path}"))[0]
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind, channels", [(0, 1), (2, 3), (4, 2), (6, 4)])
def test_twelve_bits_in_sixteen_of_png_are_refused(tmp_path, kind, channels):
    samples = np.repeat((RAMP * 4095).astype(">u2")[..., None], channels, axis=2)
    if channels in (2, 4):
        samples[..., -1] = 65535
    write_png(tmp_path / "a.png", [b"\0" + row.tobytes() for row in samples], SIDE, SIDE, bits=16, kind=kind)
    with pytest.raises(ValueError, match=FEW):
        read(tmp_path / "a.png")


def test_black_is_black_in_any_depth(tmp_path):
    write_png(tmp_path / "a.png", [bytes(1 + 2 * SIDE)] * SIDE, SIDE, SIDE, bits=16, kind=0)
    np.testing.assert_array_equal(read(tmp_path / "a.png"), -1)


def test_pfm_is_of_floats(tmp_path):
    Image.fromarray(RAMP.astype(np.float32)).save(tmp_path / "a.pfm")
    with pytest.raises(UserError, match=FLOAT):
        open_source(config(f"folder:{tmp_path}"))[0]
