"""Captions of folders: all formats give one list, and what is missing or said twice is named."""

import csv
import json
import sys

import pytest
from errors import assert_one_line
from folders import config, open_folder, write

from speedit_jax.data.captions import read_captions
from speedit_jax.data.sources import open_source
from speedit_jax.errors import UserError

# Two images have two captions; one has a comma, quotes and a letter outside ASCII.
EXPECTED = {
    "a/1.png": ["a red square"],
    "a/deep/2.png": ["a green square", "grass"],
    "b/3.png": ['a "café", at night'],
    "b/4.jpeg": ["a blue square", "the sea"],
}
PAIRS = [(name, text) for name, texts in EXPECTED.items() for text in texts]


@pytest.fixture
def root(tmp_path):
    for name in EXPECTED:
        write(tmp_path / "images" / name)
    return tmp_path / "images"


def jsonl(root, pairs=PAIRS, name="metadata.jsonl"):
    (root / name).write_text("".join(json.dumps({"file_name": file, "text": text}) + "\n" for file, text in pairs))


def jsonl_of_lists(root):
    jsonl(root, EXPECTED.items())


def jsonl_in_directories(root):
    jsonl(root, [PAIRS[0]])
    jsonl(root / "a" / "deep", [("2.png", EXPECTED["a/deep/2.png"])])
    jsonl(root / "b", [(name.removeprefix("b/"), text) for name, text in PAIRS[3:]])


def csv_table(root):
    with (root / "metadata.csv").open("w", encoding="utf-8-sig", newline="") as file:
        csv.writer(file).writerows([("text", "file_name"), *((text, name) for name, text in PAIRS)])


def parquet(root):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    names, texts = zip(*PAIRS, strict=True)
    parquet.write_table(arrow.table({"file_name": names, "text": texts}), root / "metadata.parquet")


def text_files(root):
    for name, texts in EXPECTED.items():
        (root / name).with_suffix(".txt").write_text("  \n".join(texts) + "\n\n", encoding="utf-8")


def coco(root):
    images = [{"id": 10 + i, "file_name": name.rpartition("/")[2], "height": 8} for i, name in enumerate(EXPECTED)]
    number = {name: 10 + i for i, name in enumerate(EXPECTED)}
    notes = [{"id": i, "image_id": number[name], "caption": f" {text}\n"} for i, (name, text) in enumerate(PAIRS)]
    images.append({"id": 1, "file_name": "of another part of COCO.jpg"})
    (root.parent / "captions.json").write_text(json.dumps({"images": images, "annotations": notes}))


FORMATS = {
    "jsonl": (jsonl, "auto"),
    "jsonl of lists": (jsonl_of_lists, "metadata"),
    "jsonl in directories": (jsonl_in_directories, "auto"),
    "csv": (csv_table, "auto"),
    "parquet": (parquet, "auto"),
    "text files": (text_files, "auto"),
    "coco": (coco, "../captions.json"),
}


@pytest.mark.parametrize("case", FORMATS)
def test_all_formats_give_one_list(root, case):
    write_them, where = FORMATS[case]
    write_them(root)
    where = str(root / where) if where.endswith("json") else where
    source = open_folder(root)
    assert read_captions(source, where) == [EXPECTED[name] for name in source.files]


def test_a_table_anywhere_and_other_suffixes(root):
    source = open_folder(root)
    jsonl(root, name="mine.jsonl")
    assert read_captions(source, str(root / "mine.jsonl")) == [EXPECTED[name] for name in source.files]
    text_files(root)
    for path in root.rglob("*.txt"):
        path.rename(path.with_suffix(".caption"))
    assert read_captions(source, ".caption") == [EXPECTED[name] for name in source.files]


def test_a_table_by_a_path_that_begins_with_a_dot(root, monkeypatch):
    source = open_folder(root)
    jsonl(root, name="mine.jsonl")
    for here, where in ((root, "./mine.jsonl"), (root / "a", "../mine.jsonl")):
        monkeypatch.chdir(here)
        assert read_captions(source, where) == [EXPECTED[name] for name in source.files]


def test_some_classes_of_a_folder(root):
    jsonl(root)
    source = open_folder(root, classes="b")
    assert read_captions(source) == [EXPECTED["b/3.png"], EXPECTED["b/4.jpeg"]]


def test_images_without_a_caption(root):
    jsonl(root, [*PAIRS[:2], ("b/3.png", " \n")])
    source = open_folder(root)
    lacks = f"no caption for {root / 'b/3.png'} and 1 more; write one"
    assert_one_line(lambda: read_captions(source, max_missing=0), lacks, "--max_missing=2")
    with pytest.raises(UserError, match=r"write one$"):  # evaluate has no such flag
        read_captions(source)
    assert_one_line(lambda: read_captions(source, max_missing=1), "b/3.png")
    assert read_captions(source, max_missing=2) == [["a red square"], ["a green square"], [""], [""]]


def test_no_captions(root):
    assert_one_line(lambda: read_captions(open_folder(root)), f"no image in {root} has a caption", "metadata.jsonl")
    assert_one_line(lambda: read_captions(open_folder(root), "metadata"), "there is no metadata.jsonl")
    assert_one_line(lambda: read_captions(open_folder(root), "/no/such.jsonl"), "/no/such.jsonl: no such file")
    assert_one_line(lambda: read_captions(open_source(config("synthetic"))), "no captions")
    assert_one_line(lambda: read_captions(open_source(config("blobs")), ".txt"), "captions of its own")


