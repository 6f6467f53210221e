"""A small npm package of the layout of emoji-datasource-google."""

import io
import json
import tarfile

from PIL import Image

from benchmarks import emoji_text

TONES = list(emoji_text.TONES.items())
BASES = ["1F44B", "1F91A", "1F590", "270B"]  # each has five tones; those of the last are all alike


def picture(base, tone):
    """One colour for a base, and darker with its tone."""
    hue = 50 * BASES.index(base) if base in BASES else 250
    image = Image.new("RGBA", (64, 64), (hue, 255 - hue, 40 * (0 if base == BASES[-1] else tone), 255))
    file = io.BytesIO()
    image.save(file, "png")
    return file.getvalue()


def write_package(path):
    """The .tgz that `npm pack` writes, with a few pictures."""
    records, files = [], {}

    def entry(base, tone, code):
        name = f"{base}-{code}.png".lower().replace("-.", ".")
        files[f"package/img/google/64/{name}"] = picture(base, tone)
        return {"image": name, "has_img_google": True}

    for base in BASES:
        variants = {code: entry(base, i, code) for i, (code, _) in enumerate(TONES, 1)}
        variants["1F3FB-1F3FD"] = entry(base, 6, "1F3FB-1F3FD")
        names = {"name": f"HAND {base}", "short_names": ["some_hand", f"hand-{base.lower()}"], "unified": base}
        records.append(entry(base, 0, "") | names | {"skin_variations": variants})
    flag = {"name": "Flag", "short_names": ["flag"], "unified": "FLAG"}
    records += [entry("FLAG", 0, "") | flag, entry("OLD", 0, "") | flag | {"unified": "OLD", "obsoleted_by": "FLAG"}]
    with tarfile.open(path, "w:gz") as opened:
        for name, content in {"package/emoji.json": json.dumps(records).encode(), **files}.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            opened.addfile(member, io.BytesIO(content))
    return path
