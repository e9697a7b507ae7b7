"""Finding the key of a recipe that a user means, at any depth and under the field's other names."""

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from types import MappingProxyType

from adapters.errors import UserError, hint, listed
from adapters.tables import fill_lines, format_table
from finetune.recipe.reference import Key, KeySection, list_paths, list_sections

OTHER_NAMES: Mapping[str, str] = MappingProxyType(
    {
        **dict.fromkeys(("lr", "rate", "unet_lr"), "optimizer.learning_rate"),
        **dict.fromkeys(("scheduler", "lr_scheduler", "lr_schedule"), "optimizer.schedule"),
        **dict.fromkeys(("warmup", "lr_warmup_steps"), "optimizer.warmup_steps"),
        **dict.fromkeys(("use_8bit_adam", "optimizer_type"), "optimizer.name"),
        "adam_weight_decay": "optimizer.weight_decay",
        **dict.fromkeys(("clip_grad_norm", "gradient_clipping"), "optimizer.max_grad_norm"),
        **dict.fromkeys(("r", "lora_rank", "network_dim", "dim"), "adapter.rank"),
        **dict.fromkeys(("lora_alpha", "network_alpha"), "adapter.alpha"),
        **dict.fromkeys(("lora_dropout", "network_dropout"), "adapter.dropout"),
        "target_modules": "adapter.targets",
        **dict.fromkeys(("batch", "train_batch_size", "bs"), "batch_size"),
        **dict.fromkeys(("gradient_accumulation_steps", "grad_accum"), "accumulation"),
        **dict.fromkeys(("max_train_steps", "max_steps", "num_steps"), "steps"),
        **dict.fromkeys(("mixed_precision", "dtype"), "precision"),
        **dict.fromkeys(("ema", "use_ema"), "ema_decay"),
        "snr_gamma": "min_snr_gamma",
        **dict.fromkeys(("checkpointing_steps", "save_every"), "checkpoint_every"),
        "checkpoints_total_limit": "keep_checkpoints",
        **dict.fromkeys(("model", "pretrained_model_name_or_path"), "base.stage_1"),
        **dict.fromkeys(
            ("images", "instance_data_dir", "train_data_dir", "dataset_name"),
            "data.source",
        ),
        **dict.fromkeys(("caption", "instance_prompt"), "data.prompt"),
        "random_flip": "data.horizontal_flip",
        "center_crop": "data.center_shift",
        "class_prompt": "prior.prompts",
        "class_data_dir": "prior.folder",
        "num_class_images": "prior.count",
        "prior_loss_weight": "prior.weight",
        **dict.fromkeys(("validation_prompt", "validation_prompts"), "validation.prompts"),
        **dict.fromkeys(("validation_steps", "validation_epochs"), "validation.every"),
        "num_inference_steps": "sampling.stage_1.steps",
        "guidance_scale": "sampling.stage_1.guidance",
        **dict.fromkeys(("output_dir", "logging_dir"), "runs_dir"),
        **dict.fromkeys(("report_to", "log_with", "tracker"), "trackers"),
        **dict.fromkeys(("logging_steps", "log_steps"), "log_every"),
    }
)
"""The ends of the paths of keys, by what other trainers call them."""

NOT_HERE: Mapping[str, str] = MappingProxyType(
    {
        **dict.fromkeys(
            ("epochs", "num_epochs", "num_train_epochs", "max_train_epochs"),
            "training is counted in steps: give steps = epochs * pictures / batch_size",
        ),
        **dict.fromkeys(
            ("resolution", "size", "image_size"),
            "each stage's base sets the size of its pictures: leave it out",
        ),
        "train_text_encoder": "the text encoder is not trained: leave it out",
        "resume_from_checkpoint": "the same command continues from the newest checkpoint: leave it"
        " out",
    }
)
"""The advice on settings of other trainers that a recipe does not have."""

SEVERAL = 3
"""The most keys that a sentence names."""


@cache
def _paths() -> tuple[tuple[str, ...], ...]:
    return tuple(tuple(path.split(".")) for path in list_paths())


