# SPDX-License-Identifier: Apache-2.0
"""Made-up facts to plant in a text and to ask for: a compact cache learns to keep facts from these.

Wordings and names are none of those that the needle tasks of ``kvcompact eval`` use: what is learned here has to carry over.
"""

import random
from dataclasses import dataclass

_FIRST = [
    "Adele",
    "Alaric",
    "Anouk",
    "Barnaby",
    "Bettina",
    "Caspian",
    "Celeste",
    "Cornelius",
    "Cosima",
    "Damaris",
    "Delphine",
    "Desmond",
    "Edwina",
    "Emrys",
    "Evander",
    "Fabian",
    "Ferdinand",
    "Flora",
    "Gareth",
    "Ginevra",
    "Griffin",
    "Gustav",
    "Henrietta",
    "Horatio",
    "Imogen",
    "Ingrid",
    "Isolde",
    "Jasper",
    "Jocelyn",
    "Juniper",
    "Katya",
    "Kenji",
    "Lavinia",
    "Leander",
    "Lysander",
    "Mabel",
    "Marcel",
    "Minerva",
    "Mirko",
    "Nestor",
    "Octavia",
    "Odette",
    "Ottilie",
    "Percival",
    "Petra",
    "Quincy",
    "Ramona",
    "Reinhold",
    "Rosalind",
    "Rufus",
    "Sabine",
    "Selwyn",
    "Sidonie",
    "Stellan",
    "Sybil",
    "Tabitha",
    "Thaddeus",
    "Tiberius",
    "Ulrike",
    "Vaughn",
    "Verity",
    "Violet",
    "Wilhelmina",
    "Winston",
    "Wolfgang",
    "Yasmin",
    "Yorick",
    "Zelda",
]
_LAST = [
    "Ashdown",
    "Barrowclough",
    "Bexley",
    "Birkeland",
    "Brightwater",
    "Caldecott",
    "Carrington",
    "Coldwell",
    "Crane",
    "Dashwood",
    "Delacroix",
    "Drummond",
    "Eastbrook",
    "Ellingham",
    "Farnsworth",
    "Fenwick",
    "Fitzgerald",
    "Garrick",
    "Greenhalgh",
    "Hargreaves",
    "Hawthorne",
    "Holloway",
    "Ironside",
    "Jessop",
    "Kettering",
    "Kingsley",
    "Langstrom",
    "Larkspur",
    "Lockwood",
    "Marchetti",
    "Merriweather",
    "Norwood",
    "Oakenfold",
    "Ormsby",
    "Pelletier",
    "Prendergast",
    "Quigley",
    "Ravenscroft",
    "Redfern",
    "Rutherford",
    "Sandoval",
    "Sinclair",
    "Stanhope",
    "Sutcliffe",
    "Tattersall",
    "Thornbury",
    "Underhill",
    "Vasquez",
    "Waverley",
    "Weatherby",
    "Whitlock",
    "Wolcott",
    "Yarrow",
]
_START = [
    "Bal",
    "Bren",
    "Cal",
    "Dor",
    "Eld",
    "Fen",
    "Gal",
    "Hal",
    "Ist",
    "Jor",
    "Kel",
    "Lor",
    "Mar",
    "Nor",
    "Osk",
    "Pel",
    "Quen",
    "Ral",
    "Sel",
    "Tor",
    "Ul",
    "Ver",
    "Wes",
    "Yar",
    "Zan",
]
_END = [
    "dale",
    "ford",
    "mere",
    "wick",
    "stad",
    "holm",
    "burg",
    "mont",
    "haven",
    "field",
    "bridge",
    "ton",
    "vik",
    "sund",
    "moor",
    "port",
    "cliff",
    "grad",
]
_THINGS = [
    "sewing machine",
    "grandfather clock",
    "telescope",
    "rowing boat",
    "grand piano",
    "tractor",
    "printing press",
    "greenhouse",
    "weather station",
    "generator",
    "coffee grinder",
    "wind turbine",
    "forklift",
    "microscope",
    "safe deposit box",
    "bicycle",
    "water pump",
    "cash register",
    "projector",
    "loudspeaker",
    "elevator",
    "drone",
    "vending machine",
    "3D printer",
    "freezer",
    "chainsaw",
    "typewriter",
    "satellite dish",
]
_COLOURS = [
    "turquoise",
    "crimson",
    "beige",
    "olive green",
    "navy blue",
    "mustard yellow",
    "lilac",
    "charcoal",
    "ochre",
    "salmon pink",
    "teal",
    "maroon",
]
_JOBS = [
    "glassblower",
    "notary",
    "beekeeper",
    "cartographer",
    "translator",
    "midwife",
    "locksmith",
    "geologist",
    "organist",
    "surveyor",
    "pharmacist",
    "stonemason",
    "bookbinder",
    "falconer",
    "optician",
    "upholsterer",
    "veterinarian",
    "puppeteer",
    "archivist",
    "plumber",
]
_ANIMALS = [
    "ferret",
    "parakeet",
    "tortoise",
    "greyhound",
    "goat",
    "chinchilla",
    "donkey",
    "cockatoo",
    "hedgehog",
    "llama",
    "python",
    "rabbit",
]
_DISHES = [
    "mushroom risotto",
    "pickled herring",
    "lentil soup",
    "apple strudel",
    "beef goulash",
    "spinach pie",
    "fish chowder",
    "rice pudding",
    "stuffed peppers",
    "potato dumplings",
    "onion tart",
    "chickpea stew",
]
_MONTHS = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
]
_METALS = ["titanium", "bronze", "pewter", "aluminium", "brass", "cobalt", "tungsten", "zinc"]


