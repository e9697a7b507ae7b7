"""Encodings of captions: the pipeline's own, made once, kept under all that decides on them."""

import json
import shutil
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate import Accelerator
from diffusers import IFPipeline
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import T5EncoderModel

from adapters import checksums
from adapters.base.source import Source
from adapters.errors import UserError
from finetune import precompute
from finetune.data import captions as text
from finetune.data.captions import CaptionCache, check_cleaning, collect_captions, model_identity
from finetune.data.pictures import Picture, load_pictures
from finetune.recipe.file import load_recipe
from finetune.recipe.prompt_lists import read_prompts
from finetune.recipe.schema import OutputPrior, Recipe
from finetune.train import gather
from tests.builders.random_cascade import RandomCascade
from tests.builders.recipes import CPU, embed

CUDA = torch.device("cuda")
PROMPT = "  A <b>Photo</b> of  sks CAT,  on a   blue background &amp; more  "

MakeRecipe = Callable[..., Recipe]


@pytest.fixture
def make_recipe(random_cascade: RandomCascade, tmp_path: Path) -> MakeRecipe:
    """Makes a small recipe with a cache of its own, laid over with what is given."""

    def make(**sections: Any) -> Recipe:
        tree: dict[str, Any] = {
            "name": "test",
            "base": {"stage_1": str(random_cascade.stage_1)},
            "data": {"source": str(tmp_path / "pictures"), "prompt": "a sks cat"},
            "stage_1": {"steps": 1},
            "cache_dir": str(tmp_path / "cache"),
        }
        return Recipe.model_validate(tree | sections)

    return make


