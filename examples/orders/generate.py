"""Write the demo's data: order e-mails and, for each, the order as one line of JSON.

    python examples/orders/generate.py --out examples/data

Every row is made from a seed, so the same command gives the same bytes. A row is an order (who, where to, until when,
what) put into one of sixteen wordings. Fields may be missing (``null`` in the JSON), quantities come in digits and in
words, products in the singular and the plural, and most mails carry something that must not end up in the JSON:
another date, another town, another person, a telephone number, an old order, a quoted mail.

    orders_train.jsonl   2,000 rows of fourteen wordings
    orders_val.jsonl       100 rows of the same fourteen
    orders_test.jsonl      200 rows: 150 of the same fourteen, 50 of two wordings that training never sees

No e-mail and no order occurs in two of the files, or twice in one.

The answer's form is fixed: ``{"name": ..., "city": ..., "date": ..., "items": [[quantity, product], ...]}``, keys in
this order, ``json.dumps``' own separators, products in the singular.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

SEED = 2026
INSTRUCTION = "Extract the order as JSON:\n\n"


def words(text: str) -> list[str]:
    return text.split()


FIRST_NAMES = words("""
    Aisha Amir Anna Anton Beatriz Ben Carla Chloe Daniel David Diego Elena Emil Emma Erik Fatima Felix Grace Hana Hugo
    Ines Ivan Jack Jana Joanna Jonas Julia Karim Katya Lars Laura Leo Lina Lucas Maja Marco Maria Martin Mei Mila Nadia
    Nina Noah Olga Omar Oscar Paula Pedro Peter Priya Rachel Rosa Ruth Sara Simon Sofia Tara Tom Viktor Yuki
""")
LAST_NAMES = words("""
    Adler Almeida Andersen Baker Bauer Bianchi Brown Carter Castillo Chen Costa Cruz Dubois Evans Fischer Fontaine
    Garcia Green Haddad Hansen Hill Horvat Ito Jansen Jones Keller Khan Kim Kovacs Larsen Lopez Mendes Meyer Moreau
    Murphy Nakamura Novak Okafor Olsen Patel Peeters Quinn Reyes Ricci Rossi Santos Schmidt Silva Singh Svensson Tanaka
    Taylor Torres Varga Walker Weber Wood Yilmaz Zhang
""")
CITIES = words("""
    Aberdeen Antwerp Athens Austin Barcelona Bergen Berlin Bilbao Bologna Boston Bristol Brussels Budapest
    Chicago Cologne Copenhagen Cork Dallas Denver Dublin Edinburgh Florence Geneva Genoa Ghent Glasgow Hamburg Helsinki
    Krakow Leeds Lisbon Liverpool London Lyon Madrid Manchester Marseille Milan Montreal Munich Naples Nice Oslo
    Oxford Paris Porto Prague Riga Rome Rotterdam Seattle Seville Stockholm Toronto Turin Valencia Vienna Vilnius Warsaw
    York Zurich
""")
MONTHS = words("January February March April May June July August September October November December")
ADJECTIVES = words("""
    black blue brown ceramic copper cotton folding glass golden green grey large leather linen metal oak orange paper
    pink plastic purple red round rubber silver small square steel striped white wooden yellow
""")
NOUNS = words("""
    apron backpack basket blanket bottle bowl bucket candle chair clock cup cushion drawer folder frame hammer kettle
    ladder lamp lantern mirror mug notebook pan pen pillow plate ruler scarf spoon stool teapot tent towel tray umbrella
    vase wallet whistle
""")
NUMBER_WORDS = words("one two three four five six seven eight nine ten eleven twelve")
PLURALS = {"scarf": "scarves"}

# A wording is a text with slots. A piece in [brackets] is left out when a slot in it has no value. {inline}, {lines},
# {counted} and {labelled} are four ways to write the items; {where} and {when} are sentences from the lists below;
# {aside} and {tail} are distractors.
TEMPLATES = {
    "plain": """
{hello},

I would like to order {inline}.[ {where}][ {when}][ {aside}]

[{bye},
{name}]
[{tail}]
""",
    "list": """
{hello},

please send the following[ to {city}][ before {date}]:
{lines}

[{aside}

][{bye},
{name}]
[{tail}]
""",
    "chatty": """
{hello}! Hope you are well.[ {aside}] Could we get {inline}[, shipped to {city}][, no later than {date}]?
Many thanks[, {name}]

[{tail}]
""",
    "intro": """
{hello},

