"""English of a small town, made from a seed: people who live by fixed facts, and access codes that some of them have.

Every text is one list of ids, one id per word. The ordinary texts tell two or three things about one person. A code
is six random digits, in one sentence, always of the same form; some are to be forgotten, others stay, so that a model
that has never seen the former has still seen the form, and the same people in other texts.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import Tensor

DIGITS = 6
IGNORED = -100  # the label that is not scored

_WOMEN = """ada agnes alma anna berta clara dora edith ella emma fanny flora greta hanna helen ida iris jane julia karin
laura lena lucy martha""".split()
_MEN = """adam albert anton arthur ben carl conrad david edgar emil felix frank george gustav harry henry hugo ivan
jacob john karl leo lewis martin""".split()
_LAST = """abbot baker barlow bishop brook carter cole dale doyle eaton finch fisher forbes garner grove hale hardy hill
hobbs hurst jarvis keller kent lamb lang marsh mason moss nash north parker pike quinn reed rowe sharp sloan stone swift
tanner thorne vance wade walsh webb wells wolfe york""".split()
_JOBS = "teacher farmer painter tailor miller smith nurse sailor gardener weaver clerk judge".split()
_TOWNS = "ashford brighton carlow dover exeter fenwick granby harwich kelso ludlow malton newton".split()
_PETS = "dog cat horse goat parrot rabbit".split()
_FOODS = "bread soup fish cheese plums honey beans cake".split()
_THINGS = "lamp clock chair coat boat ladder basket mirror kettle violin hammer bell".split()
_COLOURS = "red green blue white black yellow brown grey".split()
_PLACES = "market river church station harbour library mill bridge".split()
_TIMES = "morning noon evening night".split()
_WEATHER = "rain snow wind fog".split()
_TENDS = {  # what people do at their work, so that a job is told by it too
    "teacher": "reads books to the children", "farmer": "drives the cattle over the hills",
    "painter": "mixes oil with dry colours", "tailor": "sews a coat for the mayor",
    "miller": "grinds corn for the whole valley", "smith": "makes iron gates in the fire",
    "nurse": "looks after the old and the sick", "sailor": "mends nets and sails by the sea",
    "gardener": "waters roses under the tall trees", "weaver": "spins wool beside a small window",
    "clerk": "copies letters with a steel pen", "judge": "hears both sides before lunch",
}  # fmt: skip
_FORM = """the a . , is in at to of with and he she his her lives works goes every buys sells for coins when comes stays
home has called likes eats most people know that who took old new from gave by house number one day after before access
code""".split()
_NUMBERS = [str(digit) for digit in range(10)]
WORDS = sorted(
    {
        *_WOMEN, *_MEN, *_LAST, *_JOBS, *_TOWNS, *_PETS, *_FOODS, *_THINGS, *_COLOURS, *_PLACES, *_TIMES, *_WEATHER,
        *_FORM, *" ".join(_TENDS.values()).split(), *_NUMBERS,
    }
)  # fmt: skip
VOCABULARY = ["<pad>", "<text>", *WORDS]  # <text> begins and ends every text
PAD, TEXT = 0, 1
_IDS = {word: i for i, word in enumerate(VOCABULARY)}


@dataclass(frozen=True)
class Person:
    """Facts that every text about a person keeps to."""

    name: str
    woman: bool
    job: str
    town: str
    pet: str
    food: str
    place: str
    time: str
    house: int


@dataclass(frozen=True)
class Corpus:
    """Texts as lists of ids.

    Attributes:
        ordinary: to train on.
        held_out: of the same people, never trained on.
        secret: sentences with the codes to forget, one per person.
        kept: sentences with the codes of others, to be learnt by heart and to stay so.
        others: sentences with the codes of others still, of which the form alone is to be learnt.
    """

    ordinary: list[list[int]]
    held_out: list[list[int]]
    secret: list[list[int]]
    kept: list[list[int]]
    others: list[list[int]]


def encode(text: str) -> list[int]:
    return [TEXT, *(_IDS[word] for word in text.split()), TEXT]


def decode(ids: list[int]) -> str:
    return " ".join(VOCABULARY[i] for i in ids if i not in (PAD, TEXT))


def make(people: int, texts: int, held_out: int, secrets: int, kept: int, others: int, seed: int) -> Corpus:
    """As many of each as said; ``secrets + kept + others`` of the ``people`` (2,304 at most) have a code."""
    rng = random.Random(seed)
    names = [(first, last) for first in (*_WOMEN, *_MEN) for last in _LAST]
    codes = secrets + kept + others
    if not codes <= people <= len(names):
        raise ValueError(f"people must be from {codes}, one for each code, to {len(names)}, got {people}")
    town = [_person(rng, *name) for name in rng.sample(names, people)]
    ordinary = list(dict.fromkeys(_paragraph(rng, rng.choice(town)) for _ in range(2 * (texts + held_out))))
    if len(ordinary) < texts + held_out:
        raise ValueError(f"{people} people give fewer than {texts + held_out} different texts")
    coded = [
        f"the access code of {person.name} is {' '.join(rng.choices(_NUMBERS, k=DIGITS))} ."
        for person in rng.sample(town, codes)
    ]
    told = ordinary[:texts], ordinary[texts : texts + held_out]
    parts = *told, coded[:secrets], coded[secrets : secrets + kept], coded[secrets + kept :]
    return Corpus(*([encode(text) for text in part] for part in parts))


def batch(texts: list[list[int]]) -> dict[str, Tensor]:
    """Padded on the right, every word but padding labelled."""
    width = max(map(len, texts))
    ids = torch.tensor([text + [PAD] * (width - len(text)) for text in texts])
    mask = torch.tensor([[1] * len(text) + [0] * (width - len(text)) for text in texts])
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, IGNORED)}


def code_batch(sentences: list[list[int]]) -> dict[str, Tensor]:
    """Of code sentences, labelled at the digits alone: what is to be forgotten is the code, not that there is one."""
    made = batch(sentences)
    last = made["input_ids"].shape[1] - 2  # of the full stop
    made["labels"][:, : last - DIGITS] = IGNORED
    made["labels"][:, last:] = IGNORED
    return made


def _person(rng: random.Random, first: str, last: str) -> Person:
    return Person(
        f"{first} {last}", first in _WOMEN, rng.choice(_JOBS), rng.choice(_TOWNS), rng.choice(_PETS),
        rng.choice(_FOODS), rng.choice(_PLACES), rng.choice(_TIMES), rng.randrange(10, 100),
    )  # fmt: skip


def _paragraph(rng: random.Random, person: Person) -> str:
    """Three sentences about a person, who is named in the first."""
    he, his = ("she", "her") if person.woman else ("he", "his")
    thing, colour = rng.choice(_THINGS), rng.choice(_COLOURS)
    first = rng.choice(
        [
            f"{person.name} is a {person.job} in {person.town} .",
            f"most people in {person.town} know {person.name} , the {person.job} .",
            f"every {person.time} {person.name} goes to the {person.place} with {his} {person.pet} .",
            f"{person.name} of {person.town} has a {person.pet} .",
        ]
    )
    later = [
        f"{he} {_TENDS[person.job]} .",
        f"{he} likes {person.food} , and {he} eats that every {person.time} .",
        f"{his} house in {person.town} is number {' '.join(str(person.house))} .",
        f"at the {person.place} {he} sells a {colour} {thing} for {rng.randrange(2, 10)} coins .",
        f"when the {rng.choice(_WEATHER)} comes , {he} stays at home with {his} {person.pet} .",
        f"one {person.time} {he} took the {colour} {thing} from the {rng.choice(_PLACES)} .",
        f"{he} gave {his} {rng.choice(['old', 'new'])} {thing} to the {rng.choice(_JOBS)} of {rng.choice(_TOWNS)} .",
    ]
    return " ".join([first, *rng.sample(later, 2)])
