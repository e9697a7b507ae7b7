"""Captions and lists of pictures: what training reads of them, or why it cannot."""

import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet

from finetune.data.pictures import load_pictures
from finetune.recipe.schema import Data
from tests.builders.inputs import Refused, check_refused
from tests.builders.material import SOURCE, read_material, training

COLOURS = ("red", "green", "blue")
"""The colours of the pictures 0.png, 1.png, ..., by which they are told apart."""


def save_pictures(folder: Path, *names: str) -> None:
    for name, colour in zip(names or ("0.png", "1.png"), COLOURS, strict=False):
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 40), colour).save(file)


def jsonl(*rows: Any) -> str:
    return "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows)


def listing(*captions: Any, **more: Any) -> str:
    rows = [{"file_name": f"{n}.png", "text": text, **more} for n, text in enumerate(captions)]
    return jsonl(*rows)


@dataclass(frozen=True)
class Accepted:
    """Files beside pictures, and the captions that training must read, by the pictures' colours."""

    name: str
    files: Mapping[str, str | bytes]
    captions: Sequence[str]
    data: Mapping[str, str] = field(default_factory=dict)
    pictures: Sequence[str] = ("0.png", "1.png")
    says: str = ""


def beside(text: str | bytes, caption: str, name: str, **more: Any) -> Accepted:
    files = {"0.txt": text, "1.txt": "a cat"}
    return Accepted(name, files, [caption, "a cat"], **more)


