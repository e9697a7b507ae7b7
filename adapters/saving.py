"""Writing the adapters of several stages as one folder that travels."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from peft import LoraConfig

from adapters.card import write_card
from adapters.errors import UserError
from adapters.export import write_adapter
from adapters.files import new_folder
from adapters.merging import StageAdapter


def save_adapters(adapters: Mapping[int, StageAdapter], folder: Path) -> None:
    """Write LoRAs as :func:`adapters.export.export_adapter` does, with a card where they say whose.

    Args:
        adapters: by stage.
        folder: a new or empty folder; it appears whole.

    Raises:
        UserError: where there is something in it already, the disk refuses, or one is no LoRA.
    """
    for adapter in adapters.values():
        if not isinstance(adapter.config, LoraConfig):
            raise UserError(
                f"{adapter.folder} is of the kind {adapter.kind}, and only LoRAs are written here;"
                " copy the folder that it came from."
            )
    with new_folder(folder) as new:
        for stage, adapter in adapters.items():
            write_adapter(replace(adapter, folder=new / f"stage_{stage}"))
        infos = [adapter.info for adapter in adapters.values() if adapter.info is not None]
        if infos:
            write_card(new, infos)
