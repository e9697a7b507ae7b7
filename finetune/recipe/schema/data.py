"""The ``data`` section: pictures, captions and crops."""

from finetune.recipe.schema.fields import Fraction, PathText, Section


class Data(Section):
    """The pictures and captions to train on, and the cropping of the pictures."""

    source: PathText
    """A folder of pictures (with ``metadata.jsonl`` or ``.txt`` captions, or none), or anything
    that ``datasets.load_dataset`` takes: a hub name or a local path."""
    config: str | None = None
    """The dataset's configuration, for datasets that have several; ``None``: its default."""
    revision: str | None = None
    """The dataset's hub revision; ``None``: the newest."""
    prompt: str | None = None
    """One caption for all pictures, in which ``{}`` is ``evaluation.identifier``; ``None``: each
    picture has its own."""
    split: str = "train"
    """The split of the dataset."""
    image_column: str = "image"
    """The column that holds the pictures."""
    caption_column: str = "text"
    """The column that holds the captions; not read if ``prompt`` is given."""
    center_shift: Fraction = 0.1
    """The largest shift of the square crop's centre, as a fraction of the crop's side."""
    horizontal_flip: bool = False
    """Mirror half of the pictures, at random."""
    caption_dropout: Fraction = 0.1
    """The share of captions replaced by the empty one, from which guidance leads away."""