ACCEPTED = [
    beside("a dog", "a dog", "a line without an end"),
    beside("  a dog \n\n", "a dog", "white space around"),
    beside("a dog\r\n", "a dog", "lines of Windows"),
    beside("a dog\non a mat\n", "a dog\non a mat", "two lines"),
    beside("\ufeffa dog", "a dog", "a byte-order mark"),
    beside("ein Hündchen, 犬, 🐕", "ein Hündchen, 犬, 🐕", "letters of other scripts"),
    beside('"a dog": {x}, #3, <b>, %s, $HOME', '"a dog": {x}, #3, <b>, %s, $HOME', "signs"),
    beside("null", "null", "a word that others read as nothing"),
    beside("12:30", "12:30", "a time"),
    beside("0100", "0100", "a number"),
    beside("dog " * 300, ("dog " * 300).strip(), "a long caption"),
    Accepted("endings in capitals", {"0.TXT": "a dog", "1.txt": "a cat"}, ["a dog", "a cat"]),
    Accepted(
        "dots in a name",
        {"a.b.txt": "a dog"},
        ["a dog"],
        pictures=["a.b.png"],
    ),
    Accepted("a list", {"metadata.jsonl": listing("a dog", "a cat")}, ["a dog", "a cat"]),
    Accepted(
        "a list in an order of its own",
        {
            "metadata.jsonl": jsonl(
                {"text": "a cat", "file_name": "1.png"}, {"file_name": "0.png", "text": "a dog"}
            )
        },
        ["a cat", "a dog"],
    ),
    Accepted(
        "a list with a byte-order mark",
        {"metadata.jsonl": "\ufeff" + listing("a dog", "a cat")},
        ["a dog", "a cat"],
    ),
    Accepted(
        "a list with empty lines",
        {"metadata.jsonl": f"\n{listing('a dog', 'a cat')}\n\n"},
        ["a dog", "a cat"],
    ),
    Accepted(
        "a list with lines of Windows",
        {"metadata.jsonl": listing("a dog", "a cat").replace("\n", "\r\n").encode()},
        ["a dog", "a cat"],
    ),
    Accepted(
        "a list with rare line breaks in texts",
        {"metadata.jsonl": listing("a\u2028dog", "a\x85cat")},
        ["a\u2028dog", "a\x85cat"],
    ),
    Accepted(
        "a list with more columns",
        {"metadata.jsonl": listing("a dog", "a cat", tags=["x", {"y": 1}], text_2=None)},
        ["a dog", "a cat"],
    ),
    Accepted(
        "a list whose rows differ in columns",
        {
            "metadata.jsonl": jsonl(
                {"file_name": "0.png", "text": "a dog", "a": 1},
                {"file_name": "1.png", "text": "a cat", "a": "x"},
            )
        },
        ["a dog", "a cat"],
    ),
    Accepted(
        "a list with paths",
        {
            "metadata.jsonl": jsonl(
                {"file_name": "in/0.png", "text": "a dog"},
                {"file_name": "./1.png", "text": "a cat"},
            )
        },
        ["a dog", "a cat"],
        pictures=["in/0.png", "1.png"],
    ),
    Accepted(
        "a list with paths of Windows",
        {"metadata.jsonl": jsonl({"file_name": "in\\0.png", "text": "a dog"})},
        ["a dog"],
        pictures=["in/0.png"],
    ),
    Accepted(
        "a list with odd names",
        {
            "metadata.jsonl": jsonl(
                {"file_name": "a::b [x] $HOME.png", "text": "a dog"},
                {"file_name": "zip://é.png", "text": "a cat"},
            )
        },
        ["a dog", "a cat"],
        pictures=["a::b [x] $HOME.png", "zip:/é.png"],
    ),
    Accepted(
        "a list that names a picture twice",
        {
            "metadata.jsonl": jsonl(
                {"file_name": "0.png", "text": "a dog"}, {"file_name": "0.png", "text": "a red dog"}
            )
        },
        ["a dog", "a red dog"],
        pictures=["0.png"],
    ),
    Accepted(
        "another column of captions",
        {"metadata.jsonl": listing(None, None, words="a dog")},
        ["a dog", "a dog"],
        {"caption_column": "words"},
    ),
    Accepted(
        "another column of pictures",
        {"metadata.jsonl": jsonl({"photo_file_name": "0.png", "text": "a dog"})},
        ["a dog"],
        {"image_column": "photo"},
        pictures=["0.png"],
    ),
    Accepted(
        "a list and one prompt",
        {"metadata.jsonl": jsonl({"file_name": "0.png"}, {"file_name": "1.png"})},
        ["a sks", "a sks"],
        {"prompt": "a sks"},
    ),
    Accepted(
        "CSV", {"metadata.csv": "file_name,text\n0.png,a dog\n1.png,a cat\n"}, ["a dog", "a cat"]
    ),
    Accepted(
        "CSV in quotes",
        {"metadata.csv": 'file_name,text\n0.png,"a dog, ""wet""\non a mat"\n'},
        ['a dog, "wet"\non a mat'],
        pictures=["0.png"],
    ),
    Accepted(
        "CSV with a byte-order mark",
        {"metadata.csv": "\ufefftext,file_name\r\na dog,0.png\r\n"},
        ["a dog"],
        pictures=["0.png"],
    ),
    Accepted(
        "CSV with words that others read as nothing",
        {"metadata.csv": "file_name,text\n0.png,NA\n1.png,null\n2.png,nan\n"},
        ["NA", "null", "nan"],
        pictures=["0.png", "1.png", "2.png"],
    ),
    Accepted(
        "CSV with numbers",
        {"metadata.csv": "file_name,text\n0.png,007\n1.png,1e5\n"},
        ["007", "1e5"],
    ),
    Accepted(
        "CSV with empty lines",
        {"metadata.csv": "file_name,text\n\n0.png,a dog\n\n1.png,a cat"},
        ["a dog", "a cat"],
    ),
    Accepted(
        "one prompt in place of texts",
        {"0.txt": "a dog"},
        ["a sks", "a sks"],
        {"prompt": "a sks"},
        says="Not read, as data.prompt is the caption of all pictures:",
    ),
    Accepted(
        "one prompt in place of a list's texts",
        {"metadata.jsonl": listing("a dog", "a cat")},
        ["a sks", "a sks"],
        {"prompt": "a sks"},
        says="Not read, as data.prompt is the caption of all pictures:",
    ),
    Accepted(
        "two lists",
        {
            "metadata.csv": "file_name,text\n0.png,a dog\n1.png,a cat\n",
            "metadata.jsonl": listing("no", "no"),
        },
        ["a dog", "a cat"],
        says="metadata.csv has the captions:",
    ),
    Accepted(
        "a list and texts",
        {"metadata.jsonl": listing("a dog", "a cat"), "0.txt": "no"},
        ["a dog", "a cat"],
        says="metadata.jsonl has the captions:",
    ),
    Accepted(
        "a list of a part",
        {"metadata.jsonl": listing("a dog")},
        ["a dog"],
        says="metadata.jsonl does not list them:",
    ),
    Accepted(
        "a text without a picture",
        {"0.txt": "a dog", "1.txt": "a cat", "2.txt": "no"},
        ["a dog", "a cat"],
        says="as no picture has this name:",
    ),
    Accepted(
        "a kind of captions that is not read",
        {"0.txt": "a dog", "1.txt": "a cat", "0.caption": "no"},
        ["a dog", "a cat"],
        says="as no pictures are of this kind:",
    ),
]


