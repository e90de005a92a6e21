"""What a family of word problems is made of, and the people and things that stories draw from."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """One kind of story: numbers to draw, phrasings of the question, lines of the worked answer."""

    name: str
    draw: str
    questions: tuple[str, ...]
    working: tuple[str, ...]


_SHE = (
    "Anna Betty Clara Diana Emma Fiona Grace Hannah Ivy Julia "
    "Kate Lily Maria Nora Olivia Paula Rosa Sara Tina Zoe"
)
_HE = (
    "Adam Ben Carlos David Eric Frank George Henry Ivan Jack "
    "Kevin Leo Mark Noah Oscar Peter Ryan Sam Tom Victor"
)

# Name, he, him, his.
NAMES: tuple[tuple[str, str, str, str], ...] = (
    *((name, "she", "her", "her") for name in _SHE.split()),
    *((name, "he", "him", "his") for name in _HE.split()),
)


def _forms(text: str) -> tuple[tuple[str, ...], ...]:
    return tuple(tuple(word.split("/")) for word in text.split())


# Slot names of one noun's forms -> the nouns. Slots in one key are drawn together.
WORDS: dict[tuple[str, ...], tuple[tuple[str, ...], ...]] = {
    ("things",): _forms(
        "apples oranges marbles stickers books pencils cookies shells stamps cards balloons candies coins "
        "buttons flowers beads toys pens eggs muffins cupcakes ribbons crayons magnets"
    ),
    ("thing", "wares"): _forms(
        "pen/pens notebook/notebooks mug/mugs hat/hats shirt/shirts lamp/lamps candle/candles "
        "ticket/tickets scarf/scarves basket/baskets toy/toys plate/plates"
    ),
    ("box", "boxes"): _forms("box/boxes bag/bags basket/baskets jar/jars crate/crates tray/trays"),
    ("food",): _forms("sandwiches salads burgers pies tacos wraps pizzas"),
    ("drink",): _forms("juices sodas coffees teas shakes smoothies"),
    ("animals",): _forms("chickens goats sheep cows ducks rabbits horses"),
    ("pets",): _forms("cats dogs birds fish turtles hamsters"),
    ("group",): _forms("school club library museum hotel bakery camp"),
    ("people",): _forms("students children guests visitors workers players"),
    ("craft",): _forms("bracelets kites masks puppets candles vases quilts"),
    ("gift",): _forms("bike phone camera guitar tent skateboard watch"),
}
