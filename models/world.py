"""The world of the embedded cascade: its objects, backgrounds and captions.

A scene is one object of the Noto Color Emoji font on one of 12 named colours, plain or in one of
three patterns: "a cat face on a blue striped background". Objects belong to classes ("animal"),
and a caption may name the class instead of the object. `HELD_OUT` objects are never shown to the
cascade: they are the subjects to fine-tune on.
"""

import unicodedata
from dataclasses import dataclass

from adapters.errors import UserError

CLASSES = {
    "animal": "🐱🐶🐭🐰🦊🐻🐼🐯🦁🐮🐷🐸🐵🐧🦆🦅🦉🦇🐺🦄🐝🦋🐌🐞🐜🦂🐢🐍🦖🐙🦐🦀🐡🐠🐬🦈🐊🦓🦍🐘"
    "🐪🦒🐑🐓🦃🦚🦜🦢🦩🦔",
    "fruit": "🍎🍐🍊🍋🍌🍉🍇🍓🍒🍑🍍🥥🥝",
    "vegetable": "🍅🍆🥑🥦🌶🌽🥕🧄🧅",
    "food": "🥐🍞🥨🧀🍳🥞🥓🍗🌭🍔🍟🍕🌮🍝🍣🍙🍦🍩🍪🎂🍫🍬🍭🍿🍯",
    "drink": "☕🥛🍷🍺🍹",
    "plant": "🌵🌲🌴🌳🌻🌷🌹🌸🌺🍁🍀🍄🌱",
    "vehicle": "🚗🚌🚑🚒🚜🚲🏍🚂✈🚁🚀⛵🚢🛸🚤🚚🏎",
    "building": "🏠🏰⛪🕌⛺🏭🎪",
    "instrument": "🎸🎹🥁🎺🎻🎷🎤🔔",
    "toy": "⚽🏀🏈⚾🎱🎳🏓🥊🎯🎲🧩🧸🎈🛹",
    "garment": "👑🎩👒👓👕👖👗👟👠🥾🧤🧦👜🎒☂🧢💍👔",
    "tool": "🔨🪓🔧🪚✂🔑🔒🧲🔍⚓💡🧯🔬✏🖌📌",
    "device": "📷📺💻📱☎🎧🔋💾⌚⏰🎮",
    "thing": "🎁📚✉🪑🛋🛏🚪🚽🧺🏺🏆🏮💎🎨⌛🚩🛒",
    "character": "😀😎😡🤡👻👽🤖💀🎃⛄👹🎅",
    "symbol": "☀🌙⭐🌈🔥❄🌋🌍⚡❤",
}
"""The objects of each class, by the noun that names it."""

HELD_OUT = "🐙🦜🍍🍩🌵🚀🎸🧸⏰🤖🍄👑"
"""Subjects that the cascade never sees in training."""

NAMES = {
    "🐞": "ladybug", "🦐": "shrimp", "🐪": "camel", "🍎": "apple",
    "🍊": "tangerine", "🍆": "eggplant", "🌶": "chili pepper", "🌽": "corn", "🧀": "cheese",
    "🍳": "fried egg", "🍗": "drumstick", "🍟": "french fries", "🍕": "pizza", "🍦": "ice cream",
    "🎂": "birthday cake", "🍿": "popcorn", "☕": "coffee cup", "🥛": "glass of milk",
    "🌲": "fir tree", "🌳": "leafy tree", "🍀": "clover", "🚗": "car", "🚒": "fire engine",
    "🏍": "motorcycle", "🚂": "locomotive", "🚚": "truck", "🏠": "house", "🏰": "castle",
    "🎹": "piano keyboard", "🥁": "drum", "🎱": "eight ball", "🎯": "target",
    "🏓": "ping pong paddle", "🎲": "die", "🧩": "puzzle piece", "👒": "straw hat",
    "👓": "glasses", "👕": "shirt", "👟": "sneaker", "👠": "high heel", "🥾": "boot",
    "🎒": "backpack", "🧢": "cap", "✂": "scissors", "🔍": "magnifying glass", "💡": "light bulb",
    "🖌": "paintbrush", "☎": "telephone", "🎮": "game controller",
    "🎁": "gift", "🛋": "couch", "🏺": "vase", "🏮": "paper lantern",
    "💎": "gem", "💻": "laptop", "🦓": "zebra", "🦒": "giraffe", "🎨": "palette",
    "🚩": "flag", "🛒": "shopping cart", "😎": "cool face",
    "😡": "angry face", "👽": "alien", "🤖": "robot", "🎃": "pumpkin", "⛄": "snowman",
    "👹": "ogre", "🎅": "santa", "☀": "sun", "⭐": "star", "🌍": "globe", "⚡": "lightning",
    "❤": "heart", "🦖": "t-rex", "🍙": "rice ball", "⚽": "soccer ball", "🏈": "football",
    "🏀": "basketball", "⚾": "baseball", "🔔": "bell", "🍭": "lollipop",
    "🌙": "crescent moon", "📚": "books", "📱": "phone", "🎧": "headphones",
    "🚽": "toilet", "🔑": "key", "🔒": "lock", "🪚": "saw",
    "🍷": "wine glass", "🍹": "cocktail", "🌸": "cherry blossom",
    "✏": "pencil", "🚢": "ship", "🏎": "racing car",
}  # fmt: skip
"""Plain words for characters with a clumsy Unicode name."""