def write_files(folder: Path, files: Mapping[str, str | bytes]) -> None:
    for name, content in files.items():
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())


@pytest.mark.parametrize("case", ACCEPTED, ids=[case.name for case in ACCEPTED])
def test_training_reads_what_is_written(
    case: Accepted, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / SOURCE
    save_pictures(folder, *case.pictures)
    write_files(folder, case.files)
    data = Data(source=str(folder), **case.data)
    pictures = load_pictures(data, tmp_path / "cache", 8)
    assert [picture.caption for picture in pictures] == case.captions
    said = capsys.readouterr().err
    assert case.says in said
    assert said.count("\n") == bool(case.says)


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv", "metadata.parquet", "0.txt"])
def test_what_has_changed_is_read_again_though_no_time_shows_it(name: str, tmp_path: Path) -> None:
    folder = tmp_path / SOURCE
    save_pictures(folder, "0.png")

    def write(caption: str) -> None:
        if name.endswith("parquet"):
            rows = pyarrow.table({"file_name": ["0.png"], "text": [caption]})
            parquet.write_table(rows, folder / name)
        else:
            contents = {
                "metadata.jsonl": listing(caption),
                "metadata.csv": f"file_name,text\n0.png,{caption}\n",
                "0.txt": caption,
            }
            (folder / name).write_text(contents[name])
        os.utime(folder / name, (1_000_000_000, 1_000_000_000))

    for caption in ("a dog", "a cat"):
        write(caption)
        (picture,) = load_pictures(Data(source=str(folder)), tmp_path / "cache", 8)
        assert picture.caption == caption


def files(*overrides: str, **given: str | bytes) -> Callable[[Path], list[str]]:
    """Arrange two pictures with files beside them, named as in ``metadata_jsonl``."""

    def arrange(folder: Path) -> list[str]:
        save_pictures(folder / SOURCE)
        named = {name.lstrip("_").replace("_", "."): content for name, content in given.items()}
        write_files(folder / SOURCE, named)
        return training(folder, *overrides)

    return arrange


def texts(content: str | bytes, *overrides: str) -> Callable[[Path], list[str]]:
    return files(*overrides, _0_txt="a dog", _1_txt=content)


def lists(content: str | bytes, *overrides: str) -> Callable[[Path], list[str]]:
    return files(*overrides, metadata_jsonl=content)


def naming(name: Any) -> Callable[[Path], list[str]]:
    return lists(listing("a dog") + jsonl({"file_name": name, "text": "a cat"}))


def captioned(caption: Any) -> Callable[[Path], list[str]]:
    return lists(listing("a dog", caption))


def odd(name: str, make: Callable[[Path], None]) -> Callable[[Path], list[str]]:
    def arrange(folder: Path) -> list[str]:
        save_pictures(folder / SOURCE)
        (folder / SOURCE / "0.txt").write_text("a dog")
        make(folder / SOURCE / name)
        return training(folder)

    return arrange


def empty_parquet(file: Path) -> None:
    parquet.write_table(pyarrow.table({"file_name": pyarrow.array([], pyarrow.string())}), file)


PROMPT = "give data.prompt for all"
LINE = ["metadata.jsonl, line 2"]
REFUSED = [
    Refused("no caption", files(_0_txt="a dog"), ["1.png has no caption", "write 1.txt", PROMPT]),
    Refused(
        "an empty caption", texts(""), ["1.txt: the caption is empty", "write some text", PROMPT]
    ),
    Refused("white space", texts(" \n\t"), ["1.txt: the caption has no visible", "found SPACE"]),
    Refused(
        "invisible characters", texts("\u200b\u2060"), ["1.txt", "ZERO WIDTH SPACE, WORD JOINER"]
    ),
    Refused("two byte-order marks", texts("\ufeff\ufeff"), ["1.txt", "no visible character"]),
    Refused("NUL", texts("a\0dog"), ["1.txt", "must be text in UTF-8", "found UTF-16"]),
    Refused(
        "UTF-16", texts("a dög".encode("utf-16")), ["1.txt", "found UTF-16", "save it as UTF-8"]
    ),
    Refused("UTF-16 without a mark", texts("a dög".encode("utf-16-be")), ["1.txt", "found UTF-16"]),
    Refused("UTF-32", texts("a dög".encode("utf-32")), ["1.txt", "must be text in UTF-8"]),
    Refused(
        "Windows-1252", texts("a dog\nin a café".encode("cp1252")), ["1.txt", "byte 0xe9 in line 2"]
    ),
    Refused(
        "Shift-JIS", texts("犬".encode("shift-jis")), ["1.txt", "must be text in UTF-8", "line 1"]
    ),
    Refused("a pipe", odd("1.txt", os.mkfifo), ["1.txt", "must be a file (found a pipe)"]),
    Refused("a folder", odd("1.txt", Path.mkdir), ["1.txt", "must be a file (found a folder)"]),
    Refused(
        "a link to nothing",
        odd("1.txt", lambda file: file.symlink_to("no")),
        ["1.txt", "a soft link to nothing"],
    ),
    Refused(
        "a tag alone",
        texts("<sks>"),
        ["leaves no word of the caption of", "1.png", "'<sks>'", "text.clean_caption: false"],
    ),
    Refused("a number sign alone", texts("#3"), ["leaves no word", "1.png"]),
    Refused("a mention alone", texts("@mydog"), ["leaves no word", "1.png"]),
    Refused("Chinese alone", texts("一只狗"), ["leaves no word", "'一只狗'"]),
    Refused(
        "a list that is no JSON",
        lists(f"{listing('a dog')}{{'file_name': 1}}\n"),
        [*LINE, "one JSON object", "Expecting property name"],
    ),
    Refused("half a line", lists(f'{listing("a dog")}{{"file_name": '), [*LINE, "one JSON object"]),
    Refused(
        "a list in brackets",
        lists("[\n" + listing("a dog")),
        ["metadata.jsonl, line 1", "one JSON object", "'['"],
    ),
    Refused(
        "a line of other JSON",
        lists(f"{listing('a dog')}5\n"),
        [*LINE, "one JSON object (found '5')"],
    ),
    Refused(
        "two objects in a line", lists(f"{listing('a dog')}{{}} {{}}\n"), [*LINE, "Extra data"]
    ),
    Refused("a deep list", lists("[" * 100_000), ["metadata.jsonl, line 1", "one JSON object"]),
    Refused("an empty list", lists(""), ["metadata.jsonl lists no pictures", "or remove it"]),
    Refused("a list of empty lines", lists("\n \n"), ["metadata.jsonl lists no pictures"]),
    Refused(
        "a list in UTF-16",
        lists(listing("a dog").encode("utf-16")),
        ["metadata.jsonl", "found UTF-16"],
    ),
    Refused(
        "a list in Windows-1252",
        lists(listing("a dog", "café").encode("cp1252")),
        ["metadata.jsonl", "byte 0xe9 in line 2"],
    ),
    Refused(
        "no file name",
        lists(listing("a dog") + jsonl({"file": "1.png", "text": "x"})),
        [*LINE, "must be a field 'file_name'", "found 'file', 'text'", "data.image_column"],
    ),
    Refused("an empty file name", naming(" "), [*LINE, "file_name must be a file's name"]),
    Refused(
        "no text for a file name", naming(5), [*LINE, "file_name must be a file's name", "found 5"]
    ),
    Refused(
        "nothing for a file name",
        naming(None),
        [*LINE, "file_name must be a file's name", "found None"],
    ),
    Refused(
        "a file that is not there",
        naming("no.png"),
        [*LINE, "no.png", "found nothing", "correct the name"],
    ),
    Refused("a folder for a file", naming("."), [*LINE, "found a folder"]),
    Refused("an absolute path", naming("/etc/passwd"), [*LINE, "a path below", "'/etc/passwd'"]),
    Refused(
        "a path out of the folder", naming("../../x.png"), [*LINE, "a path below", "'../../x.png'"]
    ),
    Refused("a path out and in", naming("in/../../x.png"), [*LINE, "a path below"]),
    Refused("an address", naming("https://example.org/a.png"), [*LINE, "found nothing"]),
    Refused("NUL in a name", naming("a\0.png"), [*LINE, "a path below", "'a\\x00.png'"]),
    Refused("a name longer than any", naming("a" * 5000), [*LINE, "File name too long"]),
    Refused(
        "no text",
        lists(listing("a dog") + jsonl({"file_name": "1.png"})),
        [*LINE, "must be a field 'text'", "found 'file_name'", "data.caption_column"],
    ),
    Refused(
        "another name for text",
        lists(listing("a dog"), "data.caption_column=words"),
        ["line 1", "a field 'words'", "'text'"],
    ),
    Refused("null", captioned(None), [*LINE, "the caption is empty"]),
    Refused("a number", captioned(5), [*LINE, "must be text (found 5)", "in quotes"]),
    Refused(
        "several captions", captioned(["a cat", "a dog"]), [*LINE, "must be text (found ['a cat'"]
    ),
    Refused("an empty text in a list", captioned(""), [*LINE, "the caption is empty"]),
    Refused("invisible text in a list", captioned("\ufeff"), [*LINE, "no visible character"]),
    Refused("NUL in a list", captioned("a\0b"), [*LINE, "NUL character"]),
    Refused(
        "half a character in a list",
        lists(listing("a dog") + '{"file_name": "1.png", "text": "a \\ud800"}'),
        [*LINE, "not UTF-8"],
    ),
    Refused(
        "a list that is a folder",
        odd("metadata.jsonl", Path.mkdir),
        ["metadata.jsonl", "found a folder"],
    ),
    Refused(
        "a list that is a pipe", odd("metadata.csv", os.mkfifo), ["metadata.csv", "found a pipe"]
    ),
    Refused(
        "CSV with a comma too many",
        files(metadata_csv="file_name,text\n0.png,a dog\n1.png,a cat, wet\n"),
        ["metadata.csv, line 3", "must be 2 fields", "quotes"],
    ),
    Refused(
        "CSV with a field too few",
        files(metadata_csv="file_name,text\n0.png\n"),
        ["metadata.csv, line 2", "must be 2 fields"],
    ),
    Refused(
        "CSV with an open quote",
        files(metadata_csv='file_name,text\n0.png,"a dog\n'),
        ["metadata.csv, line 2", "not CSV", "unexpected end"],
    ),
    Refused(
        "CSV with semicolons",
        files(metadata_csv="file_name;text\n0.png;a dog\n"),
        ["metadata.csv, line 2", "a field 'file_name'", "'file_name;text'"],
    ),
    Refused(
        "CSV with names alone",
        files(metadata_csv="file_name,text\n"),
        ["metadata.csv lists no pictures"],
    ),
    Refused("an empty CSV", files(metadata_csv=""), ["metadata.csv lists no pictures"]),
    Refused(
        "a CSV field of a megabyte",
        files(metadata_csv=f"file_name,text\n0.png,{'x' * 10**6}\n"),
        ["metadata.csv, line 2", "field larger"],
    ),
    Refused(
        "broken Parquet",
        files(metadata_parquet=b"PAR1 and no more"),
        ["metadata.parquet cannot be read", "write it again"],
    ),
    Refused(
        "empty Parquet",
        odd("metadata.parquet", empty_parquet),
        ["metadata.parquet lists no pictures"],
    ),
    Refused(
        "an empty file for Parquet",
        files(metadata_parquet=b""),
        ["metadata.parquet cannot be read"],
    ),
]


@pytest.mark.parametrize("case", REFUSED, ids=[case.name for case in REFUSED])
def test_a_caption_that_cannot_be_read_is_named(
    case: Refused, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "given"
    folder.mkdir()
    check_refused(case, read_material, folder, capsys)


def test_words_that_cleaning_drops_are_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_pictures(tmp_path / SOURCE)
    write_files(tmp_path / SOURCE, {"0.txt": "a photo of d0gg3r", "1.txt": "d0gg3r on a mat"})
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            read_material(training(tmp_path))
    (record,) = caplog.records
    assert "Cleaning drops 'd0gg3r' in 2 of" in record.getMessage()
    assert str(tmp_path / SOURCE / "0.png") in record.getMessage()
