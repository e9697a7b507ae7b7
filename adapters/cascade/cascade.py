"""The cascade: prompts in, the pictures of every stage out, with adapters merged into its UNets.

Shapes: N pictures, S a stage's picture size, s the size of the stage below, T text tokens, D text
width. Pixels are in [-1, 1].
"""

import inspect
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Unpack

import torch
from diffusers import DiffusionPipeline, IFPipeline, StableDiffusionUpscalePipeline
from torch import Tensor

from adapters.arguments import Scale
from adapters.cascade.adapter_set import AdaptedStages, alone
from adapters.cascade.as_trained import AS_TRAINED, find_sampling
from adapters.cascade.checks import check_drawing, check_encodings, check_small_pictures
from adapters.cascade.conditioning import Conditioning, Layout, Options, Prompt, as_texts, lay_out
from adapters.cascade.drawing import Drawn, Request, draw, upscale
from adapters.cascade.embeds import look_up
from adapters.cascade.habits import ARGUMENTS, ATTRIBUTES, check_arguments
from adapters.cascade.memory_budget import TEXT
from adapters.cascade.offload import Placement
from adapters.cascade.overview import COLUMNS, precision_of, tabulate, to_html
from adapters.cascade.provenance import PictureInfo, signed, used_adapters
from adapters.cascade.redraw import WAYS, Given, Redraw, Way, read_pictures
from adapters.cascade.results import CascadeImages
from adapters.cascade.sampling import Sampling
from adapters.errors import UserError, print_once, quote
from adapters.pictures.reading import as_pixels
from adapters.tables import format_table
from adapters.texts import KEEP_IN_PYTHON, check_captions, check_texts, check_vocabulary


