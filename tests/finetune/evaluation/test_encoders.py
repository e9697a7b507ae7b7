"""Encoders: the embedded CLIP on real pictures, and models of the published sizes."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoTokenizer,
    BitImageProcessor,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    Dinov2Config,
    Dinov2Model,
    PreTrainedConfig,
    PreTrainedModel,
    ViTConfig,
    ViTModel,
)

from adapters.errors import UserError
from finetune.evaluation.encoders import BATCH_SIZE, ClipScorer, DinoScorer, encode_pictures
from finetune.evaluation.metrics import clip_i, clip_i_ceiling
from tests.builders import ROOT

CLIP = ROOT / "models/if-tiny/clip"
SUBJECTS = sorted(path for path in (ROOT / "datasets").iterdir() if path.is_dir())


@pytest.fixture(scope="module")
def scorer() -> ClipScorer:
    return ClipScorer(str(CLIP))


def pictures(subject: Path) -> tuple[list[Image.Image], list[str]]:
    rows = [json.loads(line) for line in (subject / "metadata.jsonl").read_text().splitlines()]
    return (
        [Image.open(subject / row["file_name"]) for row in rows],
        [row["text"].replace("sks ", "") for row in rows],
    )


def test_there_are_three_subjects_or_more_of_five_pictures_or_more() -> None:
    assert len(SUBJECTS) >= 3
    for subject in SUBJECTS:
        images, texts = pictures(subject)
        assert len(images) >= 5
        assert all(min(image.size) >= 512 for image in images)
        assert len(set(texts)) == len(texts)


@pytest.mark.parametrize("subject", SUBJECTS, ids=lambda path: path.name)
def test_the_embedded_clip_knows_real_pictures(scorer: ClipScorer, subject: Path) -> None:
    images, texts = pictures(subject)
    similarity = scorer.images(images) @ scorer.texts(texts).T
    assert similarity.argmax(dim=1).tolist() == list(range(len(texts)))


def test_the_embedded_clip_tells_subjects_apart(scorer: ClipScorer) -> None:
    vectors = [scorer.images(pictures(subject)[0]) for subject in SUBJECTS]
    for one in vectors:
        for other in vectors:
            if other is not one:
                assert clip_i(one, other) < clip_i_ceiling(one)


def test_batches_change_nothing(scorer: ClipScorer) -> None:
    images, _ = pictures(SUBJECTS[0])
    many = [images[number % len(images)] for number in range(BATCH_SIZE + 2)]
    vectors = encode_pictures(scorer, iter(many), len(many), "Scoring")
    torch.testing.assert_close(vectors, scorer.images(many))
    torch.testing.assert_close(vectors.norm(dim=-1), torch.ones(len(many)))


IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}


def save_random(model: type[PreTrainedModel], config: PreTrainedConfig, folder: Path) -> None:
    """Save a model with random weights, which takes less time than to initialize it."""
    draw = torch.Generator().manual_seed(0)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in model(config).state_dict().items()}
    weights = {
        name: (torch.randn(shape, generator=draw) * 0.02).bfloat16()
        for name, shape in shapes.items()
    }
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    config.save_pretrained(folder)


def save_dino(folder: Path) -> None:
    """ViT-S/16, which has no pooling layer, with the settings file of facebook/dino-vits16."""
    config = ViTConfig(
        hidden_size=384, intermediate_size=1536, num_hidden_layers=12, num_attention_heads=6
    )
    save_random(ViTModelWithoutPooling, config, folder)
    old = {"feature_extractor_type": "ViTFeatureExtractor", "size": 224, "resample": 3, **IMAGENET}
    (folder / "preprocessor_config.json").write_text(json.dumps(old))


def save_dinov2(folder: Path) -> None:
    """DINOv2 small, for pictures of 518 px, with the settings of facebook/dinov2-small."""
    config = Dinov2Config(
        hidden_size=384, num_hidden_layers=12, num_attention_heads=6, patch_size=14, image_size=518
    )
    save_random(Dinov2Model, config, folder)
    sizes = {"size": {"shortest_edge": 256}, "crop_size": {"height": 224, "width": 224}}
    BitImageProcessor(**sizes, **IMAGENET).save_pretrained(folder)


class ViTModelWithoutPooling(ViTModel):
    def __init__(self, config: ViTConfig) -> None:
        super().__init__(config, add_pooling_layer=False)


@pytest.mark.parametrize(("save", "side"), [(save_dino, 224), (save_dinov2, 256)])
def test_dino_models_are_read_by_their_cls_token(
    save: Callable[[Path], None], side: int, tmp_path: Path
) -> None:
    save(tmp_path)
    images = [image.convert("RGB") for image in pictures(SUBJECTS[0])[0][:2]]
    scorer, seen = DinoScorer(str(tmp_path)), []
    scorer.model.layernorm.register_forward_hook(lambda *given: seen.append(given[2]))
    found = scorer.images(images)
    edge = (side - 224) // 2
    small = [image.resize((side, side), Image.Resampling.BICUBIC) for image in images]
    pixels = np.stack([np.asarray(each) for each in small])[:, edge : edge + 224, edge : edge + 224]
    scaled = (pixels / 255 - IMAGENET["image_mean"]) / IMAGENET["image_std"]
    with torch.no_grad():
        scorer.model(pixel_values=torch.from_numpy(scaled).permute(0, 3, 1, 2).float())
    token = seen[1][:, 0].double().numpy()
    wanted = token / np.linalg.norm(token, axis=-1, keepdims=True)
    assert found.shape == (2, 384)
    np.testing.assert_allclose(found, wanted, atol=1e-4)
    assert np.abs(wanted[0] - wanted[1]).max() > 1e-3


def test_a_clip_of_the_published_size_scores(tmp_path: Path) -> None:
    """ViT-B/32 (openai/clip-vit-base-patch32), with random weights and the embedded tokenizer."""
    vision = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}
    text = {"eos_token_id": 1, "pad_token_id": 0}
    config = CLIPConfig(vision_config=vision, text_config=text, projection_dim=512)
    save_random(CLIPModel, config, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(CLIP)
    CLIPProcessor(CLIPImageProcessor(), tokenizer).save_pretrained(tmp_path)
    scorer = ClipScorer(str(tmp_path))
    images, texts = pictures(SUBJECTS[0])
    vectors, encoded = scorer.images(images[:2]), scorer.texts(texts[:3])
    assert vectors.shape == (2, 512)
    assert encoded.shape == (3, 512)
    assert not torch.equal(vectors[0], vectors[1])
    torch.testing.assert_close(encoded.norm(dim=-1), torch.ones(3))


class Trap:
    """An object that leaves a file behind when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Callable[[str], object], tuple[str]]:
        return Path.touch, (self.file,)  # type: ignore[return-value]