@pytest.fixture
def no_text_encoder(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Makes loading a text encoder fail."""

    def refuse(*arguments: object, **options: object) -> None:
        pytest.fail("the text encoder was loaded")

    with monkeypatch.context() as patch:
        patch.setattr(T5EncoderModel, "from_pretrained", refuse)
        patch.setattr(IFPipeline, "from_pretrained", refuse)
        yield


def shown_to_the_unet(model: Path, prompt: str, clean_caption: bool) -> tuple[Tensor, Tensor]:
    """The encodings [T, D] of "" and the prompt that ``IFPipeline.__call__`` feeds its UNet."""
    pipeline = IFPipeline.from_pretrained(model)
    pipeline.set_progress_bar_config(disable=True)
    seen = []
    pipeline.unet.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["encoder_hidden_states"]), with_kwargs=True
    )
    pipeline(prompt, num_inference_steps=2, clean_caption=clean_caption, output_type="pt")
    return tuple(seen[0])


@pytest.mark.parametrize("clean_caption", [True, False])
def test_encodings_are_those_the_pipeline_feeds_its_unet(
    clean_caption: bool, make_recipe: MakeRecipe
) -> None:
    recipe = make_recipe(text={"clean_caption": clean_caption})
    embeds = embed([PROMPT, "", "a dog"], recipe)
    empty, encoding = shown_to_the_unet(Path(recipe.base.stage_1), PROMPT, clean_caption)
    assert torch.equal(embeds[PROMPT], encoding)
    assert torch.equal(embeds[""], empty)
    assert embeds[PROMPT].dtype == encoding.dtype


def test_cleaning_matters_and_is_part_of_the_key(make_recipe: MakeRecipe) -> None:
    cleaned = embed([PROMPT], make_recipe())
    raw = embed([PROMPT], make_recipe(text={"clean_caption": False}))
    assert not torch.equal(cleaned[PROMPT], raw[PROMPT])


def test_a_caption_is_encoded_the_same_alone_and_in_company(make_recipe: MakeRecipe) -> None:
    captions = ["a cat", "a much longer caption of a dog on a blue background", ""]
    together = embed(captions, make_recipe())
    assert list(together) == sorted(captions)
    for caption in captions:
        alone = make_recipe(cache_dir=f"{make_recipe().cache_dir}/{len(caption)}")
        assert torch.equal(embed([caption], alone)[caption], together[caption])


def test_what_is_cached_needs_no_text_encoder(
    make_recipe: MakeRecipe, request: pytest.FixtureRequest
) -> None:
    first = embed(["a cat", ""], make_recipe())
    request.getfixturevalue("no_text_encoder")
    other_run = make_recipe(name="other", stage_1={"steps": 7}, seed=3)
    again = embed(["", "a cat", "a cat"], other_run)
    assert all(torch.equal(first[caption], again[caption]) for caption in ("", "a cat"))


def test_an_explicit_precision_is_the_same_on_every_device(
    make_recipe: MakeRecipe, request: pytest.FixtureRequest
) -> None:
    recipe = make_recipe(text={"precision": "bf16"})
    first = embed(["a cat"], recipe)
    request.getfixturevalue("no_text_encoder")
    assert torch.equal(embed(["a cat"], recipe, CUDA)["a cat"], first["a cat"])


def test_encodings_are_read_when_they_are_asked_for_and_few_are_kept(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads = []

    read = CaptionCache.read

    def recording(self: CaptionCache, caption: str) -> Tensor:
        reads.append(caption)
        return read(self, caption)

    monkeypatch.setattr(CaptionCache, "read", recording)
    monkeypatch.setattr(text, "KEPT_ENCODINGS", 2)
    captions = ["", "a cat", "a dog"]
    embed(captions, make_recipe())
    embeds = embed(captions, make_recipe())
    assert (len(embeds), list(embeds), "a cat" in embeds) == (3, captions, True)
    assert reads == []
    for caption in captions:
        assert embeds[caption] is embeds[caption]
    assert len(reads) == 3
    assert embeds[""].shape == embeds["a cat"].shape
    assert len(reads) == 5


def test_only_the_captions_asked_for_are_there(make_recipe: MakeRecipe) -> None:
    embed(["a dog"], make_recipe())
    embeds = embed(["a cat"], make_recipe())
    assert "a dog" not in embeds
    with pytest.raises(KeyError, match="a dog"):
        embeds["a dog"]


def test_an_encoding_that_has_gone_is_said(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe()
    embeds = embed(["a cat"], recipe)
    (file,) = (recipe.cache / "prompt_embeds").iterdir()
    file.unlink()
    with pytest.raises(UserError, match=r"encoding of 'a cat', .* is missing or damaged"):
        embeds["a cat"]


def test_only_what_is_missing_is_encoded(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    embed(["a cat"], make_recipe())
    encoded = []

    def recording(pipeline: IFPipeline, prompt: str, **options: Any) -> object:
        encoded.append(prompt)
        return original(pipeline, prompt, **options)

    original = IFPipeline.encode_prompt
    monkeypatch.setattr(IFPipeline, "encode_prompt", recording)
    embed(["a cat", "a dog"], make_recipe())
    assert encoded == ["a dog"]


def test_the_text_encoder_is_gone_afterwards(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoders = []

    def recording(pipeline: IFPipeline, prompt: str, **options: Any) -> object:
        encoders.append(weakref.ref(pipeline.text_encoder))
        return original(pipeline, prompt, **options)

    original = IFPipeline.encode_prompt
    monkeypatch.setattr(IFPipeline, "encode_prompt", recording)
    embed(["a cat"], make_recipe())
    assert [encoder() for encoder in encoders] == [None]


def test_a_damaged_file_is_made_again(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe()
    first = embed(["a cat"], recipe)["a cat"].clone()
    (file,) = (recipe.cache / "prompt_embeds").iterdir()
    whole = file.read_bytes()
    flipped = bytearray(whole)
    flipped[-2] ^= 1
    zeroed = whole[: -first.nbytes] + bytes(first.nbytes)
    for content in (b"", whole[:100], b"\xff" * 64, bytes(len(whole)), bytes(flipped), zeroed):
        file.unlink()
        file.write_bytes(content)
        assert torch.equal(embed(["a cat"], recipe)["a cat"], first)
        assert file.read_bytes() == whole
    assert len(list((recipe.cache / "prompt_embeds").iterdir())) == 1


def test_an_encoding_that_is_no_number_is_never_kept(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As T5 gives in fp16."""
    encode = IFPipeline.encode_prompt

    def overflow(*given: Any, **options: Any) -> tuple[Tensor, Tensor]:
        encoding, other = encode(*given, **options)
        return encoding * torch.inf, other

    monkeypatch.setattr(IFPipeline, "encode_prompt", overflow)
    recipe = make_recipe()
    with pytest.raises(UserError, match="gives NaN or infinite values for 'a cat' in fp32"):
        embed(["a cat"], recipe)
    assert not list((recipe.cache / "prompt_embeds").glob("*"))


@pytest.mark.parametrize("precision", ["bf16", "int8", "nf4"])
def test_each_precision_is_close_to_fp32_and_kept_apart(
    precision: str, make_recipe: MakeRecipe
) -> None:
    exact = embed(["a cat"], make_recipe())["a cat"]
    recipe = make_recipe(text={"precision": precision})
    close = embed(["a cat"], recipe)["a cat"]
    assert (exact.dtype, close.dtype) == (torch.float32, torch.bfloat16)
    assert close.shape == exact.shape
    similarity = torch.cosine_similarity(exact.flatten(), close.float().flatten(), dim=0)
    assert similarity > (0.95 if precision == "nf4" else 0.999)
    assert len(list((recipe.cache / "prompt_embeds").iterdir())) == 2


def test_automatic_precision_follows_the_device(make_recipe: MakeRecipe) -> None:
    assert CaptionCache.of(make_recipe(), CPU).precision == "fp32"
    assert CaptionCache.of(make_recipe(), CUDA).precision == "bf16"
    on_cpu = CaptionCache.of(make_recipe(text={"device": "cpu"}), CUDA)
    assert (on_cpu.precision, on_cpu.device) == ("fp32", CPU)


def test_a_models_identity_is_its_content(random_cascade: RandomCascade, tmp_path: Path) -> None:
    source = Source(str(tmp_path / "copy"), 1)
    copy = tmp_path / "copy"
    shutil.copytree(random_cascade.stage_1, copy)
    known = model_identity(Source(str(random_cascade.stage_1), 1), text.TEXT_PARTS)
    everything = model_identity(source)
    assert model_identity(source, text.TEXT_PARTS) == known
    weights = copy / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    assert model_identity(source, text.TEXT_PARTS) == known
    assert model_identity(source) != everything
    weights = copy / "text_encoder" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    assert model_identity(source, text.TEXT_PARTS) != known


@pytest.mark.parametrize("whole_bytes", [0, 2**20])
def test_a_merge_anywhere_in_a_file_is_another_model(
    whole_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checksums, "WHOLE_BYTES", whole_bytes)
    monkeypatch.setattr(checksums, "BLOCK_BYTES", 16)
    source, size = Source(str(tmp_path / "model"), 1), 100_000
    layer = size // 50
    weights = tmp_path / "model" / "unet" / "weights.safetensors"
    weights.parent.mkdir(parents=True)
    identities = set()
    for start in range(0, size, layer):
        weights.write_bytes(bytes(start) + b"\x01" * layer + bytes(size - start - layer))
        identities.add(model_identity(source))
    assert len(identities) == 50
    for end in (b"\x01" + bytes(size - 1), bytes(size - 1) + b"\x01", bytes(size)):
        weights.write_bytes(end)
        identities.add(model_identity(source))
    assert len(identities) == 53


def test_a_changed_text_encoder_encodes_anew(
    make_recipe: MakeRecipe, random_cascade: RandomCascade, tmp_path: Path
) -> None:
    recipe = make_recipe()
    first = embed(["a cat"], recipe)
    copy = tmp_path / "copy"
    shutil.copytree(random_cascade.stage_1, copy)
    file = copy / "text_encoder" / "model.safetensors"
    weights = {name: tensor * 2 for name, tensor in load_file(file).items()}
    file.unlink()
    save_file(weights, file, metadata={"format": "pt"})
    changed = embed(["a cat"], make_recipe(base={"stage_1": str(copy)}))
    assert not torch.equal(first["a cat"], changed["a cat"])


def test_a_hub_models_identity_is_its_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    revisions = []

    def download(name: str, file: str, revision: str | None) -> str:
        revisions.append(revision)
        return str(tmp_path / "snapshots" / "abc123" / file)

    monkeypatch.setattr(text, "hf_hub_download", download)
    for name in ("DeepFloyd/IF-I-XL-v1.0", "DeepFloyd/IF-I-XL-v1.0@v2"):
        source = Source(name, 1, "refs/pr/1")
        assert model_identity(source) == "DeepFloyd/IF-I-XL-v1.0@abc123:None"
    assert revisions == ["refs/pr/1", "v2"]


def test_a_missing_base_is_said(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    nowhere = str(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"nowhere' is neither a folder nor"):
        embed(["a cat"], make_recipe(base={"stage_1": nowhere}))
    (tmp_path / "empty").mkdir()
    empty = str(tmp_path / "empty")
    with pytest.raises(UserError, match=r"empty' cannot be loaded"):
        embed(["a cat"], make_recipe(base={"stage_1": empty}))


def save_picture(folder: Path, caption: str | None = None) -> None:
    folder.mkdir(parents=True)
    Image.new("RGB", (20, 20)).save(folder / "0.png")
    if caption:
        (folder / "0.txt").write_text(caption)


def test_all_collect_captions_a_run_are_found(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    save_picture(tmp_path / "pictures")
    save_picture(tmp_path / "class", "a cat of the class")
    recipe = make_recipe(
        prior={"prompts": ["a cat", "a dog"], "folder": str(tmp_path / "class")},
        validation={
            "prompts": ["a sks cat on blue", "a cat"],
            "stage_2_prompts": ["a cat on blue", "a cat"],
        },
        evaluation={
            "prompts": ["a sks cat on red"],
            "stage_2_prompts": ["a cat on red"],
            "other_prompts": ["a tree"],
            "class_prompts": ["a pet"],
            "subject": "cat",
            "identifier": "sks cat",
            "clip": "none",
        },
    )
    pictures = load_pictures(recipe.data, recipe.cache, 16)
    captions = collect_captions(recipe, pictures)
    assert list(captions) == [
        "",
        "a cat",
        "a cat of the class",
        "a cat on blue",
        "a cat on red",
        "a dog",
        "a pet",
        "a sks cat",
        "a sks cat on blue",
        "a sks cat on red",
        "a tree",
    ]
    places = [captions[text] for text in ("a sks cat", "a dog", "a cat on blue", "a tree")]
    assert places == [
        "data.prompt",
        "prior.prompts",
        "validation.stage_2_prompts",
        "evaluation.other_prompts",
    ]
    assert captions["a cat of the class"] == f"a caption of prior.folder {tmp_path / 'class'}"


def test_the_captions_to_preserve_are_those_asked_for(
    make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    """A list, the everyday ones, or the data's own, each of which occurs once."""
    own = ("a sks cat", "a sks cat on a mat")
    pictures = [Picture(tmp_path, caption, "a file") for caption in (*own, *own)]
    given = ("a dog", "a tree")
    everyday = read_prompts("everyday")
    for prompts, expected in ((list(given), given), ("everyday", everyday), ("data", own)):
        prior = {"kind": "output", "prompts": prompts}
        recipe = make_recipe(data={"source": "unread"}, prior=prior)
        assert isinstance(recipe.prior, OutputPrior)
        assert recipe.prior.list_captions(each.caption for each in pictures) == expected
        collected = collect_captions(recipe, pictures)
        assert collected.keys() == {"", *own, *expected}
        assert prompts == "data" or collected[expected[0]] == "prior.prompts"


def test_everyday_captions_are_many_and_survive_cleaning(caplog: pytest.LogCaptureFixture) -> None:
    captions = read_prompts("everyday")
    assert 100 <= len(set(captions)) == len(captions) <= 200
    check_cleaning(dict.fromkeys(captions, "everyday"), clean_caption=True)
    assert not caplog.records
    assert max(len(caption) for caption in captions) < 60


def test_the_empty_caption_is_encoded_though_none_is_dropped(
    make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    """Guidance is taken against it."""
    save_picture(tmp_path / "pictures")
    source = {"source": str(tmp_path / "pictures"), "prompt": "a sks cat", "caption_dropout": 0.0}
    recipe = make_recipe(data=source)
    pictures = load_pictures(recipe.data, recipe.cache, 16)
    material = gather(recipe, pictures, Accelerator(cpu=True))
    assert material.prompt_embeds[""].shape == material.prompt_embeds["a sks cat"].shape


def test_precompute_leaves_nothing_to_encode(
    make_recipe: MakeRecipe,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    request: pytest.FixtureRequest,
) -> None:
    save_picture(tmp_path / "pictures")
    recipe = make_recipe(validation={"prompts": ["a sks cat on blue"]})
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
    precompute.main([str(file), "text.precision=fp32"])
    assert capsys.readouterr().out.startswith(
        "3 captions encoded in fp32 on cpu, 0 were already in "
    )
    request.getfixturevalue("no_text_encoder")
    precompute.main([str(file)])
    assert capsys.readouterr().out.startswith(
        "0 captions encoded in fp32 on cpu, 3 were already in "
    )
    embed(collect_captions(recipe, load_pictures(recipe.data, recipe.cache, 16)), recipe)


def test_precompute_says_how_a_trainer_on_another_device_reuses_its_work(
    make_recipe: MakeRecipe,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    request: pytest.FixtureRequest,
) -> None:
    save_picture(tmp_path / "pictures")
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(make_recipe().model_dump(mode="json")))
    precompute.main([str(file)])
    override = capsys.readouterr().out.splitlines()[-1]
    assert override == "text.precision=fp32"
    request.getfixturevalue("no_text_encoder")
    assert "a sks cat" in embed(["a sks cat", ""], load_recipe(file, [override]), CUDA)


def test_precompute_exits_with_one_sentence(
    make_recipe: MakeRecipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "recipe.json"
    file.write_text(json.dumps(make_recipe().model_dump(mode="json")))
    with pytest.raises(SystemExit) as exit_:
        precompute.main([str(file)])
    assert exit_.value.code == 2
    assert "there is no such folder" in capsys.readouterr().err