@dataclass(kw_only=True)
class Cascade(AdaptedStages):
    """Stages I to III, each optional, one text encoder for I and II, and merged adapters."""

    upscaler: StableDiffusionUpscalePipeline | None
    """Stage III, with its own text encoder."""
    text: IFPipeline | None
    """The tokenizer and text encoder of Stage I and II; ``None``: ``embeds`` must be given."""
    placing: Placement
    """The places of the cascade's parts."""
    revision: str | None = None
    """The hub revision of Stage I and II, recorded in saved pictures."""
    variant: str | None = None
    """The variant of their weights, recorded in saved pictures."""

    def __repr__(self) -> str:
        return format_table(self._overview(), left=len(COLUMNS))

    def _repr_html_(self) -> str:
        return to_html(self._overview())

    def _overview(self) -> list[Sequence[str]]:
        return tabulate(self._pipelines(), self.text, self.base_names, self.merged)

    def _pipelines(self) -> dict[int, DiffusionPipeline]:
        """Gather the pipelines of all stages, by number."""
        return dict(self.stages) | ({} if self.upscaler is None else {3: self.upscaler})

    def __getattr__(self, name: str) -> Any:
        if name in ATTRIBUTES:
            raise AttributeError(f"a Cascade has no {name}: {ATTRIBUTES[name]}")
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    @alone
    def __call__(
        self,
        /,
        prompt: Prompt,
        *,
        stage_2_prompt: Prompt | None = None,
        stage_3_prompt: Prompt | None = None,
        negative_prompt: Prompt | None = None,
        seed: int | Sequence[int] = 0,
        images_per_prompt: int = 1,
        sampling: Sampling | Literal["as_trained"] | None = None,
        low_res: Given | Tensor | None = None,
        redraw: Redraw | None = None,
        embeds: Mapping[str, Tensor] | None = None,
        clean_caption: bool = True,
        progress: bool | str = True,
        **habits: object,
    ) -> CascadeImages:
        """Sample pictures for prompts.

        Each picture has random generators of its own, so it does not depend on its neighbours in a
        batch (beyond rounding), and Stage II's noise does not depend on Stage I's steps.

        Args:
            prompt: one prompt, or several.
            stage_2_prompt: Stage II's, one for all prompts or one for each: often the prompt
                without a subject's identifier; ``None``: Stage I's.
            stage_3_prompt: Stage III's, likewise; ``None``: Stage II's.
            negative_prompt: prompts that guidance steers away from, one for all or one for each;
                ``None``: the empty caption.
            seed: the first picture's seed, which goes up by one for each further picture; or one
                seed for each picture.
            images_per_prompt: the number of pictures of each prompt, which follow one another.
            sampling: steps and guidance; ``as_trained``: those that the first of the adapters in
                use was validated with, see :attr:`as_trained`; ``None``: the published pipelines'
                defaults.
            low_res: square pictures to enlarge, their files, or [N, 3, s, s] in [-1, 1], one for
                all prompts or one for each; Stage I is not run.
            redraw: pictures to start from, one for all prompts or one for each; :meth:`img2img`
                and :meth:`inpaint` build it.
            embeds: encodings [T, D] of all prompts of Stage I and II, and of the negative
                prompts (by default the empty caption), such as :func:`load_embeds` reads; ``None``:
                this cascade's text encoder makes them.
            clean_caption: clean prompts as IF's pipelines do by default, which drops words such as
                ``<sks>``, ``j0hn``, ``#3`` and all Chinese; with ``embeds``, whether their prompts
                were cleaned.
            progress: show progress bars; a text: show it before their names.
            **habits: arguments of diffusers' pipelines; each raises an error that says what to do.

        Raises:
            UserError: if there is nothing to draw, cleaning empties a prompt, Stage I is needed and
                absent, a setting exceeds the limit of a stage's scheduler, or numbers or shapes do
                not match.

        Example:
            >>> few = Sampling(stage_1=StageSampling(steps=4), stage_2=StageSampling(steps=2))
            >>> images = cascade("a car on a pink background", images_per_prompt=2, sampling=few)
            >>> images
            CascadeImages(2 pictures, 32 → 128 px, of 'a car on a pink background')
            >>> images[0].save("car.png")
        """
        own = {*inspect.signature(type(self).__call__).parameters} - {"self", "habits"}
        check_arguments(habits, ARGUMENTS, own, "cascade()")
        settings = self._read_sampling(sampling)
        layout, prompts = lay_out(
            {1: prompt, 2: stage_2_prompt, 3: stage_3_prompt}, images_per_prompt
        )
        negative = as_texts(negative_prompt or "")
        check_texts(negative)
        negatives = layout.spread(negative, "negative prompts")
        seeds = layout.seeds(seed)
        if redraw is not None:
            redraw = redraw.take(layout.spread(range(len(redraw)), "pictures to start from"))
        below = None if low_res is None else self._read_below(low_res, layout, redraw)
        self._say_unread(prompts)
        way: Way = "text" if redraw is None else redraw.way
        settings = self.placing.limit(settings or WAYS[way].sampling)
        strength = {} if redraw is None else redraw.strength
        check_drawing(self._pipelines(), settings, below, strength)
        if embeds is None:
            encoded = dict.fromkeys(negatives, "negative_prompt")
            encoded |= dict.fromkeys(prompts[2], "stage_2_prompt")
            encoded |= dict.fromkeys(prompts[1], "the prompt")
            self._check_captions(encoded, clean_caption)
        encodings = {
            texts: self._encodings(texts, embeds, clean_caption)
            for texts in dict.fromkeys([prompts[1], prompts[2], negatives])
        }
        conditioning = Conditioning(
            prompts=prompts,
            prompt_embeds={stage: encodings[prompts[stage]] for stage in (1, 2)},
            negative_prompts=negatives,
            negative_embeds=encodings[negatives],
            seeds=seeds,
            clean_caption=clean_caption,
            redraw=redraw,
        )
        check_encodings(self.stages, conditioning)
        return self._draw(conditioning, settings, below, progress)

    @property
    def as_trained(self) -> Sampling | None:
        """The settings that the adapters in use were validated with in training.

        Each stage has those of the first adapter of that stage, or else of the first adapter; a
        line on standard error says if others differ. ``None``: no adapter in use records any.
        """
        stages = [
            (name, merged.adapters[name].info)
            for name, scales in self.adapters.items()
            for number, merged in self.merged.items()
            if scales.get(number)
        ]
        return find_sampling(stages)

    def _read_sampling(self, sampling: object) -> Sampling | None:
        """Read given settings; a UserError if they are none."""
        if isinstance(sampling, Sampling | None):
            return sampling
        if sampling != AS_TRAINED:
            raise UserError(
                f"sampling must be a Sampling(...) (got {quote(sampling)}); make one, or give"
                f" {AS_TRAINED!r}."
            )
        if (trained := self.as_trained) is None:
            raise UserError(
                f"sampling={AS_TRAINED!r} needs an adapter in use that records the settings of its"
                " training's validation, and none does; give a Sampling(...)."
            )
        return trained

    def img2img(
        self,
        picture: Given,
        prompt: Prompt,
        *,
        strength: Scale | None = None,
        **options: Unpack[Options],
    ) -> CascadeImages:
        """Sample pictures for prompts from given pictures, with diffusers' own pipelines.

        Args:
            picture: one for all prompts, or one for each, all of one size; or their files.
            prompt: one prompt, or several.
            strength: how much to change, above 0 up to 1 (as if from noise), in all stages or by
                stage (``{1: 0.6, 2: 0.9}``); ``None``: the pipelines' own.
            **options: further arguments of :meth:`__call__`.

        Raises:
            UserError: as :meth:`__call__`, and if the pictures' sizes differ, or the strength is
                out of range or leaves no steps.

        Example:
            >>> few = Sampling(stage_1=StageSampling(steps=4), stage_2=StageSampling(steps=2))
            >>> car = cascade("a car on a pink background", sampling=few)[0].final
            >>> cascade.img2img(car, "a bus on a pink background", strength=0.5, sampling=few)
            CascadeImages(1 picture, 32 → 128 px, of 'a bus on a pink background')
        """
        return self(prompt, redraw=Redraw.of(picture, strength=strength), **options)

    def inpaint(
        self,
        picture: Given,
        mask: Given,
        prompt: Prompt,
        *,
        strength: Scale | None = None,
        **options: Unpack[Options],
    ) -> CascadeImages:
        """Draw the masked part of given pictures again, with diffusers' own pipelines.

        Args:
            picture: one for all prompts, or one for each, all of one size; or their files.
            mask: a picture of the same size: white is drawn again, black stays.
            prompt: one prompt, or several.
            strength: as in :meth:`img2img`.
            **options: further arguments of :meth:`__call__`.

        Raises:
            UserError: as :meth:`img2img`, and if there is no mask.
        """
        if mask is None:
            raise UserError("There is no mask; give one, or call img2img to draw all of it again.")
        return self(prompt, redraw=Redraw.of(picture, mask, strength), **options)

    @alone
    def encode(self, prompts: Sequence[str], *, clean_caption: bool = True) -> Tensor:
        """Encode prompts as ``IFPipeline.__call__`` does, into [N, T, D] on the device.

        :func:`adapters.cascade.embeds.save_embeds` saves them for a cascade without a text encoder.

        Raises:
            UserError: if there is no text encoder, or cleaning empties a prompt.
        """
        if self.text is None:
            raise UserError(
                "This cascade was loaded without a text encoder; load it with its text encoder, or"
                " give embeds."
            )
        check_texts(prompts)
        self._check_captions(dict.fromkeys(prompts, "the prompt"), clean_caption)
        with self.placing.at_work(TEXT, self.text):
            embeds, _ = self.text.encode_prompt(
                list(prompts), do_classifier_free_guidance=False, clean_caption=clean_caption
            )
        return embeds

    def _check_captions(self, captions: Mapping[str, str], clean_caption: bool) -> None:
        """Refuse prompts that cleaning empties, and warn of words that others lose."""
        check_captions(captions, clean_caption=clean_caption, setting=KEEP_IN_PYTHON)
        if self.text is not None:
            check_vocabulary(captions, self.text.tokenizer, clean_caption=clean_caption)

    def _say_unread(self, prompts: Mapping[int, Sequence[str]]) -> None:
        """Say which prompts of stages that are not loaded are not read."""
        for stage in (2, 3):
            if stage not in self._pipelines() and prompts[stage] != prompts[stage - 1]:
                print_once(
                    f"stage_{stage}_prompt has no effect: this cascade has no Stage {'I' * stage}."
                )

    def _read_below(self, given: Given | Tensor, layout: Layout, redraw: Redraw | None) -> Tensor:
        """Read pictures to enlarge, [N, 3, s, s] in [-1, 1]; a tensor's shape is checked later."""
        if not isinstance(given, Tensor):
            pictures = read_pictures(given, "A low_res picture")
            size_px = self.stages[1].unet.config.sample_size if 1 in self.stages else None
            check_small_pictures(pictures, size_px, square=redraw is None)
            return as_pixels(layout.spread(pictures, "low_res pictures"))
        if given.dim() != 4:
            return given
        return given[list(layout.spread(range(len(given)), "low_res pictures"))]

    def _encodings(
        self, texts: Sequence[str], embeds: Mapping[str, Tensor] | None, clean_caption: bool
    ) -> Tensor:
        """Encode each picture's text, [N, T, D]; equal texts are encoded once."""
        if embeds is not None:
            return look_up(embeds, texts)
        distinct = list(dict.fromkeys(texts))
        rows = [distinct.index(text) for text in texts]
        return self.encode(distinct, clean_caption=clean_caption)[rows]

    def _draw(
        self,
        conditioning: Conditioning,
        sampling: Sampling,
        low_res: Tensor | None,
        progress: bool | str,
    ) -> CascadeImages:
        """Draw with one stage after another."""
        drawn: dict[int, Drawn] = {}
        pixels = low_res
        for number, pipe in self._pipelines().items():
            if number == 1 and low_res is not None:
                continue
            request = Request(number, conditioning, sampling, pixels, progress)
            try:
                with self.placing.at_work(f"stage_{number}", pipe):
                    if number == 3:
                        drawn[number] = upscale(pipe, request)
                        continue
                    drawn[number] = draw(pipe, request, self.recorded[number])
            except torch.OutOfMemoryError:
                raise _out_of_memory(number, conditioning, sampling) from None
            finally:
                if self.placing.is_scarce:  # graphs take room and point at weights that move
                    self.free_graphs()
            pixels = drawn[number].pixels
        first = drawn[1].pixels if 1 in drawn else low_res
        assert first is not None
        infos = self._infos(conditioning, sampling, drawn)
        pictures = signed({number: each.pictures for number, each in drawn.items()}, infos)
        flags = (each.flagged for each in drawn.values())
        return CascadeImages(
            stage_1=pictures.get(1, ()),
            stage_2=pictures.get(2, ()),
            stage_3=pictures.get(3, ()),
            prompts=tuple(conditioning.prompts[1]),
            seeds=tuple(conditioning.seeds),
            low_res=first.float().cpu(),
            flagged=tuple(any(stages) for stages in zip(*flags, strict=True)),
            infos=infos,
        )

    def _infos(
        self, conditioning: Conditioning, sampling: Sampling, drawn: Collection[int]
    ) -> tuple[PictureInfo, ...]:
        """Describe the settings of each picture, for the stages that drew."""
        info = PictureInfo(
            stage=max(drawn),
            clean_caption=conditioning.clean_caption,
            models={stage: self.base_names[stage] for stage in drawn},
            revision=self.revision,
            variant=self.variant,
            precisions={
                n: precision_of(p.unet) for n, p in self._pipelines().items() if n in drawn
            },
            adapters=used_adapters(self.adapters, self.sources, drawn),
            sampling=sampling,
            way=conditioning.way,
            strength=dict(conditioning.strength),
        )
        prompts = {n: texts for n, texts in conditioning.prompts.items() if n in drawn}
        return tuple(info.of_each(conditioning.seeds, prompts, conditioning.negative_prompts))


def _out_of_memory(stage: int, conditioning: Conditioning, sampling: Sampling) -> UserError:
    count = min(len(conditioning.seeds), sampling.batch_size)
    return UserError(
        f"The GPU ran out of memory while Stage {'I' * stage} drew {count}"
        f" picture{'s' * (count > 1)} at once; give a smaller batch_size in sampling, or load the"
        " cascade for less memory (memory='6GB' is the least for the published sizes)."
    )