[my name is {name} and ]I want to buy {inline}.[ {aside}][ {when}][ {where}]

{bye}
[{tail}]
""",
    "form": """
New order
[Customer: {name}
][Ship to: {city}
][Needed by: {date}
]Items:
{counted}
[Remarks: {aside}]
[{tail}]
""",
    "short": """
[{city} office here. ]We need {inline}[ by {date}].[ {aside}]
[{name}]
[{tail}]
""",
    "again": """
{hello},

[{aside} ]Today I need {inline}.[ {when}][ {where}]

[{bye},
{name}]

[{tail}]
""",
    "behalf": """
{hello},[ I am writing on behalf of {name}.][ {aside}] The order[ for {city}] is:
{labelled}
[{when}]
[{tail}]
""",
    "hurry": """
[We are in a hurry: everything must be here by {date}. ]Please put {inline} on our account[ and send it to {city}].\
[ {aside}]

[{bye}, {name}]
[{tail}]
""",
    "question": """
Do you have {inline} in stock? If so, I take them.[ {aside}][ {where}][ {when}]

[{bye},
{name}]
[{tail}]
""",
    "party": """
{hello}! We are planning a party[ on {date}][ in {city}] and would love {inline}.[ {aside}]

[Love,
{name}]
[{tail}]
""",
    "formal": """
To whom it may concern:

We hereby order:
{lines}
[Place of delivery: {city}.
][Date of delivery: {date}.
][{aside}
]
[Signed, {name}]
[{tail}]
""",
    "web": """
Message from the web shop

[From: {name}]
{labelled}
[Town: {city}
][Date: {date}
][Note: {aside}]
[{tail}]
""",
    "regular": """
[{name} here! ]One more order from me: {inline}.[ {where}][ {aside}][ {when}]

[{tail}]
""",
    # Training never sees these two.
    "call": """
Transcript of a call[ from {name}]: "Hi, yes, I'd like {inline} please.[ {aside}][ You can bring it to {city}.]\
[ It should be here by {date}.] Bye!"
[{tail}]
""",
    "purchase": """
Purchase request

{labelled}

