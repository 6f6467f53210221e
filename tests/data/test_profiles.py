"""ICC profiles that are written here, byte by byte as ICC.1:2001-04 says; what they mean is computed from their numbers."""

import io
import struct

import numpy as np
import pytest
from folders import open_folder
from PIL import Image, ImageCms

from speedit_jax.data import profiles
from speedit_jax.data.images import read_image

SIDE = 16
COLOUR = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), np.uint8)
# XYZ of red, green and blue at full, adapted to D50: Adobe RGB (1998), and sRGB as in its own profile.
ADOBE = np.array([[0.60974, 0.31111, 0.01947], [0.20528, 0.62567, 0.06087], [0.14919, 0.06322, 0.74457]])
SRGB = np.array([[0.43607, 0.22249, 0.01392], [0.38515, 0.71687, 0.09708], [0.14307, 0.06061, 0.71410]])
D50 = (0.9642, 1.0, 0.8249)


def fixed(*numbers):
    return b"".join(struct.pack(">i", round(n * 65536)) for n in numbers)


def icc(space, tags, kind=b"mntr", pcs=b"XYZ "):
    """A version 2 profile of {signature: content of the tag}."""
    tags = {
        b"desc": b"desc" + bytes(4) + struct.pack(">I", 2) + b"x\0" + bytes(78),
        b"wtpt": b"XYZ " + bytes(4) + fixed(*D50),
    } | tags
    table, content, place = b"", b"", 128 + 4 + 12 * len(tags)
    for name, data in tags.items():
        data += bytes(-len(data) % 4)
        table += name + struct.pack(">II", place + len(content), len(data))
        content += data
    size = place + len(content)
    header = (
        struct.pack(">I4sI4s4s4s", size, b"none", 0x02100000, kind, space, pcs) + bytes(12) + b"acsp" + bytes(28) + fixed(*D50)
    )
    return header.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + content


def gamma(of):
    return b"curv" + bytes(4) + struct.pack(">IH", 1, round(of * 256))


def rgb_profile(colourants, of=2.2):
    xyz = {name: b"XYZ " + bytes(4) + fixed(*c) for name, c in zip((b"rXYZ", b"gXYZ", b"bXYZ"), colourants, strict=True)}
    return icc(b"RGB ", xyz | dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), gamma(of)))


def grey_profile(of):
    return icc(b"GRAY", {b"kTRC": gamma(of)})


def cmyk_profile():
    """Of inks of which only black counts: its share takes that much from L*."""
    lightness = [255 if not number & 1 else 0 for number in range(16)]  # black, the last ink, varies fastest
    clut = bytes(value for light in lightness for value in (light, 128, 128))
    ramp = bytes(range(256))
    head = b"mft1" + bytes(4) + bytes([4, 3, 2, 0]) + fixed(1, 0, 0, 0, 1, 0, 0, 0, 1)
    return icc(b"CMYK", {b"A2B0": head + ramp * 4 + clut + ramp * 3}, kind=b"prtr", pcs=b"Lab ")


