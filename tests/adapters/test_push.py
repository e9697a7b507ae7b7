"""What is exported reaches the hub whole and comes back from it; mistakes send nothing."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard, close_session, constants
from PIL import Image
from torch import Tensor

from adapters import (
    Cascade,
    Parts,
    card,
    combine,
    diff,
    generate,
    inspect,
    load_cascade,
    repair,
    resize,
)
from adapters.cascade.provenance import read_picture_info
from adapters.errors import UserError
from adapters.files.info import NOTICE, read_info
from adapters.files.model_card import write_card
from adapters.files.places import adapter_path
from adapters.files.upload import push
from adapters.push import main
from adapters.weights.kinds import AdapterSpec
from tests.builders import ROOT
from tests.builders.adapters import base_of, export, trained_unet
from tests.builders.commands import refusal
from tests.builders.hub_stand_in import HubStandIn, Repository, hub_stand_in
from tests.builders.random_cascade import RandomCascade

REPO = "owner/sks-cat"
BASES = {1: "DeepFloyd/IF-I-XL-v1.0", 2: "DeepFloyd/IF-II-L-v1.0"}
LICENCE = b"DeepFloyd IF LICENSE AGREEMENT"
STAGE_FILES = {
    "adapter_config.json",
    "adapter_model.safetensors",
    "pytorch_lora_weights.safetensors",
}


@contextmanager
def hub_and_owner(home: Path) -> Iterator[HubStandIn]:
    """A hub with DeepFloyd's licences; here an empty cache, and its owner is logged in."""
    with pytest.MonkeyPatch.context() as monkeypatch, hub_stand_in() as hub:
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
        monkeypatch.setenv("HF_TOKEN", "hf_owner")
        for name in BASES.values():
            hub.repositories[name] = Repository()
            hub.repositories[name].commit("main", {"LICENSE.md": LICENCE}, "licence")
        yield hub


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[HubStandIn]:
    with hub_and_owner(tmp_path) as hub:
        yield hub


@pytest.fixture(scope="module")
def exports(
    random_cascade: RandomCascade, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Adapters of DeepFloyd's models, as far as names and licences go, by kind."""
    home = tmp_path_factory.mktemp("exports")
    samples = {"a sks cat": Image.new("RGB", (8, 8), "red"), "a [dog]": Image.new("RGB", (8, 8))}
    with hub_and_owner(home):
        for kind, stages in {"lora": (1, 2), "dora": (1, 2), "lokr": (2,)}.items():
            spec = AdapterSpec(kind=kind, rank=2)
            for stage in stages:
                unet = trained_unet(base_of(random_cascade, stage), spec)
                export(unet, home / kind, BASES[stage], stage, spec)
            infos = [read_info(home / kind / f"stage_{stage}") for stage in stages]
            write_card(home / kind, infos, samples)
    return {kind: home / kind for kind in ("lora", "dora", "lokr")}


@pytest.fixture
def folder(exports: dict[str, Path], tmp_path: Path) -> Path:
    """An export of both stages, to be spoilt."""
    return Path(shutil.copytree(exports["lora"], tmp_path / "adapters"))


def weights(cascade: Cascade) -> dict[str, Tensor]:
    return {
        f"{number}.{name}": tensor
        for number, pipe in cascade.stages.items()
        for name, tensor in pipe.unet.state_dict().items()
    }


def same_weights(cascade: RandomCascade, one: str | Path, other: str | Path) -> bool:
    a, b = (
        weights(
            load_cascade(
                cascade.stage_1, cascade.stage_2, adapters=[name], parts=Parts(text_encoder=False)
            )
        )
        for name in (one, other)
    )
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def content(folder: Path, *left_out: str) -> dict[str, bytes]:
    files = {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }
    return {name: data for name, data in files.items() if name not in left_out}


def downloaded(hub_cache: str) -> set[str]:
    snapshots = Path(hub_cache).glob("models--owner--*/snapshots/*")
    return {path.relative_to(s).as_posix() for s in snapshots for path in s.rglob("*.*")}


def test_what_is_pushed_comes_back_bit_for_bit(
    random_cascade: RandomCascade, hub: HubStandIn, folder: Path
) -> None:
    assert push(folder, REPO) == f"https://huggingface.co/{REPO}"
    assert same_weights(random_cascade, folder, REPO)
    assert not same_weights(random_cascade, folder / "stage_1", REPO)
    assert downloaded(constants.HF_HUB_CACHE) == {
        f"stage_{stage}/{name}"
        for stage in (1, 2)
        for name in ("adapter_model.safetensors", "adapter_config.json")
    }


def test_the_export_is_pushed_and_nothing_else(hub: HubStandIn, folder: Path) -> None:
    expected = content(folder)
    assert expected.keys() == {
        *(f"stage_{stage}/{name}" for stage in (1, 2) for name in STAGE_FILES),
        *("README.md", "stage_1-LICENSE.md", "stage_2-LICENSE.md"),
        *("samples/00.png", "samples/01.png"),
    }
    strays = (
        *("notes.txt", ".DS_Store", ".export-abc/new/adapter_model.safetensors", ".tmp.md"),
        *("stage_1/optimizer.bin", "stage_1/.tmp.safetensors", "stage_3/x.safetensors"),
        *("samples/99.png", "samples/.00.png", "checkpoints/1/state.safetensors"),
    )
    for name in strays:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"stray")
    push(folder, REPO)
    repository = hub.repositories[REPO]
    pushed = repository.files()
    del pushed[".gitattributes"]
    assert pushed == expected
    assert repository.messages == ["initial commit", "Upload Stage 1 and Stage 2 adapter"]
    assert not repository.private