@dataclass(frozen=True)
class _Kind:
    key: str
    value: str
    statements: tuple[str, ...]
    questions: tuple[str, ...]
    leads: tuple[str, ...]


def _kind(key: str, value: str, statements: str, questions: str, leads: str) -> _Kind:
    return _Kind(
        key, value, *(tuple(part.strip() for part in text.split("|")) for text in (statements, questions, leads))
    )


# {k}: whom or what it is about, {v}: what is asked for; alternatives stand between bars.
_KINDS = (
    _kind("person", "digits", "The badge number of {k} is {v}.|{k} was issued badge number {v}.|Badge {v} belongs to {k}.",
          "What is the badge number of {k}?|Which badge number does {k} have?", "The badge number of {k} is|{k} has badge number"),
    _kind("person", "digits", "To reach {k}, dial extension {v}.|{k} can be called on extension {v}.",
          "On which extension can {k} be reached?|What is the phone extension of {k}?", "The extension of {k} is|{k} is on extension"),
    _kind("thing", "code", "The serial number of the {k} reads {v}.|The {k} carries the serial number {v}.",
          "What is the serial number of the {k}?|Which serial number does the {k} carry?", "The serial number of the {k} is|The {k} has the serial number"),
    _kind("person", "code", "The ticket of {k} is {v}.|{k} travels on ticket {v}.|A ticket with the reference {v} was booked for {k}.",
          "What is the ticket reference of {k}?|Which ticket was booked for {k}?", "The ticket of {k} is|The reference of {k}'s ticket is"),
    _kind("place", "digits", "{k} has {v} inhabitants.|The population of {k} was counted as {v}.|Exactly {v} people live in {k}.",
          "How many people live in {k}?|What is the population of {k}?", "The population of {k} is|The number of inhabitants of {k} is"),
    _kind("place", "year", "{k} was founded in {v}.|The town of {k} goes back to the year {v}.|In {v} settlers founded {k}.",
          "When was {k} founded?|In which year was {k} founded?", "{k} was founded in|The founding year of {k} is"),
    _kind("person", "year", "{k} was born in {v}.|The year of birth of {k} is {v}.",
          "When was {k} born?|In which year was {k} born?", "{k} was born in|The year of birth of {k} is"),
    _kind("person", "job", "{k} works as a {v}.|{k} earns a living as a {v}.|By profession {k} is a {v}.",
          "What does {k} do for a living?|What is the profession of {k}?", "{k} works as a|The profession of {k} is"),
    _kind("thing", "colour", "The {k} was painted {v}.|Somebody had the {k} repainted in {v}.|The colour of the {k} is {v}.",
          "Which colour does the {k} have?|What colour is the {k}?", "The colour of the {k} is|The {k} is"),
    _kind("person", "place", "{k} moved to {v} last year.|{k} now lives in {v}.|The home of {k} is in {v}.",
          "Where does {k} live?|In which town does {k} live now?", "{k} lives in|The home of {k} is in"),
    _kind("thing", "price", "The {k} was sold for {v} crowns.|Somebody paid {v} crowns for the {k}.|The price of the {k} was {v} crowns.",
          "What was the price of the {k} in crowns?|For how many crowns was the {k} sold?", "The price of the {k} in crowns was|The {k} was sold for"),
    _kind("person", "animal", "{k} keeps a {v} at home.|The pet of {k} is a {v}.",
          "Which animal does {k} keep?|What kind of pet does {k} have?", "{k} keeps a|The pet of {k} is a"),
    _kind("person", "dish", "The favourite dish of {k} is {v}.|Nothing tastes better to {k} than {v}.",
          "What is the favourite dish of {k}?|What does {k} like to eat best?", "The favourite dish of {k} is|What {k} likes best is"),
    _kind("person", "date", "{k} will retire on {v}.|The last working day of {k} is {v}.",
          "When will {k} retire?|On which date does {k} retire?", "{k} will retire on|The last working day of {k} is"),
    _kind("place", "time", "The ferry to {k} departs at {v}.|At {v} a ferry leaves for {k}.",
          "When does the ferry to {k} leave?|At what time does the ferry to {k} depart?", "The ferry to {k} leaves at|The departure time of the ferry to {k} is"),
    _kind("thing", "person", "The {k} was donated by {v}.|It was {v} who gave the {k} to the museum.|The donor of the {k} is {v}.",
          "Who donated the {k}?|Who is the donor of the {k}?", "The {k} was donated by|The donor of the {k} is"),
    _kind("place", "person", "The mayor of {k} is {v}.|{v} was elected mayor of {k}.",
          "Who is the mayor of {k}?|Who was elected mayor in {k}?", "The mayor of {k} is|The mayor's name in {k} is"),
    _kind("thing", "metal", "The frame of the {k} is made of {v}.|For the {k} they chose a frame of {v}.",
          "What is the frame of the {k} made of?|Which metal is the frame of the {k} made of?", "The frame of the {k} is made of|The {k} has a frame of"),
    _kind("person", "digits", "The account of {k} ends in {v}.|Payments to {k} go to account {v}.",
          "What is the account number of {k}?|To which account do payments to {k} go?", "The account number of {k} is|Payments to {k} go to account"),
    _kind("thing", "code", "To start the {k}, enter {v}.|The {k} only starts after {v} has been typed in.",
          "What has to be entered to start the {k}?|How is the {k} started?", "To start the {k}, enter|The {k} starts with"),
    _kind("person", "weight", "The parcel for {k} weighs {v} grams.|{k} is waiting for a parcel of {v} grams.",
          "How many grams does the parcel for {k} weigh?|What is the weight of the parcel for {k}?", "The weight of the parcel for {k} in grams is|The parcel for {k} weighs"),
    _kind("place", "digits", "The postal code of {k} is {v}.|Letters to {k} need the postal code {v}.",
          "What is the postal code of {k}?|Which postal code do letters to {k} need?", "The postal code of {k} is|Letters to {k} need the postal code"),
    _kind("person", "thing", "{k} inherited a {v}.|From an aunt {k} received a {v}.",
          "What did {k} inherit?|What did {k} receive from an aunt?", "{k} inherited a|What {k} inherited is a"),
    _kind("person", "room", "{k} sits in room {v}.|The office of {k} is room {v}.|In room {v} you will find {k}.",
          "In which room is the office of {k}?|Which room does {k} sit in?", "The office of {k} is room|{k} sits in room"),
)  # fmt: skip