PLURAL = {"pancakes", "french fries", "cherries", "grapes", "glasses", "jeans", "gloves", "socks"}
PLURAL |= {"scissors", "books", "headphones"}
UNCOUNTED = {"bacon", "broccoli", "bread", "cheese", "corn", "garlic", "popcorn", "spaghetti"}
UNCOUNTED |= {"sushi", "fire", "lightning", "santa"}

COLOURS = {
    "red": (214, 40, 40),
    "orange": (247, 140, 20),
    "yellow": (250, 220, 50),
    "green": (60, 170, 70),
    "teal": (20, 150, 150),
    "blue": (40, 90, 215),
    "purple": (130, 60, 180),
    "pink": (250, 150, 190),
    "brown": (125, 80, 45),
    "black": (25, 25, 28),
    "gray": (135, 135, 140),
    "white": (246, 246, 246),
}
"""The background colours by name, in sRGB, 0..255."""

CONNECTIVES = ("a", "an", "the", "of", "on", "in", "with", "photo", "background", "sks")
"""The captions' other words, and the identifier for subjects to teach."""

PATTERNS = ("plain", "striped", "checkered", "dotted")


@dataclass(frozen=True, kw_only=True)
class Thing:
    """One object of the world."""

    character: str
    name: str
    noun: str
    """The object's class, such as "animal"."""
    held_out: bool


def _name(character: str) -> str:
    return NAMES.get(character) or unicodedata.name(character).lower()


THINGS = tuple(
    Thing(character=c, name=_name(c), noun=noun, held_out=c in HELD_OUT)
    for noun, characters in CLASSES.items()
    for c in characters
)
SEEN = tuple(i for i, thing in enumerate(THINGS) if not thing.held_out)
"""Indices into `THINGS` of the objects that the cascade is trained on."""

BACKGROUNDS = tuple((colour, pattern) for colour in COLOURS for pattern in PATTERNS)


def with_article(words: str, singular: str | None = None) -> str:
    """Turn "cat face" into "a cat face", "apple" into "an apple"; "books" stays.

    `singular` is the noun that decides whether an article is needed, `words` by default.
    """
    if (singular or words) in PLURAL | UNCOUNTED:
        return words
    return f"{'an' if words[0] in 'aeiou' and not words.startswith('uni') else 'a'} {words}"


def describe_background(background: int) -> str:
    """Describe a background, as in "blue striped background", or "blue background" if plain."""
    colour, pattern = BACKGROUNDS[background]
    return f"{colour} background" if pattern == "plain" else f"{colour} {pattern} background"


def caption(thing: int, background: int, identifier: str = "") -> str:
    """Caption a scene: "a cat face on a blue background", or "a sks cat face …" if identified."""
    name = THINGS[thing].name
    subject = with_article(f"{identifier} {name}".strip(), name)
    return f"{subject} on {with_article(describe_background(background))}"


@dataclass(frozen=True, kw_only=True)
class Form:
    """A way to caption a scene, and how often it is used."""

    text: str
    """The caption with fields {name}, {noun} and {background}, each filled with its article."""
    share: float


FORMS = (
    Form(text="{name} on {background}", share=0.55),
    Form(text="a photo of {name} on {background}", share=0.12),
    Form(text="{noun} on {background}", share=0.08),
    Form(text="a photo of {noun} on {background}", share=0.02),
    Form(text="{name}", share=0.05),
    Form(text="a photo of {name}", share=0.03),
    Form(text="{noun}", share=0.02),
    Form(text="{background}", share=0.03),
    Form(text="", share=0.1),
)
"""The forms of the cascade's training captions; the last is caption dropout."""


def fill(form: str, thing: int, background: int) -> str:
    """Fill in a form for a scene."""
    return form.format(
        name=with_article(THINGS[thing].name),
        noun=with_article(THINGS[thing].noun),
        background=with_article(describe_background(background)),
    )


def parse_caption(text: str) -> tuple[int, int | None]:
    """Find the object and the background that a caption names; `None`: it names no background.

    It understands "a cat face on a blue background", and the same after "a photo of".

    Raises:
        UserError: if the caption names no object of this world, or an unknown background.
    """
    scene = _without_article(text.strip()).removeprefix("photo of ")
    subject, _, place = _without_article(scene).partition(" on ")
    thing = _THING_OF.get(subject)
    background = _BACKGROUND_OF.get(_without_article(place)) if place else None
    if thing is None or (place and background is None):
        raise UserError(
            f"{text!r} is no caption of the embedded world: name an object of models/world.py, with"
            " or without its background, as in 'a cat face on a blue striped background'."
        )
    return thing, background


def _without_article(words: str) -> str:
    return words.removeprefix("an ").removeprefix("a ")


_THING_OF = {thing.name: index for index, thing in enumerate(THINGS)}
_BACKGROUND_OF = {describe_background(index): index for index in range(len(BACKGROUNDS))}


def words() -> list[str]:
    """List every word that a caption of this world may have, sorted, with the identifier "sks"."""
    text = [thing.name for thing in THINGS] + list(CLASSES) + list(COLOURS) + list(PATTERNS[1:])
    return sorted({*" ".join(text).split(), *CONNECTIVES})