[Requested by: {name}
][Destination: {city}
][Due: {date}
][{aside}]
[{tail}]
""",
}
UNSEEN = ("call", "purchase")
SEEN = tuple(name for name in TEMPLATES if name not in UNSEEN)

HELLO = ("Hello", "Hi", "Dear team", "Good morning", "Hi there")
BYE = ("Best regards", "Thanks", "Kind regards", "Cheers", "Yours")
WHERE = (
    "Please send everything to {city}.",
    "Ship to {city}, please.",
    "The delivery address is in {city}.",
    "I live in {city}.",
    "As always, to {city}.",
)
WHEN = (
    "I need it by {date}.",
    "It has to arrive on {date}.",
    "Delivery date: {date}.",
    "The latest day is {date}.",
    "Please deliver on {date}.",
)
ASIDES = (
    "My last order was number {number}.",
    "Your invoice of {date} has been paid.",
    "We met at the fair in {city}.",
    "My colleague {name} says hello.",
    "You can call me on {phone}.",
    "I am away until {date}.",
)
TAILS = (
    "Tel. {phone}",
    "Sent from my phone",
    "> On {date} {name} wrote:\n> Your order {number} has shipped.",
    "P.S. Greetings to {name}!",
)


@dataclass(frozen=True)
class Order:
    """What the JSON says; a field that the mail does not mention is None."""

    name: str | None
    city: str | None
    date: str | None
    items: tuple[tuple[int, str], ...]

    def to_json(self) -> str:
        """The answer a model should give."""
        items = [[quantity, product] for quantity, product in self.items]
        return json.dumps({"name": self.name, "city": self.city, "date": self.date, "items": items})


def person(rng: random.Random) -> str:
    return f"{rng.choice(FIRST_NAMES)} {rng.choice(LAST_NAMES)}"


def day(rng: random.Random) -> str:
    return f"{rng.randint(1, 28)} {rng.choice(MONTHS)}"


def product(rng: random.Random) -> str:
    return f"{rng.choice(ADJECTIVES)} {rng.choice(NOUNS)}"


def plural(text: str) -> str:
    words = text.rsplit(" ", 1)
    words[-1] = PLURALS.get(words[-1], words[-1] + ("es" if words[-1].endswith(("s", "sh", "ch", "x")) else "s"))
    return " ".join(words)


def draw_order(rng: random.Random) -> Order:
    """An order of one to three different products; about one field in seven is missing."""
    products: list[str] = []
    for _ in range(rng.choice((1, 1, 1, 2, 2, 3))):
        products.append(product(rng))
    items = tuple((rng.choice((rng.randint(1, 12), rng.randint(2, 60))), p) for p in dict.fromkeys(products))
    return Order(
        name=person(rng) if rng.random() > 0.12 else None,
        city=rng.choice(CITIES) if rng.random() > 0.15 else None,
        date=day(rng) if rng.random() > 0.2 else None,
        items=items,
    )


def write_items(items: tuple[tuple[int, str], ...], rng: random.Random) -> dict[str, str]:
    """The items in each of the ways a wording may ask for."""
    in_words = rng.random() < 0.5
    phrases = []
    for quantity, what in items:
        count = NUMBER_WORDS[quantity - 1] if in_words and quantity <= len(NUMBER_WORDS) else str(quantity)
        phrases.append(f"{count} {what if quantity == 1 else plural(what)}")
    inline = phrases[0] if len(phrases) == 1 else f"{', '.join(phrases[:-1])} and {phrases[-1]}"
    return {
        "inline": inline,
        "lines": "\n".join(f"- {phrase}" for phrase in phrases),
        "counted": "\n".join(f"{quantity} x {what}" for quantity, what in items),
        "labelled": "\n".join(f"{what}: {quantity}" for quantity, what in items),
    }


def draw_distractor(choices: tuple[str, ...], rng: random.Random) -> str:
    return rng.choice(choices).format(
        number=rng.randint(10000, 99999),
        date=day(rng),
        city=rng.choice(CITIES),
        name=person(rng),
        phone=f"0{rng.randint(20, 99)} {rng.randint(100, 999)} {rng.randint(1000, 9999)}",
    )


def fill(template: str, slots: dict[str, str | None]) -> str:
    """Put the values into a wording; a bracketed piece with a missing value goes, brackets and all."""

    def piece(match: re.Match[str]) -> str:
        names = re.findall(r"\{(\w+)\}", match[1])
        return "" if any(slots[name] is None for name in names) else match[1]

    text = re.sub(r"\[([^\]]*)\]", piece, template).format(**slots)
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def draw_row(template: str, rng: random.Random) -> dict[str, str]:
    order = draw_order(rng)
    slots: dict[str, str | None] = {
        "name": order.name,
        "city": order.city,
        "date": order.date,
        "hello": rng.choice(HELLO),
        "bye": rng.choice(BYE),
        "where": rng.choice(WHERE).format(city=order.city) if order.city else None,
        "when": rng.choice(WHEN).format(date=order.date) if order.date else None,
        "aside": draw_distractor(ASIDES, rng) if rng.random() < 0.5 else None,
        "tail": draw_distractor(TAILS, rng) if rng.random() < 0.3 else None,
        **write_items(order.items, rng),
    }
    mail = fill(TEMPLATES[template], slots)
    return {"input": INSTRUCTION + mail, "output": order.to_json(), "template": template}


def draw_rows(templates: tuple[str, ...], count: int, rng: random.Random, taken: set[str]) -> Iterator[dict[str, str]]:
    """``count`` rows, the templates in turn, whose mail and order are in no other row."""
    made = 0
    while made < count:
        row = draw_row(templates[made % len(templates)], rng)
        if row["input"] in taken or row["output"] in taken:
            continue
        taken.update((row["input"], row["output"]))
        made += 1
        yield row


def make_splits(seed: int = SEED) -> dict[str, list[dict[str, str]]]:
    """The three files' rows, by split name."""
    rng = random.Random(seed)
    taken: set[str] = set()
    test = [*draw_rows(SEEN, 150, rng, taken), *draw_rows(UNSEEN, 50, rng, taken)]
    val = list(draw_rows(SEEN, 100, rng, taken))
    train = list(draw_rows(SEEN, 2000, rng, taken))
    for rows in (train, val, test):
        rng.shuffle(rows)
    return {"train": train, "val": val, "test": test}


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the order e-mails of the demo as JSON Lines.")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent.parent / "data", help="folder to write to")
    parser.add_argument("--seed", type=int, default=SEED, help="the files in the repository are of seed %(default)s")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    for split, rows in make_splits(arguments.seed).items():
        path = arguments.out / f"orders_{split}.jsonl"
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        path.write_bytes(lines.encode())
        print(f"{path}: {len(rows)} rows")


if __name__ == "__main__":
    main()