def locate(path: Sequence[str]) -> str:
    """Say which key an unknown one should have been; empty if none is likely.

    A key of that name (or that the field calls so) further down in the same section comes first,
    then one of a similar name in the section, then one of that name anywhere.

    Args:
        path: the unknown key's path.

    Example:
        >>> locate(("stage_1", "lr"))
        'it is stage_1.optimizer.learning_rate'
    """
    *section, name = path
    if name in NOT_HERE:
        return NOT_HERE[name]
    everywhere = list(_find(name))
    inside = [each for each in everywhere if list(each[: len(section)]) == section]
    own = [each[-1] for each in _paths() if list(each[:-1]) == section]
    if inside:
        return _name_keys(inside)
    if similar := hint(name, own):
        return similar
    if everywhere:
        return _name_keys(everywhere)
    names = {".".join(each[len(section) :]): each for each in _paths() if _is_in(each, section)}
    ends = {each[-1]: each for each in reversed(names.values())}
    found = hint(name, list(ends)).removeprefix("did you mean ").removesuffix("?")
    return f"did you mean {'.'.join(ends[found])}?" if found else ""


def _is_in(path: Sequence[str], section: Sequence[str]) -> bool:
    return list(path[: len(section)]) == list(section) and len(path) > len(section)


def _find(name: str) -> Iterator[tuple[str, ...]]:
    """Yield the paths of the keys of a name, or of those that the field calls so."""
    tail = tuple(OTHER_NAMES.get(name, name).split("."))
    yield from (path for path in _paths() if path[-len(tail) :] == tail)


def _name_keys(paths: Sequence[Sequence[str]]) -> str:
    """Name the least deep of some keys."""
    least = min(map(len, paths))
    names = [".".join(path) for path in paths if len(path) == least]
    return f"it is {' or '.join(names)}" if len(names) <= SEVERAL else f"one of {listed(names)}"


def explain_key(name: str) -> str:
    """Explain a key or a section of a recipe; the empty name: all of them.

    Args:
        name: a dotted path, its last part alone, or what the field calls it.

    Raises:
        UserError: if there is no such key, with the closest one.
    """
    sections = list_sections()
    if not name:
        return "\n\n".join(map(_format_section, sections))
    wanted = {path for path in _paths() if path == tuple(name.split("."))}
    if not wanted:
        *section, last = name.split(".")
        wanted = {path for path in _find(last) if list(path[: len(section)]) == section}
    is_section = any(name in each.paths for each in sections)  # whose own key says less
    texts = []
    for each in sections:
        if name in each.paths:
            texts += [_about(each), *(_format_key(key, [key.name]) for key in each.keys)]
        for key in each.keys if not is_section else ():
            own = [f"{path}.{key.name}".lstrip(".") for path in each.paths]
            if named := [path for path in own if tuple(path.split(".")) in wanted]:
                texts.append(_format_key(key, named))
    if not texts:
        reason = locate(name.split(".")) or "`--explain` alone lists all keys"
        raise UserError(f"There is no key {name!r} in a recipe; {reason.removesuffix('?')}.")
    return "\n\n".join(texts)


def _format_section(section: KeySection) -> str:
    """Write a section's keys with their types and defaults, as a table."""
    rows = [(f"  {key.name}", key.type, _format_default(key)) for key in section.keys]
    return f"{_about(section)}\n{format_table(rows, left=3)}"


def _about(section: KeySection) -> str:
    where = ", ".join(path for path in section.paths if path) or "recipe"
    return f"{where}: {_plain(section.text)}"


def _format_key(key: Key, paths: Sequence[str]) -> str:
    """Write a key with its type, default and meaning."""
    text = fill_lines(_plain(key.text)).replace("\n", "\n    ")
    return f"{', '.join(paths)}\n    {_plain(key.type)}; {_format_default(key)}\n    {text}"


def _format_default(key: Key) -> str:
    return "must be given" if key.default is None else f"default: {key.default}"


def _plain(text: str) -> str:
    """Take the marks of reStructuredText out of a text, and put YAML's words for Python's."""
    text = re.sub(r":\w+:`~?([^`]+)`", r"\1", " ".join(text.split()))
    return text.replace("``None``", "null").replace("`", "")
