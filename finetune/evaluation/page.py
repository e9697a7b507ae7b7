"""The report as one HTML page, with its pictures inside and nothing from elsewhere."""

import base64
import io
from collections.abc import Iterator, Mapping
from html import escape
from pathlib import Path

from PIL import Image

from adapters.arguments import Scale, format_scales
from finetune.evaluation.drawing import BASE, Group
from finetune.evaluation.results import CEILING, VARIANTS, Results
from finetune.evaluation.scoring import MEANINGS, TITLES, Scores
from finetune.evaluation.verdict import write_verdict

PICTURE_PX, PHOTO_PX = 240, 90
"""The largest sides of embedded pictures; the files next to the page have them in full."""

PHOTOS = 24
"""The number of training pictures shown together; the nearest ones are next to pictures too."""

QUALITY = 85
"""The quality of embedded pictures, which are JPEG."""

GROUPS: dict[Group, str] = {
    "subject": "Prompts with the subject",
    "others": "Prompts without the subject",
    "class": "Prompts of the subject's class",
}
"""The titles of the groups of prompts."""

SMALLER_IS_BETTER = ("pres", "copied", "frechet")

NEUTRAL = ("nearest",)
"""The scores whose changes are neither good nor bad."""


def write_page(report: Results) -> str:
    """Write the page: scores, their meanings, training pictures, and all pictures by prompt."""
    more = len(report.photos) - PHOTOS
    title = escape(f"{report.recipe}: evaluation")
    style = Path(__file__).with_name("report.css").read_text(encoding="utf-8")
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{title}</title>",
        f"<style>\n{style}{''.join(_photo_styles(report))}</style></head><body>",
        f"<h1>{title}</h1>",
        f'<p class="verdict">{escape(write_verdict(report))}</p>',
        f'<p class="faint">{escape(_describe(report))}</p>',
        *_score_table(report),
        "<h2>Training pictures</h2>",
        '<div class="photos">',
        *(_photo(report, number) for number in range(min(len(report.photos), PHOTOS))),
        "</div>",
        f'<p class="faint">and {more} more</p>' * (more > 0),
        *_pictures(report),
        "<h2>What the scores mean</h2><dl>",
        *(
            f"<dt>{escape(report.title(name))}</dt><dd>{escape(MEANINGS[name])}</dd>"
            for name in _shown(report)
        ),
        "</dl>",
        '<p class="faint">Arrows show which way is better.'
        f" {escape(report.explain_intervals())} Below them are changes"
        " from the base, coloured where the interval of the pairs (all variants draw from the same"
        " seeds) leaves out zero.</p>",
        "</body></html>",
    ]
    return "\n".join(parts) + "\n"


def _describe(report: Results) -> str:
    models = " and ".join(report.encoders.values())
    adapters = ", ".join(
        f"{name} at {_describe_scale(scale)}" for name, scale in report.adapters.items()
    )
    drawn = f"{len(report.shots)} pictures for each variant, scored by {models}."
    return f"{drawn} Adapters: {adapters or 'none'}."


def _describe_scale(scale: Scale) -> str:
    return format_scales(scale) if isinstance(scale, Mapping) else f"{scale:g}"


def _shown(report: Results) -> list[str]:
    """List the scores that are defined for some variant."""
    return [n for n in TITLES if any(scores.get(n) for scores in report.variants.values())]


def _score_table(report: Results) -> Iterator[str]:
    heads = [VARIANTS[name] + " (floor)" * (name == BASE) for name in report.variants]
    heads = [escape(head) for head in [*heads, f"{CEILING} (ceiling)"]]
    yield '<div class="scroll"><table class="scores"><thead><tr><th></th>'
    yield "".join(f"<th>{head}</th>" for head in heads)
    yield "</tr></thead><tbody>"
    for name in _shown(report):
        cells = [
            f"{_score(scores, name)}{_change(report, variant, name)}"
            for variant, scores in report.variants.items()
        ]
        cells.append(_score(report.ceiling, name))
        yield f"<tr><th>{escape(report.title(name))}{_direction(name)}</th>"
        # narrow screens show the heads in the cells, see report.css
        for head, cell in zip(heads, cells, strict=True):
            yield f'<td data-of="{head}">{cell}</td>'
        yield "</tr>"
    yield "</tbody></table></div>"