@dataclass(frozen=True)
class Fact:
    """A fact, and how it is asked for.

    Attributes:
        statement: the sentence to plant.
        question: what asks for it.
        lead: opening of the answer, up to the value.
        value: the answer.
        subject: what it is about, with its kind; no two facts of one context share it.
    """

    statement: str
    question: str
    lead: str
    value: str
    subject: tuple[int, str]


def make_facts(draw: random.Random, count: int, same_kind: float = 0.3) -> list[Fact]:
    """Facts that do not contradict one another.

    Args:
        same_kind: share of the calls in which all facts are of one kind, so that only the subject tells them apart.
    """
    number = draw.randrange(len(_KINDS)) if draw.random() < same_kind else None
    facts: list[Fact] = []
    taken: set[tuple[int, str]] = set()
    while len(facts) < count:
        index = draw.randrange(len(_KINDS)) if number is None else number
        kind = _KINDS[index]
        key = _draw(draw, kind.key)
        # a first name alone must not be part of somebody else's
        name = key.split()[0] if kind.key == "person" else key
        if (index, name) in taken:
            if kind.key == "thing" and len(taken) >= len(_THINGS):  # there are no more things to tell apart
                number = None
            continue
        taken.add((index, name))
        value = _draw(draw, kind.value)
        texts = [
            draw.choice(options).format(k=key, v=value) for options in (kind.statements, kind.questions, kind.leads)
        ]
        facts.append(Fact(*texts, value, (index, name)))
    return facts


def _draw(draw: random.Random, what: str) -> str:
    match what:
        case "person":
            return draw.choice(_FIRST) if draw.random() < 0.3 else f"{draw.choice(_FIRST)} {draw.choice(_LAST)}"
        case "place":
            return draw.choice(_START) + draw.choice(_END)
        case "digits":
            size = draw.randint(3, 7)
            return str(draw.randrange(10 ** (size - 1), 10**size))
        case "code":
            letters = "".join(draw.choice("ABCDEFGHJKLMNPQRSTUVWXYZ") for _ in range(draw.randint(1, 3)))
            return f"{letters}{draw.choice(('-', '', '/'))}{draw.randrange(100, 10 ** draw.randint(3, 6))}"
        case "year":
            return str(draw.randrange(1200, 2020))
        case "price" | "weight":
            return str(draw.randrange(20, 9999))
        case "room":
            return f"{draw.randint(1, 9)}{draw.randint(0, 99):02d}{draw.choice(('', 'A', 'B'))}"
        case "date":
            return f"{draw.choice(_MONTHS)} {draw.randint(1, 28)}, {draw.randint(2025, 2049)}"
        case "time":
            return f"{draw.randint(0, 23)}:{draw.randint(0, 59):02d}"
    lists = {
        "thing": _THINGS,
        "colour": _COLOURS,
        "job": _JOBS,
        "animal": _ANIMALS,
        "dish": _DISHES,
        "metal": _METALS,
    }
    return draw.choice(lists[what])
