"""Each model is taken at its own revision, from wherever its name is given."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from huggingface_hub import constants
from PIL import Image

from adapters import Parts, generate, load_cascade
from adapters.base.hub import with_revision
from adapters.base.source import Source, sources_of
from adapters.cascade.provenance import read_picture_info
from adapters.files.export import export_adapter
from adapters.files.info import AdapterInfo
from adapters.files.model_card import write_card
from adapters.weights.kinds import AdapterSpec
from finetune.recipe.schema import Recipe
from finetune.step.stages import STAGES
from tests.builders.adapters import base_of, trained_unet
from tests.builders.hub_stand_in import hub_stand_in
from tests.builders.random_cascade import RandomCascade, save_random_cascade
from tests.builders.unets import load_unet

MODELS = {1: "owner/if-1", 2: "owner/if-2", 3: "owner/upscaler"}
STEPS = ["--stage-1-steps", "2", "--stage-2-steps", "2"]

Commits = dict[int, str]


@pytest.fixture(scope="module")
def newer(tmp_path_factory: pytest.TempPathFactory) -> RandomCascade:
    return save_random_cascade(tmp_path_factory.mktemp("newer"), seed=2)


@pytest.fixture
def old(
    random_cascade: RandomCascade,
    newer: RandomCascade,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Commits]:
    """A hub of models that have changed since; the old commits' names, another in each."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    commits = {}
    with hub_stand_in() as hub:
        for stage, name in MODELS.items():
            for branch, cascade in {f"old-{stage}": random_cascade, "main": newer}.items():
                hub.publish(name, vars(cascade)[f"stage_{stage}"], branch)
            commits[stage] = hub.repositories[name].branches[f"old-{stage}"]
        assert len(set(commits.values())) == len(commits)
        yield commits


def same(unet: UNet2DConditionModel, folder: Path) -> bool:
    a, b = unet.state_dict(), load_unet(folder).state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_every_stage_of_a_cascade_has_its_own(
    old: Commits, random_cascade: RandomCascade, newer: RandomCascade
) -> None:
    names = {stage: f"{name}@{old[stage]}" for stage, name in MODELS.items()}
    cascade = load_cascade(*names.values(), parts=Parts(text_encoder=False))
    assert cascade.base_names == names
    assert all(same(cascade.stages[n].unet, base_of(random_cascade, n)) for n in (1, 2))
    assert same(cascade.upscaler.unet, random_cascade.stage_3)
    mixed = load_cascade(MODELS[1], names[2], revision="main", parts=Parts(text_encoder=False))
    assert same(mixed.stages[1].unet, newer.stage_1)
    assert same(mixed.stages[2].unet, random_cascade.stage_2)


def test_a_tool_takes_each_base_at_its_own(
    old: Commits, random_cascade: RandomCascade, newer: RandomCascade
) -> None:
    sources = sources_of([f"{MODELS[2]}@{old[2]}", MODELS[1]], revision="main")
    assert {stage: source.name for stage, source in sources.items()} == {1: MODELS[1], 2: MODELS[2]}
    for stage, cascade in {1: newer, 2: random_cascade}.items():
        assert same(sources[stage].unet("fp32", torch.device("cpu")), base_of(cascade, stage))


def test_generating_takes_each_base_at_the_revision_that_its_adapter_names(
    old: Commits, random_cascade: RandomCascade, tmp_path: Path
) -> None:
    spec = AdapterSpec()
    for stage in (1, 2):
        info = AdapterInfo(
            base_model=MODELS[stage],
            base_revision=old[stage],
            stage=stage,
            spec=spec,
            step=7,
            recipe="",
            version="1",
        )
        unet = trained_unet(base_of(random_cascade, stage), spec)
        export_adapter(unet, tmp_path / "adapter", info)
    folders = {1: random_cascade.stage_1, 2: random_cascade.stage_2}
    here = [part for n, folder in folders.items() for part in (f"--stage-{n}", str(folder))]
    adapter = ["--adapter", str(tmp_path / "adapter"), "--prompt", "a cat"]
    name = "000-a-cat-seed0-stage_2.png"
    runs = {
        "here": [*adapter, *STEPS, *here],
        "hub": [*adapter, *STEPS],
        "again": ["--like", str(tmp_path / "hub" / name)],
    }
    for run, arguments in runs.items():
        generate.main([*arguments, "--out", str(tmp_path / run)])
    infos = {run: read_picture_info(tmp_path / run / name) for run in runs}
    assert infos["hub"] == infos["again"]
    assert infos["hub"].models == {n: f"{MODELS[n]}@{old[n]}" for n in (1, 2)}
    pictures = {run: load_picture(tmp_path / run / name) for run in runs}
    assert pictures["here"] == pictures["hub"] == pictures["again"]


def load_picture(path: Path) -> bytes:
    with Image.open(path) as picture:
        return picture.tobytes()


def test_an_adapter_and_its_card_name_the_revision_of_its_own_stage(tmp_path: Path) -> None:
    base = {"stage_1": "owner/if-1@v1", "stage_2": "owner/if-2", "revision": "v9"}
    stages = {"stage_1": {"steps": 1}, "stage_2": {"steps": 1}}
    recipe = Recipe.model_validate({"name": "r", "base": base, "data": {"source": "p"}} | stages)
    infos = [
        AdapterInfo(
            base_model=recipe.source(stage).name,
            base_revision=recipe.source(stage).revision,
            stage=number,
            spec=AdapterSpec(),
            step=7,
            recipe=recipe.to_yaml(),
            version="0",
        )
        for number, stage in STAGES.items()
    ]
    assert [(info.base_model, info.base_revision) for info in infos] == [
        ("owner/if-1", "v1"),
        ("owner/if-2", "v9"),
    ]
    with hub_stand_in():
        card = write_card(tmp_path, infos).read_text()
    assert 'load_cascade(stage_1="owner/if-1@v1", stage_2="owner/if-2@v9", adapters=["."])' in card
    assert 'IFPipeline.from_pretrained("owner/if-1", revision="v1")' in card
    assert 'IFSuperResolutionPipeline.from_pretrained("owner/if-2", revision="v9")' in card


@pytest.mark.parametrize(
    ("name", "revision", "found"),
    [
        ("owner/name@v2", None, ("owner/name", "v2")),
        ("owner/name@v2", "v1", ("owner/name", "v2")),
        ("owner/name@refs/pr/1", "v1", ("owner/name", "refs/pr/1")),
        ("owner/name", "v1", ("owner/name", "v1")),
        ("owner/name", None, ("owner/name", None)),
        ("./owner/name@v2", None, ("./owner/name@v2", None)),
        ("here/there@v2", "v1", ("here/there@v2", "v1")),
    ],
)
def test_a_name_is_a_path_where_that_exists(
    name: str,
    revision: str | None,
    found: tuple[str, str | None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "here" / "there@v2").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    source = Source(name, 1, revision)
    assert (source.name, source.revision) == found


def test_a_folder_has_no_revision(tmp_path: Path) -> None:
    assert with_revision("owner/name", "v2") == "owner/name@v2"
    assert with_revision("owner/name", None) == "owner/name"
    assert with_revision(str(tmp_path), "v2") == str(tmp_path)


def test_a_folder_with_an_at_loads(random_cascade: RandomCascade, tmp_path: Path) -> None:
    folder = tmp_path / "stage@1"
    folder.symlink_to(random_cascade.stage_1)
    cascade = load_cascade(folder, parts=Parts(text_encoder=False))
    assert cascade.base_names == {1: str(folder)}
    assert same(cascade.stages[1].unet, random_cascade.stage_1)