def _direction(name: str) -> str:
    """Return an arrow to where a score should go."""
    if name in NEUTRAL:
        return ""
    return "&nbsp;↓" if name in SMALLER_IS_BETTER else "&nbsp;↑"


def _score(scores: Scores, name: str) -> str:
    score = scores.get(name)
    if score is None:
        return ""
    interval = "" if score.low is None else f"<small>{score.low:.3f} to {score.high:.3f}</small>"
    return f"{score.value:.3f}{interval}"


def _change(report: Results, variant: str, name: str) -> str:
    """Format the change from the base, coloured if its interval leaves out zero."""
    change = report.changes.get(variant, {}).get(name)
    if change is None:
        return ""
    colour = ""
    certain = change.low is not None and change.high is not None and change.low * change.high > 0
    if certain and name not in NEUTRAL:
        better = (change.value > 0) != (name in SMALLER_IS_BETTER)
        colour = ' class="good"' if better else ' class="bad"'
    interval = "" if change.low is None else f" ({change.low:+.3f} to {change.high:+.3f})"
    return f"<small{colour}>{change.value:+.3f}{interval}</small>"


def _pictures(report: Results) -> Iterator[str]:
    for group, title in GROUPS.items():
        rows: dict[int, list[int]] = {}
        for number, shot in enumerate(report.shots):
            if shot.group == group:
                rows.setdefault(shot.place, []).append(number)
        if rows:
            yield f"<h2>{escape(title)}</h2>"
        for numbers in rows.values():
            yield f'<section class="row"><h3>{escape(report.shots[numbers[0]].prompt)}</h3>'
            yield f'<div class="variants" style="--count: {len(report.variants)}">'
            for variant in report.variants:
                yield f'<div><h4>{escape(VARIANTS[variant])}</h4><div class="shots">'
                yield from (_figure(report, variant, number) for number in numbers)
                yield "</div></div>"
            yield "</div></section>"


def _figure(report: Results, variant: str, number: int) -> str:
    sample, shot = report.samples[variant][number], report.shots[number]
    score = report.picture_scores[variant][number]
    text = f"seed {shot.seed}<br>CLIP-T {score.clip_t:.3f}<br>nearest {score.similarity:.3f}"
    if sample.flagged:
        text = f"seed {shot.seed}<br>blackened by the safety checker, not scored"
    alternative = escape(f"{VARIANTS[variant]}: {shot.prompt}")
    source = embed_picture(sample.final, PICTURE_PX)
    return (
        f'<figure><img src="{source}" alt="{alternative}" loading="lazy">'
        f"<figcaption>{_photo(report, score.nearest)}<span>{text}</span></figcaption></figure>"
    )


def _photo(report: Results, number: int) -> str:
    """Show a training picture, which the style sheet holds once."""
    source = escape(report.photos[number].source)
    return (
        f'<span class="photo t{number}" role="img" aria-label="{source}" title="{source}"></span>'
    )


def _photo_styles(report: Results) -> Iterator[str]:
    nearest = {score.nearest for scores in report.picture_scores.values() for score in scores}
    for number in sorted({*range(min(len(report.photos), PHOTOS)), *nearest}):
        photo = report.photos[number]
        yield f".t{number} {{ background-image: url({embed_picture(photo.image, PHOTO_PX)}); }}\n"


def embed_picture(picture: Image.Image, size_px: int) -> str:
    """Encode a picture as a data URI, reduced to ``size_px``."""
    small = picture.convert("RGB")
    small.thumbnail((size_px, size_px), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