def test_every_revision_loads_by_its_name(
    random_cascade: RandomCascade, hub: HubStandIn, exports: dict[str, Path]
) -> None:
    push(exports["lora"], REPO)
    first = hub.repositories[REPO].branches["main"]
    push(exports["dora"], REPO, message="better")
    assert hub.repositories[REPO].messages[-1] == "better"
    address = push(exports["lokr"], REPO, revision="try/lokr")
    assert address == f"https://huggingface.co/{REPO}/tree/try/lokr"
    assert same_weights(random_cascade, exports["dora"], REPO)
    assert same_weights(random_cascade, exports["lokr"], f"{REPO}@try/lokr")
    assert same_weights(random_cascade, exports["lora"], f"{REPO}@{first}")


def test_a_new_export_replaces_the_old_one_whole(hub: HubStandIn, exports: dict[str, Path]) -> None:
    push(exports["lora"], REPO)
    repository = hub.repositories[REPO]
    repository.commit("main", repository.files() | {"poster.png": b"mine"}, "by hand")
    push(exports["lokr"], REPO)
    files = repository.files()
    assert files.pop("poster.png") == b"mine"
    assert files.pop(".gitattributes")
    assert files == content(exports["lokr"])


def test_large_files_go_by_lfs(
    random_cascade: RandomCascade,
    hub: HubStandIn,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    hub.lfs_from = 10_000
    push(folder, REPO)
    assert len(hub.blobs) == 4
    assert same_weights(random_cascade, folder, REPO)


@pytest.mark.parametrize("xet", [True, False])
def test_a_pull_request_leaves_main_alone(
    random_cascade: RandomCascade,
    hub: HubStandIn,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    xet: bool,
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", not xet)
    theirs = "guest/sks-cat"
    hub.repositories[theirs] = Repository()
    hub.repositories[theirs].commit("main", {}, "initial commit")
    url = push(folder, theirs, pull_request=True)
    assert url == f"https://huggingface.co/{theirs}/discussions/1"
    assert hub.repositories[theirs].files() == {}
    assert same_weights(random_cascade, folder, f"{theirs}@refs/pr/1")


def test_a_private_repository_is_private_or_refused(hub: HubStandIn, folder: Path) -> None:
    push(folder, REPO, private=True)
    assert hub.repositories[REPO].private
    push(folder, "owner/other")
    files = hub.repositories["owner/other"].files()
    (folder / "README.md").write_text((folder / "README.md").read_text() + "secret")
    with pytest.raises(UserError, match="owner/other exists and is public"):
        push(folder, "owner/other", private=True)
    assert hub.repositories["owner/other"].files() == files


def truncated(folder: Path) -> None:
    path = folder / "stage_2" / "pytorch_lora_weights.safetensors"
    path.write_bytes(path.read_bytes()[:-8])


def swapped_stages(folder: Path) -> None:
    for one, other in (("stage_1", "x"), ("stage_2", "stage_1"), ("x", "stage_2")):
        (folder / one).rename(folder / other)


def no_export(folder: Path) -> None:
    shutil.rmtree(folder / "stage_1")
    (folder / "stage_2" / "adapter_model.safetensors").unlink()
    shutil.rmtree(folder / "stage_2")


def other_card(folder: Path) -> None:
    card = folder / "README.md"
    card.write_text(card.read_text().replace("DeepFloyd/IF-II-L", "DeepFloyd/IF-II-M"))


def without(name: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / name).unlink()

    damage.__name__ = name
    return damage


def no_notice(folder: Path) -> None:
    card = folder / "README.md"
    card.write_text(card.read_text().replace(NOTICE, ""))


def no_metadata(folder: Path) -> None:
    (folder / "README.md").write_text("---\n[a: b\n---\n")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (no_export, "has no exported adapter"),
        (truncated, r"stage_2/pytorch_lora_weights.safetensors cannot be read"),
        (without("stage_1/adapter_config.json"), r"adapter_config.json is missing"),
        (without("stage_1/pytorch_lora_weights.safetensors"), "is missing; export the adapter"),
        (swapped_stages, "has that of Stage 2"),
        (without("README.md"), r"is not a model card .*python -m adapters.card"),
        (no_metadata, r"is not a model card .*python -m adapters.card"),
        (other_card, "describes other adapters"),
        (no_notice, "lacks the notice that the base's licence requires"),
        (without("samples/01.png"), "shows pictures that are missing"),
        (without("stage_2-LICENSE.md"), "lacks stage_2-LICENSE.md, the copy of its base's licence"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_a_folder_that_is_not_fit_is_refused_unasked(
    hub: HubStandIn, folder: Path, damage: Callable[[Path], None], said: str
) -> None:
    damage(folder)
    with pytest.raises(UserError, match=said):
        push(folder, REPO)
    assert hub.asked == []


def test_an_adapter_of_a_base_of_ones_own_needs_no_licence_but_a_card(
    random_cascade: RandomCascade, hub: HubStandIn, tmp_path: Path
) -> None:
    base, spec, folder = random_cascade.stage_2, AdapterSpec(rank=1), tmp_path / "adapters"
    info = read_info(export(trained_unet(base, spec), folder, base, 2, spec).folder)
    readme = write_card(folder, [info])
    push(folder, REPO)
    assert same_weights(random_cascade, folder, REPO)
    readme.write_text("# Without metadata")
    with pytest.raises(UserError, match="has no metadata"):
        push(folder, REPO)


def test_a_single_stage_is_no_export(hub: HubStandIn, folder: Path) -> None:
    with pytest.raises(UserError, match="stage_1 is a single adapter"):
        push(folder / "stage_1", REPO)
    assert hub.asked == []


def logged_out(hub: HubStandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")


def wrong_token(hub: HubStandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_expired")


def guest(hub: HubStandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_guest")


def guest_of_existing(hub: HubStandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.repositories[REPO] = Repository()
    hub.repositories[REPO].commit("main", {}, "initial commit")
    guest(hub, monkeypatch)


def offline(hub: HubStandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def unreachable(hub: HubStandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.shutdown()
    hub.server_close()
    close_session()  # its connections were kept alive


def small_commits(hub: HubStandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.largest = 10_000


def small_files(hub: HubStandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    hub.lfs_from = hub.largest = 10_000


Circumstance = Callable[[HubStandIn, pytest.MonkeyPatch], None]


@pytest.mark.parametrize(
    ("circumstance", "said"),
    [
        (logged_out, "not logged in"),
        (wrong_token, "does not accept your token"),
        (guest, "lacks permission for owner/sks-cat"),
        (guest_of_existing, "lacks permission for owner/sks-cat"),
        (offline, "cannot be asked for owner/sks-cat in offline mode"),
        (unreachable, "https://huggingface.co cannot be reached"),
        (small_commits, "refuses a file of owner/sks-cat as too large"),
        (small_files, "file too large"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_what_the_hub_refuses_is_one_sentence(
    hub: HubStandIn,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    circumstance: Circumstance,
    said: str,
) -> None:
    circumstance(hub, monkeypatch)
    assert said in refusal(capsys, main, folder, REPO)
    repository = hub.repositories.get(REPO)
    assert repository is None or len(repository.commits) == 1


@pytest.mark.parametrize("name", ["sks-cat", "owner/sks/cat", "owner/sks cat", "owner/sks--cat"])
def test_a_name_that_cannot_be_is_refused(hub: HubStandIn, folder: Path, name: str) -> None:
    with pytest.raises(UserError, match=f"{name} is not a hub name; write owner/name"):
        push(folder, name)
    assert hub.changes() == []


def test_a_refused_export_leaves_the_last_one_as_it_was(
    hub: HubStandIn, exports: dict[str, Path]
) -> None:
    push(exports["lora"], REPO)
    commit = hub.repositories[REPO].branches["main"]
    hub.largest = 10_000
    with pytest.raises(UserError, match="too large"):
        push(exports["dora"], REPO)
    assert hub.repositories[REPO].branches["main"] == commit


def gated(hub: HubStandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.repositories[REPO].gated = True
    guest(hub, monkeypatch)


def private(hub: HubStandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.repositories[REPO].private = True
    guest(hub, monkeypatch)


def as_it_is(hub: HubStandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    pass


@pytest.mark.parametrize(
    ("name", "circumstance", "said"),
    [
        ("owner/nothing", as_it_is, "owner/nothing is neither a local path nor"),
        (f"{REPO}@v9", as_it_is, f"has {REPO}, but not the revision that {REPO}@v9 names"),
        (REPO, gated, f"{REPO} is gated; accept its terms at https://huggingface.co/{REPO}"),
        (REPO, private, f"{REPO} is neither a local path nor"),
        (REPO, wrong_token, "does not accept your token"),
        (REPO, offline, f"{REPO} is neither a local path nor in the cache"),
        (REPO, unreachable, f"{REPO} is neither a local path nor in the cache"),
        (BASES[1], as_it_is, "has no adapter on the hub"),
        (f"{REPO}/stage_1/nothing.safetensors", as_it_is, "it has stage_1/adapter_model.safe"),
        ("runs/mine/adapters", as_it_is, "runs/mine/adapters has no exported adapter"),
        ("owner/sks--cat", as_it_is, "owner/sks--cat is not a hub name"),
    ],
)
def test_what_cannot_be_loaded_from_the_hub_is_said(
    random_cascade: RandomCascade,
    hub: HubStandIn,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    circumstance: Circumstance,
    said: str,
) -> None:
    push(folder, REPO)
    circumstance(hub, monkeypatch)
    cascade = load_cascade(random_cascade.stage_1, parts=Parts(text_encoder=False))
    before = {name: tensor.clone() for name, tensor in weights(cascade).items()}
    with pytest.raises(UserError) as caught:
        cascade.add_adapter(name)
    assert said in str(caught.value)
    assert all(torch.equal(before[name], tensor) for name, tensor in weights(cascade).items())


@pytest.mark.parametrize("circumstance", [offline, unreachable])
def test_a_model_on_a_hub_that_cannot_be_asked_is_said_at_once(
    hub: HubStandIn, monkeypatch: pytest.MonkeyPatch, circumstance: Circumstance
) -> None:
    circumstance(hub, monkeypatch)
    monkeypatch.setattr(time, "sleep", lambda _: pytest.fail("waits to try again"))
    with pytest.raises(UserError, match="owner/model is neither a local path nor in the cache"):
        load_cascade("owner/model")


@pytest.mark.parametrize("circumstance", [offline, unreachable])
def test_what_was_loaded_once_loads_without_a_connection(
    random_cascade: RandomCascade,
    hub: HubStandIn,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    circumstance: Circumstance,
) -> None:
    push(folder, REPO)
    adapter_path(REPO)
    circumstance(hub, monkeypatch)
    assert same_weights(random_cascade, folder, REPO)


def test_a_local_folder_comes_first(
    hub: HubStandIn, folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    push(folder, REPO)
    hub.asked.clear()
    monkeypatch.chdir(tmp_path)
    shutil.copytree(folder, REPO)
    assert adapter_path(REPO) == Path(REPO)
    assert hub.asked == []
    assert adapter_path(f"{REPO}@main").is_relative_to(constants.HF_HUB_CACHE)


def test_one_stage_or_one_file_is_downloaded_alone(
    random_cascade: RandomCascade, hub: HubStandIn, folder: Path
) -> None:
    push(folder, REPO, revision="v1")
    stage = adapter_path(f"{REPO}/stage_2@v1")
    assert content(stage) == content(folder / "stage_2", "pytorch_lora_weights.safetensors")
    assert downloaded(constants.HF_HUB_CACHE) == {
        "stage_2/adapter_config.json",
        "stage_2/adapter_model.safetensors",
    }
    file = adapter_path(f"{REPO}/stage_1/pytorch_lora_weights.safetensors@v1")
    assert file.read_bytes() == (folder / "stage_1" / file.name).read_bytes()
    assert same_weights(random_cascade, folder / "stage_1", file)


def test_an_adapter_of_diffusers_loads_from_the_hub_and_nothing_pickled_comes(
    random_cascade: RandomCascade, hub: HubStandIn, folder: Path, tmp_path: Path
) -> None:
    file = folder / "stage_1" / "pytorch_lora_weights.safetensors"
    hub.repositories[REPO] = Repository()
    hub.repositories[REPO].commit(
        "main",
        {
            file.name: file.read_bytes(),
            "pytorch_lora_weights.bin": b"pickled",
            "model.safetensors": b"large",
            "handler.py": b"code",
        },
        "by diffusers",
    )
    assert same_weights(random_cascade, folder / "stage_1", REPO)
    assert downloaded(constants.HF_HUB_CACHE) == {file.name}
    with pytest.raises(SystemExit):
        repair.main([REPO])
    repair.main([REPO, "--out", str(tmp_path / "whole.safetensors")])
    assert same_weights(random_cascade, folder / "stage_1", tmp_path / "whole.safetensors")


def test_generate_takes_hub_names(
    random_cascade: RandomCascade, hub: HubStandIn, folder: Path, tmp_path: Path
) -> None:
    push(folder, REPO, revision="v1")
    pictures = {}
    for name in (str(folder), f"{REPO}@v1"):
        out = tmp_path / str(len(pictures))
        arguments = f"--stage-1 {random_cascade.stage_1} --stage-2 {random_cascade.stage_2}"
        steps = "--stage-1-steps 2 --stage-2-steps 2 --prompt cat"
        generate.main([*arguments.split(), *steps.split(), "--adapter", name, "--out", str(out)])
        files = sorted(out.iterdir())
        pictures[name] = [Image.open(file).tobytes() for file in files]
        (used,) = read_picture_info(files[0]).adapters.values()
        assert used.source == name
    assert pictures[str(folder)] == pictures[f"{REPO}@v1"]


def test_the_command_pushes_to_the_endpoint_of_its_environment(
    hub: HubStandIn, folder: Path, tmp_path: Path
) -> None:
    own = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": "hf_owner"}
    environment = {name: text for name, text in os.environ.items() if "proxy" not in name.lower()}
    command = [sys.executable, "-m", "adapters.push", str(folder), REPO, "--revision", "v1"]
    done = subprocess.run(
        command, cwd=ROOT, env=environment | own, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{hub.url}/{REPO}/tree/v1\n"
    pushed = hub.repositories[REPO].files("v1")
    assert content(folder) == {name: pushed[name] for name in pushed if name != ".gitattributes"}


def test_the_command_shows_its_progress(
    hub: HubStandIn,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    main([str(folder), REPO])
    assert "Committing" in capsys.readouterr().err


def test_the_card_is_one_that_the_hub_understands(hub: HubStandIn, folder: Path) -> None:
    read = ModelCard.load(folder / "README.md")
    assert read.data.to_dict() == {
        "license": "deepfloyd-if-license",
        "base_model": list(BASES.values()),
        "base_model_relation": "adapter",
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "tags": ["deepfloyd-if", "text-to-image", "peft", "lora"],
        "instance_prompt": "a sks cat",
        "widget": [
            {"text": "a sks cat", "output": {"url": "samples/00.png"}},
            {"text": "a [dog]", "output": {"url": "samples/01.png"}},
        ],
    }
    assert NOTICE in read.text
    assert Image.open(folder / "samples" / "00.png").getpixel((0, 0)) == (255, 0, 0)


def test_the_card_of_another_base_links_to_its_licence(
    random_cascade: RandomCascade, hub: HubStandIn, tmp_path: Path
) -> None:
    hub.repositories["owner/base"] = Repository()
    hub.repositories["owner/base"].commit("main", {"LICENSE": b"MIT"}, "licence")
    spec = AdapterSpec()
    unet = trained_unet(random_cascade.stage_1, spec)
    links = {}
    for base in ("owner/base", "owner/elsewhere", str(random_cascade.stage_1)):
        info = read_info(export(unet, tmp_path / "adapters", base, 1, spec).folder)
        data = ModelCard.load(write_card(tmp_path / "adapters", [info])).data
        assert data.license == "other"
        links[data.base_model and data.base_model[0]] = (data.license_name, data.license_link)
        shutil.rmtree(tmp_path / "adapters")
    name = "license-of-the-base-model"
    assert links == {
        "owner/base": (name, "stage_1-LICENSE"),
        "owner/elsewhere": (name, "https://huggingface.co/owner/elsewhere"),
        None: (None, None),
    }


@pytest.mark.parametrize(
    "damage", [no_notice, no_metadata, other_card, without("stage_2-LICENSE.md")]
)
def test_a_card_is_written_anew_by_one_command(
    hub: HubStandIn, folder: Path, damage: Callable[[Path], None]
) -> None:
    before = content(folder)
    damage(folder)
    card.main([str(folder)])
    lost = {"samples/00.png", "samples/01.png"} if damage is no_metadata else set()
    after = content(folder)
    assert after.keys() == before.keys() - lost
    if not lost:
        assert after == before
    push(folder, REPO)


def test_a_card_is_not_written_into_a_single_stage(folder: Path) -> None:
    with pytest.raises(SystemExit):
        card.main([str(folder / "stage_1")])
    assert not (folder / "stage_1" / "README.md").exists()


def test_the_tools_take_hub_names(
    hub: HubStandIn, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    push(folder, REPO, revision="v1")
    written = {}
    for name in (str(folder), f"{REPO}@v1"):
        out = [str(tmp_path / f"{tool}-{len(written)}") for tool in ("combined", "resized")]
        combine.main([f"{name}=0.5", name, "--out", out[0]])
        resize.main([name, "--rank", "1", "--out", out[1]])
        inspect.main([name])
        diff.main([name, str(folder)])
        written[name] = [
            {str(file.relative_to(place)) for file in Path(place).rglob("*") if file.is_file()}
            for place in out
        ]
    assert written[str(folder)] == written[f"{REPO}@v1"]
    assert "error" not in capsys.readouterr().err
