"""Memory of a run, estimated: against the real step, and as a person asks for it."""

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate import Accelerator
from diffusers import IFPipeline
from torch.utils.flop_counter import flop_registry

from adapters.base.estimates import PROMPT_TOKENS, drawing_inputs, safety_checker_bytes
from adapters.base.source import Source
from adapters.errors import UserError
from adapters.weights.kinds import AdapterSpec
from finetune import plan as command
from finetune import train
from finetune.memory import footprint
from finetune.memory.fit import explain_out_of_memory, fit, fitting_settings, plan
from finetune.memory.footprint import Rehearsal
from finetune.memory.report import format_plan
from finetune.recipe.file import load_recipe
from finetune.recipe.schema import OutputPrior, Recipe, Training
from finetune.run.trainee import Trainee
from finetune.step.inputs import Batch
from finetune.step.stages import STAGES, Stage
from tests.builders.commands import refusal
from tests.builders.random_cascade import RandomCascade
from tests.builders.small_runs import trainee_of
from unets import tally
from unets.loading import blank_unet
from unets.tally import GIB, Tally, reserved

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def no_workspace(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU's libraries keep is far more than all of these tiny models."""
    monkeypatch.setattr(tally, "WORKSPACE_BYTES", 0)


@pytest.fixture
def counted_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """Count a CPU's attention as the one that stands for a GPU's."""
    aten = torch.ops.aten
    for own, known in (
        ("_for_cpu", aten._scaled_dot_product_flash_attention),
        ("_for_cpu_backward", aten._scaled_dot_product_flash_attention_backward),
    ):
        operation = getattr(aten, f"_scaled_dot_product_flash_attention{own}")
        monkeypatch.setitem(flop_registry, operation, flop_registry[known])


@pytest.fixture
def recipe(random_cascade: RandomCascade, tmp_path: Path) -> Recipe:
    return Recipe.model_validate(tree(random_cascade, tmp_path))


def tree(cascade: RandomCascade, folder: Path) -> dict[str, Any]:
    return {
        "name": "planned",
        "base": {"stage_1": str(cascade.stage_1), "stage_2": str(cascade.stage_2)},
        "data": {"source": "datasets/octopus", "prompt": "a photo"},
        "prior": {"prompts": ["a photo"], "count": 4},
        "stage_1": {"steps": 10, "batch_size": 4, "accumulation": 2},
        "stage_2": {"steps": 10, "batch_size": 2},
        "validation": {"prompts": ["a cat"]},
        "runs_dir": str(folder / "runs"),
        "cache_dir": str(folder / "cache"),
    }


def changed(recipe: Recipe, stage: int, **fields: Any) -> Recipe:
    name = STAGES[stage].name
    section = recipe.training(STAGES[stage]).model_copy(update=fields)
    return recipe.model_copy(update={name: section})


def rehearse(recipe: Recipe, stage: int, device: torch.device = GPU) -> Rehearsal:
    return Rehearsal.of(*section(recipe, stage), device)


def section(recipe: Recipe, stage: int) -> tuple[Stage, Training, dict[int, Source]]:
    sources = {number: recipe.source(each) for number, each in STAGES.items()}
    return STAGES[stage], recipe.training(STAGES[stage]), sources


def real(blank: Batch) -> Batch:
    return Batch(
        **{
            name: torch.ones(t.shape, dtype=t.dtype) * 0.5
            if t.is_floating_point()
            else torch.full(t.shape, 500)
            for name, t in blank.tensors().items()
        }
    )


def test_a_tally_counts_what_lives_at_once_and_no_views() -> None:
    given = torch.zeros(1024)
    with Tally([given]) as tally:
        one = given + 1
        two = one.view(32, 32).T
        del one
        two = two @ two
        _ = given * 2
    assert tally.peak_bytes == 3 * 4096 - 4096  # of the sum, the product and the double: two
    assert tally.flops == 2 * 32**3
    assert tally.operations == 3
    assert tally.moved_bytes == (2 + 3 + 2) * 4096


def test_operations_that_are_looked_up_count_as_those_that_are_run(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    rehearsal = rehearse(changed(recipe, 2, precision="nf4"), 2)
    rehearsal.footprint()  # what is made once
    looked_up = [rehearsal.footprint(), rehearsal.footprint()]
    monkeypatch.setattr(tally, "_run", lambda operation, args, kwargs: operation(*args, **kwargs))
    assert looked_up == [rehearsal.footprint()] * 2


@pytest.mark.usefixtures("counted_attention")
@pytest.mark.parametrize("precision", ["fp32", "nf4", "int8"])
@pytest.mark.parametrize("stage", [1, 2])
def test_a_rehearsal_takes_what_the_real_step_takes(
    recipe: Recipe, stage: int, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(footprint, "PROMPT_TOKENS", 7)  # so that little of it is attention
    recipe = changed(recipe, stage, precision=precision)
    rehearsal = rehearse(recipe, stage, CPU)
    foreseen = rehearsal.footprint()
    trainee = trainee_of(recipe, stage)
    batch = real(rehearsal.batch(trainee.training.batch_size))
    weights = trainee.weights
    resident = [
        *trainee.unet.state_dict().values(),
        *(weights.values, weights.gradient, weights.working, weights.working_gradient),
        *batch.tensors().values(),
    ]
    trainee.accumulate(batch)  # what is made once, such as lazily built tables
    with Tally(resident) as taken:
        trainee.accumulate(batch)
    assert foreseen.activations == pytest.approx(taken.peak_bytes, rel=0.05)
    assert foreseen.flops == pytest.approx(taken.flops, rel=0.1)
    own = set(weights.parameters)
    stored = sum(t.nbytes for n, t in trainee.unet.state_dict().items() if n not in own)
    assert foreseen.weights == stored


def test_what_saves_memory_is_foreseen_to(recipe: Recipe) -> None:
    def taken(**fields: Any) -> Any:
        return rehearse(changed(recipe, 1, **fields), 1).footprint()

    assert taken(precision="nf4").weights < taken(precision="int8").weights < taken().weights
    assert taken(gradient_checkpointing=True).activations < taken().activations
    assert taken(gradient_checkpointing=True).flops > taken().flops
    assert taken(batch_size=2).activations < 0.75 * taken(batch_size=4).activations
    assert taken(batch_size=2).work < taken(batch_size=4).work
    assert taken(ema_decay=0.9).adapter > taken().adapter


def test_a_rehearsal_draws_nothing(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training goes on beside it, with draws of its own."""
    before = torch.get_rng_state()
    monkeypatch.delattr(torch.random, "fork_rng")
    for kind in ("lora", "dora", "loha", "lokr", "oft"):
        spec = AdapterSpec(kind=kind, targets="attention", dropout=0.1)
        rehearse(changed(recipe, 1, adapter=spec), 1).footprint()
    assert torch.equal(before, torch.get_rng_state())


def test_prompts_have_as_many_tokens_as_the_pipeline_pads_to(random_cascade: RandomCascade) -> None:
    pipe = IFPipeline.from_pretrained(random_cascade.stage_1, unet=None)
    pipe.tokenizer.model_max_length = 13
    encoding, _ = pipe.encode_prompt("a cat", do_classifier_free_guidance=False)
    assert encoding.shape[1] == PROMPT_TOKENS


def test_every_phase_of_the_run_is_planned(recipe: Recipe) -> None:
    whole = plan(recipe).phases
    names = [phase.name for phase in whole]
    assert names == [
        "encoding captions",
        "class pictures",
        *("stage_1, training", "stage_1, validation", "stage_1, samples through stage_2"),
        *("stage_2, stage_1's samples", "stage_2, training", "stage_2, validation"),
    ]
    of_stage_2 = plan(recipe.model_copy(update={"stage_1": None}))
    assert [phase.name for phase in of_stage_2.phases] == [*names[:2], *names[5:]]
    assert of_stage_2.phases[1:3] == whole[1:2] + whole[5:6]
    alone = plan(recipe.model_copy(update={"stage_2": None}))
    assert [phase.name for phase in alone.phases] == names[:5]
    assert alone.phases[4] == whole[4]  # also of a Stage II that is not trained
    never = recipe.validation.model_copy(update={"through_stage_2": "never"})
    unseen = plan(recipe.model_copy(update={"validation": never}))
    assert [phase.name for phase in unseen.phases] == [*names[:4], *names[5:]]
    without = recipe.model_copy(update={"prior": None})
    assert "class pictures" not in [phase.name for phase in plan(without).phases]


PRESERVING = OutputPrior(kind="output", prompts=("a photo",))


def test_a_rehearsal_counts_the_bases_predictions_that_are_preserved(recipe: Recipe) -> None:
    """Their work, and no memory, as they are made before any activation is kept."""
    rehearsal = rehearse(recipe, 1)
    preserving = Rehearsal.of(*section(recipe, 1), GPU, PRESERVING)
    for size, accumulation, counts in ((8, 1, {2: 1}), (2, 4, {0: 2, 1: 2})):
        assert preserving.preserved_counts(size, accumulation) == counts
        without, with_base = (
            each.footprint(size, accumulation) for each in (rehearsal, preserving)
        )
        forwards = sum(n * base_flops(rehearsal, preserved) for preserved, n in counts.items())
        added = with_base.flops - without.flops
        assert added == pytest.approx(forwards / accumulation, rel=0.01)
        assert 0.05 < added / without.flops < 0.15  # a quarter of the pictures, a third of a pass
        assert with_base.work > without.work
        assert with_base.activations == pytest.approx(without.activations, rel=0.01)


def base_flops(rehearsal: Rehearsal, pictures: int) -> float:
    """The operations of the base's forward pass, half of those with guidance."""
    unet = blank_unet(rehearsal.trainee.unet.config, "bf16", GPU)
    with torch.no_grad(), Tally() as taken:
        unet(**drawing_inputs(unet, max(pictures, 1)))
    return taken.flops / 2 if pictures else 0


@pytest.mark.usefixtures("counted_attention")
def test_a_real_step_that_preserves_takes_what_was_foreseen(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(footprint, "PROMPT_TOKENS", 7)
    recipe = changed(recipe, 1, precision="fp32", batch_size=4, accumulation=1)
    preserving = Rehearsal.of(*section(recipe, 1), CPU, PRESERVING)
    foreseen, trainee = preserving.footprint(), trainee_of(recipe, 1)
    batch = replace(real(preserving.batch(4)), preserved=torch.tensor([3]))
    trainee.accumulate(batch)
    weights = trainee.weights
    resident = [*trainee.unet.state_dict().values(), weights.values, weights.gradient]
    with Tally([*resident, *batch.tensors().values()]) as taken:
        trainee.accumulate(batch)
    assert foreseen.activations == pytest.approx(taken.peak_bytes, rel=0.05)
    assert foreseen.flops == pytest.approx(taken.flops, rel=0.1)


def test_preserving_the_output_takes_no_phase_of_its_own(recipe: Recipe) -> None:
    preserving = plan(recipe.model_copy(update={"prior": PRESERVING}))
    without = plan(recipe.model_copy(update={"prior": None}))
    assert [p.name for p in preserving.phases] == [p.name for p in without.phases]
    assert preserving.peak.bytes == pytest.approx(without.peak.bytes, rel=0.01)
    row = next(r for r in format_plan(preserving).splitlines() if r.startswith("of these"))
    assert row.split()[-2:] == ["2", "1"]
    assert "of these" not in format_plan(without)


def test_a_stage_that_is_not_trained_is_planned_without_the_others_adapter(recipe: Recipe) -> None:
    recipe = recipe.model_copy(update={"stage_1": None, "prior": None})
    taken = []
    for targets in ("class_embedding.linear_1", "*"):  # Stage I has no such module
        spec = AdapterSpec(kind="lora", rank=64, targets=targets)
        planned = plan(changed(recipe, 2, adapter=spec))
        samples = next(phase for phase in planned.phases if phase.name.endswith("samples"))
        taken.append(samples.bytes - reserved(planned.choices[STAGES[2]].footprint.resident))
    assert taken[0] == pytest.approx(taken[1], abs=1)


def test_a_safety_checker_visits_while_pictures_are_drawn(
    guarded_cascade: RandomCascade, tmp_path: Path
) -> None:
    guarded = Recipe.model_validate(tree(guarded_cascade, tmp_path) | {"stage_2": None})
    rehearsal = rehearse(guarded, 1)
    checker = safety_checker_bytes(guarded.source(STAGES[1]), torch.bfloat16)
    assert rehearsal.guard_bytes == checker > 0
    unguarded = replace(rehearsal, guard_bytes=0)
    assert rehearsal.drawing_bytes(2) - unguarded.drawing_bytes(2) == rehearsal.guard_bytes
    class_pictures = plan(guarded).phases[1].bytes
    assert class_pictures == reserved(rehearsal.weights_bytes + rehearsal.drawing_bytes(4))


def test_settings_that_fit_are_sorted_by_time_and_keep_the_pictures_a_step(recipe: Recipe) -> None:
    choices = fitting_settings(*section(recipe, 1), 10 * GIB)
    fastest = choices[0].training
    assert (fastest.precision_on(GPU), fastest.gradient_checkpointing) == ("bf16", False)
    assert fastest.batch_size == 8  # the two batches of 4 in one
    for choice in choices:
        assert choice.training.batch_size * choice.training.accumulation == 8
        assert choice.footprint.reserved <= 10 * GIB
    times = [choice.training.accumulation * choice.footprint.work for choice in choices]
    assert times == sorted(times)
    least = min(choice.footprint.reserved for choice in choices)
    tight = fitting_settings(*section(recipe, 1), least)
    assert tight
    assert all(choice.training.batch_size >= 2 for choice in tight)  # a class picture in each
    assert fitting_settings(*section(recipe, 1), least / 8) == []


def test_overrides_to_paste_fit_the_budget(random_cascade: RandomCascade, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(tree(random_cascade, tmp_path)))
    recipe = load_recipe(file, ["stage_2=null", "base.stage_2=null"])
    whole = plan(recipe).peak.bytes
    found = fit(recipe, budget := 0.97 * whole)
    assert found.overrides
    pasted = load_recipe(file, ["stage_2=null", "base.stage_2=null", *found.overrides])
    assert pasted == found.plan.recipe
    assert plan(pasted).peak.bytes <= budget < whole


def test_the_command_needs_no_weights_and_no_gpu(
    random_cascade: RandomCascade, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for stage in (random_cascade.stage_1, random_cascade.stage_2):
        for config in stage.rglob("*.json"):
            copy = tmp_path / stage.name / config.relative_to(stage)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(config.read_bytes())
    planned = tree(random_cascade, tmp_path) | {"stage_2": None}
    planned["base"] = {name: str(tmp_path / name) for name in ("stage_1", "stage_2")}
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(planned))
    command.main([str(file), "stage_1.precision=nf4"])
    printed = capsys.readouterr().out
    assert "frozen weights" in printed
    assert "At most" in printed
    assert ("this machine has none" in printed) is not torch.cuda.is_available()
    command.main([str(file), "--vram", "2GB"])
    assert "stage_1.batch_size=8 stage_1.accumulation=1" in capsys.readouterr().out
    one = ["stage_1.batch_size=1", "stage_1.accumulation=1", "prior=null"]
    command.main([str(file), "--vram", "0.5001", *one])
    assert "No settings of this recipe fit" in capsys.readouterr().out


@pytest.mark.parametrize("vram", ["", "much", "8XB", "0.1GB", "-3"])
def test_a_size_that_is_none_is_said_to_be_none(
    vram: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        command.main(["recipes/quickstart.yaml", f"--vram={vram}"])
    assert f"(got '{vram}')" in capsys.readouterr().err


def test_out_of_memory_ends_in_overrides_that_fit(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = changed(recipe, 1, batch_size=2, accumulation=1)
    recipe = recipe.model_copy(update={"stage_2": None})
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 0)
    peak = plan(recipe).peak.bytes
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2 * peak, 10 * GIB))
    message = str(explain_out_of_memory(recipe, GPU))  # by calculation it should have fitted
    assert message.partition("overrides ")[2].rstrip(".").split()
    assert "\n" not in message
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (peak / 100, 10 * GIB))
    assert "use a smaller base" in str(explain_out_of_memory(recipe, GPU))


def test_a_run_that_is_out_of_memory_says_what_fits(
    random_cascade: RandomCascade,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(Trainee, "update", full)
    monkeypatch.setattr(
        "finetune.memory.fit.explain_out_of_memory",
        lambda recipe, device: UserError("give overrides"),
    )
    planned = tree(random_cascade, tmp_path)
    planned |= {"prior": None, "validation": {}, "stage_2": None}
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(planned))
    with pytest.raises(SystemExit, match="2"):
        train.main([str(file)])
    printed = capsys.readouterr()
    assert "error: give overrides" in printed.err.replace("\r", "\n").splitlines()
    assert "Main memory in training, GiB" in printed.out
    assert "Python and its libraries take" in printed.out
    assert "CUDA" not in printed.out


def test_nothing_computes_beside_the_steps(
    random_cascade: RandomCascade, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # with one more thread that has computed, OpenMP counts more threads than two cores: those of
    # the steps sleep between operations, and a step takes twice the time
    begun = {thread.ident for thread in threading.enumerate()}
    beside: list[str] = []

    def look(*_: object, **__: object) -> None:
        beside.extend(each.name for each in threading.enumerate() if each.ident not in begun)

    monkeypatch.setattr("finetune.run.stage_run.train_stage", look)
    planned = tree(random_cascade, tmp_path) | {"prior": None, "validation": {}}
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(planned))
    train.train(load_recipe(file), Accelerator(cpu=True))
    assert [name for name in beside if "Pool" in name] == []


def test_the_command_and_the_trainer_talk_of_the_same_memory(
    random_cascade: RandomCascade, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree(random_cascade, tmp_path)))
    command.main([str(path), "--device", "cpu"])
    shown = capsys.readouterr().out
    assert shown.startswith("Main memory in training")
    train.print_plan(load_recipe(path), CPU)
    assert capsys.readouterr().out.strip() in shown
    if not torch.cuda.is_available():
        command.main([str(path)])
        assert "this machine has none, and would train in main memory" in capsys.readouterr().out
    assert "leave out --device cpu" in refusal(
        capsys, command.main, path, "--device", "cpu", "--vram", "8GB"
    )