def test_two_sources_of_captions(root):
    jsonl(root)
    (root / "b" / "3.txt").write_text("another one")
    assert_one_line(lambda: read_captions(open_folder(root)), "metadata.jsonl", "b/3.txt", "--captions=metadata")
    assert len(read_captions(open_folder(root), "metadata")) == 4
    csv_table(root)
    assert_one_line(lambda: read_captions(open_folder(root), "metadata"), "metadata.jsonl and in metadata.csv")


DAMAGE = {
    "a whole path": ('{"file_name": "/tmp/a/1.png", "text": "one"}', ["row 2: file_name /tmp/a/1.png", "relative to", "/images"]),
    "no such image": ('{"file_name": "a/5.png", "text": "five"}', ["row 2: file_name a/5.png is not there"]),
    "columns the wrong way round": (
        json.dumps({"file_name": "a cat, " * 100, "text": "a/1.png"}),
        ["row 2: file_name a cat, a cat,", "is not there"],
    ),
    "no name": ('{"file": "a/1.png", "text": "one"}', ["row 2", "needs file_name and text", "file, text"]),
    "no text": ('{"file_name": "a/1.png", "text": 1}', ["row 2", "needs file_name and text"]),
    "a list": ('["a/1.png", "one"]', ["row 2", "it has nothing"]),
    "no JSON": ('{"file_name": "a/1.png"', ["row 2: not JSON"]),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_row_is_named(root, case):
    line, words = DAMAGE[case]
    jsonl(root, PAIRS[:1])
    with (root / "metadata.jsonl").open("a") as file:
        file.write(line + "\n")
    assert_one_line(lambda: read_captions(open_folder(root)), str(root / "metadata.jsonl"), *words)


def test_bytes_that_are_not_text(root):
    (root / "a" / "1.txt").write_bytes(b"caf\xe9")
    assert_one_line(lambda: read_captions(open_folder(root)), "a/1.txt", "UTF-8")


def test_half_of_a_character(root):
    """JavaScript cuts texts within an emoji, and JSON can write what is left."""
    jsonl(root, [*PAIRS[1:], ("a/1.png", "a cat \ud83d")])
    assert_one_line(lambda: read_captions(open_folder(root)), str(root / "a/1.png"), r"\ud83d", "'a cat")
    jsonl(root, [*PAIRS[1:], ("a/1.png", "a cat \ud83d\ude00")])
    assert "a cat \U0001f600" in read_captions(open_folder(root))[0]


def test_parquet_without_pyarrow(root, monkeypatch):
    (root / "metadata.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    assert_one_line(lambda: read_captions(open_folder(root)), "metadata.parquet needs pyarrow", "metadata.jsonl")


@pytest.mark.parametrize(
    "content", ["[]", '{"images": [], "annotations": [{"image_id": 1, "caption": "x"}]}', "{", '{"images": 1}']
)
def test_json_that_is_not_cocos(root, content):
    path = root.parent / "captions.json"
    path.write_text(content)
    assert_one_line(lambda: read_captions(open_folder(root), str(path)), str(path), "is not COCO's JSON")


def test_a_name_that_is_twice_there(root):
    write(root / "a" / "3.png")
    coco(root)
    assert_one_line(lambda: read_captions(open_folder(root), str(root.parent / "captions.json")), "3.png may be")


@pytest.mark.parametrize("case", ["jsonl", "csv", "text files"])
def test_captions_are_not_named_among_what_is_left_out(root, case):
    FORMATS[case][0](root)
    assert not open_folder(root).left_out
    (root / "b" / "notes.txt").write_text("no image has this name")
    assert open_folder(root).left_out == {".txt": 1}


@pytest.mark.parametrize("sign", ["\u2028", "\x85", "\x0c", "\x1c"])
def test_only_line_breaks_end_a_line(tmp_path, sign):
    """Text from web pages has signs that Python's splitlines takes for line breaks, and CSV and editors do not."""
    write(tmp_path / "1.png")
    (tmp_path / "1.txt").write_text(f"a red{sign}square\r\nred\n", encoding="utf-8", newline="")
    assert read_captions(open_folder(tmp_path)) == [["a red square", "red"]]
    (tmp_path / "1.txt").unlink()
    (tmp_path / "metadata.csv").write_text(f"file_name,text\r\n1.png,a red{sign}square\r\n", encoding="utf-8", newline="")
    assert read_captions(open_folder(tmp_path)) == [["a red square"]]


def test_a_quotation_mark_that_stays_open(tmp_path):
    for i in range(2):
        write(tmp_path / f"{i}.png")
    rest = "1.png,a cat\n" * 20_000
    (tmp_path / "metadata.csv").write_text(f'file_name,text\n0.png,"a dog\n{rest}')
    assert_one_line(lambda: read_captions(open_folder(tmp_path)), "metadata.csv", "row 2", "quotation mark")


@pytest.mark.parametrize("row, words", [("1.png,a dog, asleep", "' asleep'.* marks"), ("1.png", "it has file_name$")])
def test_a_row_of_more_or_fewer_columns_than_the_first(tmp_path, row, words):
    """Without quotation marks, a text would lose what comes after its first comma."""
    for i in range(2):
        write(tmp_path / f"{i}.png")
    (tmp_path / "metadata.csv").write_text(f'file_name,text\n0.png,"a cat, awake",,\n{row}\n')
    with pytest.raises(UserError, match=f"metadata.csv, row 3: .*{words}"):
        read_captions(open_folder(tmp_path))
