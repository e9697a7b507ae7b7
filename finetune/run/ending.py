"""The end of a run: which weights are exported, and what is said about them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adapters.files.complete import mark_complete, read_infos
from adapters.files.export import export_adapter
from adapters.files.info import AdapterInfo
from adapters.files.model_card import load_samples, write_card
from finetune.run.measures import Measures
from finetune.run.tracking import Tracker
from finetune.run.trainee import Trainee


def export_run(
    trainee: Trainee,
    measures: Measures,
    tracker: Tracker,
    folder: Path,
    info: AdapterInfo,
    settings: Mapping[str, Any],
) -> None:
    """Export the best of a run's validations or else its last step, with a card and samples.

    The mark that the export is complete is written last.

    Args:
        trainee: the run's, after its last step.
        measures: its validations.
        tracker: shows which step is exported, and the row that compares runs.
        folder: the folder of the run's adapters.
        info: the description of the last step's adapter.
        settings: the columns of the table that compares runs.
    """
    step, kept = trainee.step, None
    if measures.best_step is not None:
        step = measures.best_step
        kept = measures.weights_of(step)
    if choice := measures.explain_choice(stopped_early=info.stopped_early):
        tracker.bar.write(f"Stage {info.stage}: {choice}")
        tracker.markdown("exported", choice, trainee.step)
        tracker.curves({"exported/step": step}, trainee.step)
        last = trainee.step if trainee.step > step else None
        info = info.model_copy(update={"step": step, "last_step": last, "choice": choice})
    with trainee.final_weights(kept) as unet:
        tracker.bar.write(export_adapter(unet, folder, info).message)
        samples = measures.draw_exported(step)
    infos = read_infos(folder)
    if info.stage < infos[-1].stage:  # exported again, so the last stage's pictures are there
        samples = load_samples(folder) or samples
    write_card(folder, infos, samples)
    mark_complete(folder)
    figures = measures.figures_at(step)
    exported = {f"exported/{tag.rpartition('/')[2]}": value for tag, value in figures.items()}
    tracker.curves(exported, trainee.step)
    tracker.hparams(settings, exported)
