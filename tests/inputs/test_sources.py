"""Sources of pictures: folders, zips and datasets of every form, or why they cannot be read."""

import io
import json
import os
import tarfile
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import pytest
from PIL import Image

from adapters.errors import quiet_libraries
from finetune.data.pictures import load_pictures
from finetune.data.prior import load_own
from finetune.recipe.schema import Data, PicturePrior
from tests.builders.inputs import Refused, check_refused
from tests.builders.material import SOURCE, read_material, training

COLOURS = {"red": (255, 0, 0), "lime": (0, 255, 0), "blue": (0, 0, 255)}
NAMES = {level: name for name, level in COLOURS.items()}


@pytest.fixture(autouse=True)
def own_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hub")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def png(colour: str) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (40, 40), colour).save(stream, "PNG")
    return stream.getvalue()


def put(folder: Path, **colours: str) -> None:
    """Write pictures of the names and colours given."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, colour in colours.items():
        (folder / f"{name}.png").write_bytes(png(colour))


def pack(file: Path | io.BytesIO, files: dict[str, bytes]) -> None:
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)


def packed(files: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    pack(stream, files)
    return stream.getvalue()


@dataclass(frozen=True)
class Accepted:
    """A source below an empty folder, and the colours and captions that training must see."""

    name: str
    arrange: Callable[[Path], str | Path | None]
    """Writes the source; returns its name, if it is not the folder ``pictures``."""
    sees: Sequence[tuple[str, str]]
    data: dict[str, str] = field(default_factory=dict)
    says: str = ""


X = {"prompt": "x"}
RED = [("red", "x")]
BOTH = [("red", "x"), ("blue", "x")]


def named(name: str) -> Accepted:
    """A picture in a folder of a name, which is its own too."""

    def arrange(root: Path) -> Path:
        put(root / name, **{name: "red"})
        return root / name

    return Accepted(f"names like {name!r}", arrange, RED, X)


def in_folders(root: Path) -> None:
    put(root / SOURCE / "img" / "10_sks dog", b="red")
    put(root / SOURCE / "img" / "5_cat", a="blue")
    (root / SOURCE / "img" / "10_sks dog" / "b.txt").write_text("a dog")
    (root / SOURCE / "img" / "5_cat" / "a.txt").write_text("a cat")


def beside_folders(root: Path) -> None:
    put(root / SOURCE, z="red")
    put(root / SOURCE / "more", a="blue")


def hub_cache(root: Path) -> Path:
    """As the cache of the hub is: names without endings, and links to them."""
    blobs, snapshot = root / "blobs", root / "snapshots" / "abc"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for name, content in (("a.png", png("red")), ("a.txt", b"a dog")):
        (blobs / name.replace(".", "")).write_bytes(content)
        (snapshot / name).symlink_to(Path("../../blobs") / name.replace(".", ""))
    return snapshot


def hub_cache_with_list(root: Path) -> Path:
    blobs, snapshot = root / "blobs", root / "snapshots" / "abc"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    line = json.dumps({"file_name": "a.png", "text": "a dog"}).encode()
    for name, content in (("a.png", png("red")), ("metadata.jsonl", line)):
        (blobs / name.replace(".", "")).write_bytes(content)
        (snapshot / name).symlink_to(Path("../../blobs") / name.replace(".", ""))
    return snapshot


def linked_folder(root: Path) -> None:
    put(root / "elsewhere", a="red")
    (root / SOURCE).mkdir()
    (root / SOURCE / "in").symlink_to(root / "elsewhere")


def looped(root: Path) -> None:
    put(root / SOURCE / "in", a="red")
    (root / SOURCE / "in" / "again").symlink_to(root / SOURCE)


def zipped(files: dict[str, bytes], name: str = "pictures.zip") -> Callable[[Path], Path]:
    def arrange(root: Path) -> Path:
        pack(root / name, files)
        return root / name

    return arrange


def zip_in_folder(root: Path) -> None:
    put(root / SOURCE, a="red")
    pack(root / SOURCE / "more.zip", {"in/b.png": png("blue"), "in/b.txt": b"no"})


def splits(root: Path) -> None:
    put(root / SOURCE / "train", a="red")
    put(root / SOURCE / "test", a="blue")


def several(root: Path) -> None:
    put(root / SOURCE, a="red", b="lime", c="blue")


def at_home(root: Path) -> str:
    put(root / "home" / "my dog", a="red")
    return "~/my dog"


def relative(root: Path) -> str:
    put(root / "here" / "dog", a="red")
    return "dog"


def litter(root: Path) -> None:
    put(root / SOURCE, a="red")
    put(root / SOURCE / ".thumbnails", a="blue")
    for name in (".DS_Store", "._a.png", "Thumbs.db", "desktop.ini"):
        (root / SOURCE / name).write_bytes(b"litter")


def others(root: Path) -> None:
    put(root / SOURCE, a="red")
    for name in ("a.mov", "a.svg", "a", "a.eps"):
        (root / SOURCE / name).write_bytes(b"other")


TABLE = {"image": [png("red"), png("blue")], "text": ["a dog", "a cat"]}
ROWS = [("red", "a dog"), ("blue", "a cat")]


def parquet_with_extras(root: Path) -> None:
    datasets.Dataset.from_dict(TABLE).to_parquet(root / SOURCE / "data" / "train.parquet")
    put(root / SOURCE / "assets", logo="lime")
    (root / SOURCE / "README.md").write_text("# Dogs")


def json_with_paths(root: Path) -> None:
    put(root / SOURCE / "in", a="red")
    row = {"image": "in/a.png", "text": "a dog"}
    (root / SOURCE / "train.jsonl").write_text(json.dumps(row) + "\n")


def saved(root: Path) -> None:
    datasets.Dataset.from_dict(TABLE).save_to_disk(root / SOURCE)


def webdataset(root: Path) -> None:
    (root / SOURCE).mkdir()
    with tarfile.open(root / SOURCE / "train.tar", "w") as archive:
        for name, content in (("0.png", png("red")), ("0.txt", b"a dog")):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


ACCEPTED = [
    *map(
        named,
        (
            "a [x]",
            "a*b?",
            "$HOME",
            "~",
            "a::b",
            "zip:a",
            "-rf",
            "%20",
            "ä 犬",
            "a\nb",
            "a'\"b",
            "train",
            "{x}",
            "a.b.",
            " a ",
        ),
    ),
    Accepted("folders in a folder", in_folders, [("red", "a dog"), ("blue", "a cat")]),
    Accepted("folders beside pictures", beside_folders, BOTH, X),
    Accepted("a cache of the hub", hub_cache, [("red", "a dog")]),
    Accepted("a cache of the hub with a list", hub_cache_with_list, [("red", "a dog")]),
    Accepted("a link to a folder", linked_folder, RED, X),
    Accepted("links that lead back", looped, RED, X),
    Accepted(
        "a zip",
        zipped({"b.png": png("blue"), "a.png": png("red"), "a.txt": b"a dog", "b.txt": b"a cat"}),
        ROWS,
    ),
    Accepted(
        "a zip of a folder",
        zipped(
            {
                "dog/": b"",
                "dog/a.png": png("red"),
                "__MACOSX/dog/._a.png": b"",
                "dog/.DS_Store": b"",
            },
            "DOG.ZIP",
        ),
        RED,
        X,
    ),
    Accepted(
        "a zip with a list",
        zipped(
            {
                "d/metadata.jsonl": b'{"file_name": "in/a.png", "text": "a dog"}',
                "d/in/a.png": png("red"),
            }
        ),
        [("red", "a dog")],
    ),
    Accepted("a zip in a zip", zipped({"in.zip": packed({"a.png": png("red")})}), RED, X),
    Accepted(
        "a zip whose names lead out",
        zipped({"../../b.png": png("blue"), "/c.png": png("lime"), "a.png": png("red")}),
        RED,
        X,
    ),
    Accepted(
        "a zip beside pictures", zip_in_folder, BOTH, X, "Not read, as data.prompt is the caption"
    ),
    Accepted(
        "folders of splits", splits, RED, X, "Left out, as data.split is 'train': the folders test"
    ),
    Accepted("another split", splits, [("blue", "x")], X | {"split": "test"}, "the folders train"),
    Accepted("both splits", splits, BOTH, X | {"split": "train+test"}),
    Accepted("a part", several, [("lime", "x"), ("blue", "x")], X | {"split": "train[1:]"}),
    Accepted("a share", several, RED, X | {"split": "train[:34%]"}),
    Accepted("a folder at home", at_home, RED, X),
    Accepted("a folder here", relative, RED, X),
    Accepted("litter of systems", litter, RED, X),
    Accepted("other files", others, RED, X, "Left out, as no pictures are of this kind:"),
    Accepted(
        "a revision",
        several,
        [(name, "x") for name in COLOURS],
        X | {"revision": "v2"},
        "Without effect on a folder of pictures: data.revision",
    ),
    Accepted("Parquet beside other pictures", parquet_with_extras, ROWS),
    Accepted("JSON with paths", json_with_paths, [("red", "a dog")]),
    Accepted("a saved dataset", saved, ROWS),
    Accepted(
        "a tar", webdataset, [("red", "a dog")], {"image_column": "png", "caption_column": "txt"}
    ),
]


@pytest.mark.parametrize("case", ACCEPTED, ids=[case.name for case in ACCEPTED])
def test_training_sees_what_the_source_holds(
    case: Accepted,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    root = tmp_path / "root"
    (root / "here").mkdir(parents=True)
    monkeypatch.chdir(root / "here")
    monkeypatch.setenv("HOME", str(root / "home"))
    quiet_libraries()
    source = case.arrange(root) or root / SOURCE
    capsys.readouterr()
    data = Data(source=str(source), **case.data)
    pictures = load_pictures(data, tmp_path / "cache", 8)
    assert [(NAMES[tuple(p.pixels[0, 0].tolist())], p.caption) for p in pictures] == case.sees
    said = capsys.readouterr().err
    assert case.says in said
    assert said.count("\n") == bool(case.says)


def test_a_changed_dataset_is_read_again_though_no_time_shows_it(tmp_path: Path) -> None:
    file = tmp_path / SOURCE / "train.parquet"
    for caption in ("a dog", "a cat"):
        rows = {"image": [png("red")], "text": [caption]}
        datasets.Dataset.from_dict(rows).to_parquet(file)
        os.utime(file, (1_000_000_000, 1_000_000_000))
        (picture,) = load_pictures(Data(source=str(file.parent)), tmp_path / "cache", 8)
        assert picture.caption == caption


@pytest.mark.parametrize("kind", ["folder", "zip", "home"])
def test_class_pictures_come_from_any_folder(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    put(tmp_path / "class" / "in", a="red")
    pack(tmp_path / "class.zip", {"a.png": png("red")})
    folder = {
        "folder": str(tmp_path / "class"),
        "zip": str(tmp_path / "class.zip"),
        "home": "~/class",
    }
    prior = PicturePrior(prompts=("a cat",), folder=folder[kind])
    pictures = load_own(prior, tmp_path / "cache", [8])
    assert pictures is not None
    assert [picture.caption for picture in pictures] == ["a cat"]


def source(
    arrange: Callable[[Path], object], *overrides: str, name: str = SOURCE, prompt: str = "x"
) -> Callable[[Path], list[str]]:
    def write(folder: Path) -> list[str]:
        arrange(folder)
        return training(folder, f"data={{source: '{folder / name}', prompt: {prompt}}}", *overrides)

    return write


def nothing(root: Path) -> None:
    pass


def empty(root: Path) -> None:
    (root / SOURCE).mkdir()


def deep(root: Path) -> None:
    put(root / SOURCE / "/".join("x" * 20), a="red")


def encrypted(root: Path) -> None:
    pack(root / "a.zip", {"a.png": png("red")})
    content = bytearray((root / "a.zip").read_bytes())
    for signature, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        content[content.index(signature) + offset] |= 1
    (root / "a.zip").write_bytes(content)


def nested(root: Path) -> None:
    content = packed({"a.png": png("red")})
    for _ in range(20):
        content = packed({"in.zip": content})
    (root / "a.zip").write_bytes(content)


def damaged(root: Path) -> None:
    with zipfile.ZipFile(root / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.png", png("red"))
    content = bytearray((root / "a.zip").read_bytes())
    content[60] ^= 255
    (root / "a.zip").write_bytes(content)


def lone(name: str, content: bytes) -> Callable[[Path], None]:
    def arrange(root: Path) -> None:
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)

    return arrange


def broken_saved(name: str, content: bytes) -> Callable[[Path], None]:
    def arrange(root: Path) -> None:
        saved(root)
        (root / SOURCE / name).write_bytes(content)

    return arrange


def front_matter(root: Path) -> None:
    datasets.Dataset.from_dict(TABLE).to_parquet(root / SOURCE / "train.parquet")
    (root / SOURCE / "README.md").write_text("---\nconfigs: [unclosed\n---\n")


def in_brackets(root: Path) -> None:
    datasets.Dataset.from_dict(TABLE).to_parquet(root / "a [x]" / "train.parquet")


def classes(
    folder: str, arrange: Callable[[Path], object] = nothing
) -> Callable[[Path], list[str]]:
    def write(root: Path) -> list[str]:
        put(root / SOURCE, a="red")
        arrange(root)
        prior = {"prompts": ["a cat"], "folder": folder.replace("ROOT", str(root))}
        return training(root, "data.prompt=a dog", prior=prior)

    return write


GIVE = "give a folder with pictures in it"
REFUSED = [
    Refused("nothing there", source(nothing), [f"/{SOURCE}'", "there is no such folder", GIVE]),
    Refused("no zip there", source(nothing, name="a.zip"), ["a.zip'", "no such folder", "a zip"]),
    Refused(
        "an empty folder",
        source(empty),
        [f"/{SOURCE}' has no pictures", "found nothing", "put some there"],
    ),
    Refused(
        "texts alone", source(lone(f"{SOURCE}/a.txt", b"a dog")), ["has no pictures", "found a.txt"]
    ),
    Refused(
        "a picture",
        source(lone("a.png", png("red")), name="a.png"),
        ["a.png'", "must be a folder (found a file)"],
    ),
    Refused(
        "a table",
        source(lone("a.csv", b"a,b"), name="a.csv"),
        ["a.csv'", "must be a folder (found a file)"],
    ),
    Refused(
        "a pipe", source(lambda root: os.mkfifo(root / SOURCE)), ["must be a folder (found a pipe)"]
    ),
    Refused(
        "a device",
        source(lambda root: (root / SOURCE).symlink_to("/dev/zero")),
        ["must be a folder (found a device)"],
    ),
    Refused(
        "a link to nothing",
        source(lambda root: (root / SOURCE).symlink_to("no")),
        ["found a soft link to nothing"],
    ),
    Refused(
        "a link to itself",
        source(lambda root: (root / SOURCE).symlink_to(SOURCE)),
        ["must be a folder", "symbolic links"],
    ),
    Refused(
        "no such split", source(several, "data.split=test"), ["has no split 'test'", "it has train"]
    ),
    Refused(
        "no such split among folders",
        source(splits, "data.split=train+dev"),
        ["no split 'train+dev'", "it has train"],
    ),
    Refused("no part", source(several, "data.split=train[9:]"), ["has no pictures"]),
    Refused(
        "no split at all",
        source(several, "data.split=train[x"),
        ["has no split 'train[x'", "train[:10]"],
    ),
    Refused(
        "folders without end", source(deep), ["is the 16th folder in one another", "move it up"]
    ),
    Refused(
        "no zip by content",
        source(lone("a.zip", b"PK and more"), name="a.zip"),
        ["a.zip is not a whole zip", "pack it again"],
    ),
    Refused(
        "an empty file for a zip",
        source(lone("a.zip", b""), name="a.zip"),
        ["a.zip is not a whole zip"],
    ),
    Refused(
        "an empty zip",
        source(zipped({}, "a.zip"), name="a.zip"),
        ["a.zip' has no pictures", "found nothing"],
    ),
    Refused(
        "a zip of texts",
        source(zipped({"a.txt": b""}, "a.zip"), name="a.zip"),
        ["a.zip' has no pictures", "found a.txt"],
    ),
    Refused(
        "a locked zip",
        source(encrypted, name="a.zip"),
        ["a.zip/a.png cannot be unpacked", "password"],
    ),
    Refused(
        "a damaged zip",
        source(damaged, name="a.zip"),
        ["a.zip/a.png cannot be unpacked", "pack the zip again"],
    ),
    Refused(
        "zips without end", source(nested, name="a.zip"), ["is the 16th folder in one another"]
    ),
    Refused(
        "a damaged picture in a zip",
        source(zipped({"a.png": b"no"}, "a.zip"), name="a.zip"),
        ["a.zip/a.png cannot be read", "unknown format"],
    ),
    Refused(
        "a broken zip in a folder",
        source(lone(f"{SOURCE}/a.zip", b"no")),
        ["a.zip is not a whole zip"],
    ),
    Refused(
        "broken Parquet",
        source(lone(f"{SOURCE}/train.parquet", b"PAR1no")),
        ["data.source", "cannot be loaded", "correct its files"],
    ),
    Refused("empty Parquet", source(lone(f"{SOURCE}/train.parquet", b"")), ["cannot be loaded"]),
    Refused("a broken tar", source(lone(f"{SOURCE}/train.tar", b"no" * 600)), ["cannot be loaded"]),
    Refused(
        "an empty tar", source(lone(f"{SOURCE}/train.tar", bytes(10240))), ["cannot be loaded"]
    ),
    Refused("broken JSON", source(lone(f"{SOURCE}/train.json", b'{"a": ')), ["cannot be loaded"]),
    Refused("empty JSON", source(lone(f"{SOURCE}/train.json", b"")), ["cannot be loaded"]),
    Refused(
        "JSON of another form", source(lone(f"{SOURCE}/train.json", b"5")), ["cannot be loaded"]
    ),
    Refused(
        "a broken CSV",
        source(lone(f"{SOURCE}/train.csv", b'a,b\n1,2,3,4\n"')),
        ["cannot be loaded"],
    ),
    Refused("a list for a state", source(broken_saved("state.json", b"[1]")), ["cannot be loaded"]),
    Refused("no state", source(broken_saved("state.json", b"")), ["cannot be loaded"]),
    Refused(
        "no information", source(broken_saved("dataset_info.json", b"[")), ["cannot be loaded"]
    ),
    Refused("a broken card", source(front_matter), ["cannot be loaded"]),
    Refused(
        "a dataset in brackets",
        source(in_brackets, name="a [x]"),
        ["must have none of", "rename it"],
    ),
    Refused(
        "no such configuration",
        source(parquet_with_extras, "data.config=large"),
        ["cannot be loaded", "large"],
    ),
    Refused(
        "no column of pictures",
        source(parquet_with_extras, "data.image_column=photo"),
        ["no column 'photo'", "it has image, text", "data.image_column"],
    ),
    Refused(
        "pictures that are texts",
        source(parquet_with_extras, "data.image_column=text"),
        ["a dog", "found nothing"],
    ),
    Refused(
        "a dataset of no such split",
        source(parquet_with_extras, "data.split=test"),
        ["cannot be loaded", "test"],
    ),
    Refused(
        "a path in a table to nothing",
        source(lambda root: (json_with_paths(root), (root / SOURCE / "in" / "a.png").unlink())),
        ["in/a.png", "found nothing", "row 0 names it"],
    ),
    Refused(
        "no dataset on the hub",
        lambda root: training(root, "data.source=nobody/nothing"),
        ["'nobody/nothing'", "cannot be loaded", "hub"],
    ),
    Refused(
        "no folder of class pictures",
        classes("ROOT/no"),
        ["prior.folder", "neither a folder nor a zip"],
    ),
    Refused(
        "an empty folder of class pictures",
        classes("ROOT/class", lambda root: (root / "class").mkdir()),
        ["prior.folder", "class' has no pictures"],
    ),
    Refused(
        "a damaged class picture",
        classes("ROOT/class", lone("class/a.png", b"no")),
        ["class/a.png cannot be read"],
    ),
    Refused(
        "class pictures of which one has no caption",
        classes(
            "ROOT/class",
            lambda root: (
                put(root / "class", a="red", b="red"),
                (root / "class/a.txt").write_text("a cat"),
            ),
        ),
        ["class/b.png has no caption", "prior.prompts are then used"],
    ),
    Refused(
        "a class caption that is emptied",
        classes(
            "ROOT/class",
            lambda root: (put(root / "class", a="red"), (root / "class/a.txt").write_text("<x>")),
        ),
        ["leaves no word of a caption of prior.folder"],
    ),
    Refused(
        "a broken list of class pictures",
        classes("ROOT/class", lone("class/metadata.jsonl", b"{")),
        ["class/metadata.jsonl, line 1"],
    ),
]


@pytest.mark.parametrize("case", REFUSED, ids=[case.name for case in REFUSED])
def test_a_source_that_cannot_be_read_is_named(
    case: Refused, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "given"
    folder.mkdir()
    check_refused(case, read_material, folder, capsys)