def pickled_clip(folder: Path, **more: object) -> Path:
    clip = folder / "clip"
    shutil.copytree(CLIP, clip)
    weights = clip / "model.safetensors"
    torch.save(load_file(weights) | more, clip / "pytorch_model.bin")
    weights.unlink()
    return clip


def test_tensors_are_read_from_files_older_than_safetensors(
    tmp_path: Path, scorer: ClipScorer
) -> None:
    images, _ = pictures(SUBJECTS[0])
    found = ClipScorer(str(pickled_clip(tmp_path))).images(images[:1])
    assert torch.equal(found, scorer.images(images[:1]))


def test_nothing_else_is_unpickled(tmp_path: Path) -> None:
    left = tmp_path / "left"
    clip = pickled_clip(tmp_path, trap=Trap(left))
    with pytest.raises(UserError, match="more than tensors, such as code, none of which was run"):
        ClipScorer(str(clip))
    assert not left.exists()


def test_a_missing_model_is_named(tmp_path: Path) -> None:
    nowhere, file = str(tmp_path / "nowhere"), ROOT / "README.md"
    with pytest.raises(UserError, match=r"evaluation\.clip must name a CLIP .* no such folder"):
        ClipScorer(nowhere)
    with pytest.raises(UserError, match=r"evaluation\.dino must name a DINO .* no such folder"):
        DinoScorer(nowhere)
    with pytest.raises(UserError, match="it is a file, not a folder"):
        ClipScorer(str(file))


@pytest.mark.parametrize(
    ("kind", "folder", "said"),
    [
        (DinoScorer, "clip", r"evaluation\.dino must name .* of the type 'clip'"),
        (DinoScorer, "stage_1/text_encoder", r"evaluation\.dino must name .* of the type 't5'"),
        (ClipScorer, "stage_1/text_encoder", r"evaluation\.clip must name .* of the type 't5'"),
    ],
)
def test_a_model_of_another_type_is_refused(
    kind: type[ClipScorer | DinoScorer], folder: str, said: str
) -> None:
    with pytest.raises(UserError, match=said):
        kind(str(ROOT / "models/if-tiny" / folder))


def drop_a_weight(clip: Path) -> None:
    weights = load_file(clip / "model.safetensors")
    del weights["visual_projection.weight"]
    save_file(weights, clip / "model.safetensors", {"format": "pt"})


def spoil_a_weight(clip: Path) -> None:
    weights = load_file(clip / "model.safetensors")
    weights["visual_projection.weight"][0, 0] = torch.inf
    save_file(weights, clip / "model.safetensors", {"format": "pt"})


def truncate(clip: Path) -> None:
    weights = clip / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])


def change_config(**values: object) -> Callable[[Path], None]:
    def change(clip: Path) -> None:
        config = json.loads((clip / "config.json").read_text())
        (clip / "config.json").write_text(json.dumps(config | values))

    return change


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (truncate, "deserializing header"),
        (drop_a_weight, "lack the weights visual_projection.weight that"),
        (spoil_a_weight, "hold NaN or infinite values in the weights visual_projection.weight"),
        (
            change_config(projection_dim=256),
            "do not fit the weights text_projection.weight, visual_projection.weight that",
        ),
        (change_config(projection_dim="x"), "'projection_dim' with value 'x'"),
        (change_config(text_config=3), "text_config"),
        (lambda clip: (clip / "config.json").write_text("[]"), "indices"),
        (lambda clip: (clip / "config.json").write_text("3"), "'int' object"),
        (lambda clip: (clip / "config.json").unlink(), "config.json"),
    ],
)
def test_a_damaged_model_is_a_sentence(
    damage: Callable[[Path], None],
    said: str,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    clip = tmp_path / "clip"
    shutil.copytree(CLIP, clip)
    damage(clip)
    with pytest.raises(UserError) as caught:
        ClipScorer(str(clip))
    assert str(caught.value).startswith("evaluation.clip must name a CLIP model, as a folder")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "REPORT" not in capfd.readouterr().err