def encode_srgb(linear):
    """IEC 61966-2-1: linear light, 0..1 -> 0..255."""
    linear = np.clip(linear, 0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def read(path, channels=3):
    """0..255."""
    return (read_image(path, (SIDE, SIDE, channels)) + 1) * 127.5


@pytest.mark.parametrize("suffix, options", [("png", {}), ("tif", {}), ("webp", {"lossless": True})])
def test_colours_become_srgb(tmp_path, suffix, options):
    Image.fromarray(COLOUR).save(tmp_path / f"a.{suffix}", icc_profile=rgb_profile(ADOBE, 563 / 256), **options)
    linear = (COLOUR / 255) ** (563 / 256)
    expected = encode_srgb(linear @ ADOBE @ np.linalg.inv(SRGB))
    assert np.abs(expected - COLOUR).max() > 30
    # Little CMS computes with 15 bits and rounds; near black, where sRGB is steep, that is a level or two.
    np.testing.assert_allclose(read(tmp_path / f"a.{suffix}"), expected, atol=2)


@pytest.mark.parametrize("channels", [1, 3])
def test_greys_become_srgb(tmp_path, channels):
    levels = np.arange(256, dtype=np.uint8).reshape(SIDE, SIDE)
    Image.fromarray(levels).save(tmp_path / "a.png", icc_profile=grey_profile(1.0))
    expected = np.repeat(encode_srgb(levels / 255)[..., None], channels, axis=2)
    np.testing.assert_allclose(read(tmp_path / "a.png", channels), expected, atol=2)


def test_a_grey_image_may_have_a_profile_of_rgb(tmp_path):
    levels = np.arange(256, dtype=np.uint8).reshape(SIDE, SIDE)
    Image.fromarray(levels).save(tmp_path / "a.png", icc_profile=rgb_profile(ADOBE, 1.0))
    expected = encode_srgb(levels / 255)[..., None].repeat(3, axis=2)
    np.testing.assert_allclose(read(tmp_path / "a.png"), expected, atol=2)


def test_inks_become_srgb(tmp_path):
    inks = np.random.default_rng(1).integers(0, 256, (SIDE, SIDE, 4), np.uint8)
    Image.fromarray(inks, "CMYK").save(tmp_path / "a.tif", icc_profile=cmyk_profile())
    lightness = 100 * (1 - inks[..., 3:] / 255)
    cubed = ((lightness + 16) / 116) ** 3
    expected = encode_srgb(np.where(lightness > 8, cubed, lightness / 903.3)).repeat(3, axis=2)
    # L* of 8 bits is up to two levels of sRGB.
    np.testing.assert_allclose(read(tmp_path / "a.tif"), expected, atol=4)


def test_alpha_and_palettes_keep_their_profile(tmp_path):
    profile = rgb_profile(ADOBE, 563 / 256)
    Image.fromarray(COLOUR).save(tmp_path / "plain.png", icc_profile=profile)
    plain = read(tmp_path / "plain.png")
    alpha = np.full((SIDE, SIDE, 1), 255, np.uint8)
    alpha[:4] = 0
    Image.fromarray(np.concatenate([COLOUR, alpha], axis=2)).save(tmp_path / "rgba.png", icc_profile=profile)
    image = read(tmp_path / "rgba.png")
    np.testing.assert_array_equal(image[:4], 255)
    np.testing.assert_array_equal(image[4:], plain[4:])
    flat = Image.new("RGB", (SIDE, SIDE), (30, 200, 90))
    flat.save(tmp_path / "flat.png", icc_profile=profile)
    flat.convert("P", palette=Image.Palette.ADAPTIVE).save(tmp_path / "palette.png", icc_profile=profile)
    np.testing.assert_array_equal(read(tmp_path / "palette.png"), read(tmp_path / "flat.png"))


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA"])
@pytest.mark.parametrize("kind", ["Little CMS", "as published"])
def test_srgb_keeps_the_bits(tmp_path, mode, kind):
    if kind == "Little CMS":
        profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    else:
        linear = np.arange(1024) / 1023
        decoded = np.where(linear <= 0.04045, linear / 12.92, ((linear + 0.055) / 1.055) ** 2.4)
        curve = b"curv" + bytes(4) + struct.pack(">I1024H", 1024, *np.round(decoded * 65535).astype(int))
        xyz = {name: b"XYZ " + bytes(4) + fixed(*c) for name, c in zip((b"rXYZ", b"gXYZ", b"bXYZ"), SRGB, strict=True)}
        profile = icc(b"RGB ", xyz | dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve))
        if mode == "L":
            profile = icc(b"GRAY", {b"kTRC": curve})
    image = Image.fromarray(COLOUR).convert(mode)
    image.save(tmp_path / "a.png", icc_profile=profile)
    image.save(tmp_path / "b.png")
    np.testing.assert_array_equal(read(tmp_path / "a.png"), read(tmp_path / "b.png"))


@pytest.mark.parametrize(
    "profile", [b"junk", rgb_profile(ADOBE)[:200], grey_profile(2.2), cmyk_profile()], ids=["junk", "cut", "grey", "inks"]
)
def test_profiles_that_cannot_be_used_are_ignored_and_named_once(tmp_path, capsys, monkeypatch, profile):
    monkeypatch.setattr(profiles, "_warned", type(profiles._warned)())
    for name in ("a.png", "b.png"):
        Image.fromarray(COLOUR).save(tmp_path / name, icc_profile=profile)
    source = open_folder(tmp_path, height=SIDE, width=SIDE)
    for i in (0, 1, 0):
        np.testing.assert_array_equal(source[i]["image"], np.float32(COLOUR) / 127.5 - 1)
    (line,) = capsys.readouterr().err.splitlines()
    assert f"warning: {tmp_path}/a.png: its colour profile cannot be used (" in line and "check_data" in line


def test_images_in_memory_have_profiles_too():
    file = io.BytesIO()
    Image.fromarray(COLOUR).save(file, "PNG", icc_profile=rgb_profile(ADOBE))
    assert np.abs(read(file) - COLOUR).max() > 30
