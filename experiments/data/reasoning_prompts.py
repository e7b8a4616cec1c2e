"""Prompts whose answer takes several facts that stand far from each other.

    qa1, qa2, qa3      where a person is, where a thing is that persons carry, and where it was before: tasks 1 to 3 of bAbI (Weston et
                       al. 2015, arXiv:1502.05698), simulated, in background text as BABILong has it (Kuratov et al. 2024,
                       arXiv:2406.10149); the background is a Markov chain of made-up words
    ancestral_trace    who is the ancestor of a person by some generations: the ancestral trace challenge of NeedleBench (Li et
                       al. 2024, arXiv:2407.11963), with 8 statements, or 32. There the answer is an end of the chain, which can be
                       found as the name that is no one's child; here neither the person nor the answer is an end.

An answer counts if the first sentence of the continuation holds no other place, or name, that could be one.
"""

import itertools
import random
from typing import NamedTuple

from experiments.data.prompt_parts import Prompt, among, background, filler, make_words, places

PERSONS = ("Mary", "John", "Daniel", "Sandra")
ROOMS = ("bathroom", "bedroom", "garden", "hallway", "kitchen", "office")
THINGS = ("apple", "football", "milk")
MOVES = ("moved to", "went to", "journeyed to", "travelled to")
TAKES, DROPS = ("took", "picked up", "got"), ("dropped", "put down", "left")
FACTS = 10  # the most of a prompt
PARENTS = {"father": 1, "mother": 1, "grandfather": 2, "grandmother": 2}  # generations
STATEMENTS = (
    "{old} is the {term} of {young}.",
    "{young} has {old} as {term}.",
    "The {term} of {young} is called {old}.",
)


class Story(NamedTuple):
    """What happens, and what a reader then knows.

    Attributes:
      facts: sentences in order.
      persons: room of each person who has moved.
      things: rooms of each thing that was taken, in order, each different from the one before.
    """

    facts: list[str]
    persons: dict[str, str]
    things: dict[str, list[str]]


def story(rng: random.Random, count: int, *, things: bool) -> Story:
    """Returns `count` random events: persons move, and with `things` take what is in their room, and drop it.

    No one acts before their first move, so that the room of every event is known from the text.
    """
    told, carried = Story([], {}, {}), {}
    while len(told.facts) < count:
        person = rng.choice(PERSONS)
        room = told.persons.get(person)
        held = [thing for thing, by in carried.items() if by == person]
        # A thing of which nothing was said may be in any room.
        near = [
            thing
            for thing in THINGS
            if thing not in carried and told.things.get(thing, [room])[-1] == room and room is not None
        ]
        act = rng.choice(["move", *["take"] * bool(near), *["drop"] * bool(held)] if things else ["move"])
        if act == "move":
            room = rng.choice([other for other in ROOMS if other != room])
            told.persons[person] = room
            for thing in held:
                told.things[thing].append(room)
            told.facts.append(f"{person} {rng.choice(MOVES)} the {room}.")
        elif act == "take":
            thing = rng.choice(near)
            carried[thing] = person
            told.things.setdefault(thing, [room])
            told.facts.append(f"{person} {rng.choice(TAKES)} the {thing}.")
        else:
            thing = rng.choice(held)
            del carried[thing]
            told.facts.append(f"{person} {rng.choice(DROPS)} the {thing}.")
    return told


def question(rng: random.Random, supporting: int) -> tuple[list[str], str, str, tuple[str, ...]]:
    """Returns facts, a question of so many of them, its answer and the labels that it could have."""
    while True:
        told = story(rng, rng.randint(supporting + 1, FACTS), things=supporting > 1)
        if supporting == 1:
            person = rng.choice(sorted(told.persons))
            return told.facts, f"Where is {person}? {person} is in the", told.persons[person], ROOMS
        if supporting == 2 and told.things:
            thing = rng.choice(sorted(told.things))
            return told.facts, f"Where is the {thing}? It is in the", told.things[thing][-1], ROOMS
        # A place that a thing was in once, and one before it.
        asked = [
            (thing, before, room)
            for thing, visited in sorted(told.things.items())
            for before, room in itertools.pairwise(visited)
            if visited.count(room) == 1
        ]
        if supporting == 3 and asked:
            thing, before, room = rng.choice(asked)
            labels = tuple(label for label in ROOMS if label != room)
            return told.facts, f"Where was the {thing} before the {room}? It was in the", before, labels


def rooms(rng: random.Random, size: int, *, supporting: int) -> Prompt:
    """Returns a prompt about where a person or a thing is or was, in `size` sentences of background."""
    facts, asked, answer, labels = question(rng, supporting)
    where = places(rng, facts, size)
    return Prompt(f"{among(background(rng, size), facts, where)} {asked}", (answer,), labels)


def ancestors(rng: random.Random, size: int, *, statements: int) -> Prompt:
    """Returns a prompt about a chain of ancestors, whose statements stand in any order in `size` sentences of filler."""
    names = [name.capitalize() for name in make_words(rng, statements + 1)]  # the eldest first
    facts, generations = [], []
    for old, young in itertools.pairwise(names):
        term = rng.choice(list(PARENTS))
        generations.append(PARENTS[term])
        facts.append(rng.choice(STATEMENTS).format(old=old, young=young, term=term))
    rng.shuffle(facts)
    first = rng.randint(1, statements - 2)
    last = rng.randint(first + 1, statements - 1)
    text = among(filler(size), facts, places(rng, facts, size))
    by = sum(generations[first:last])
    asked = f"The ancestor of {names[last]} by {by} generation{'s' if by > 1 else ''} is"
    labels = tuple(name for name in names if name != names[last])
    return Prompt(f"{text} {asked}", (names[first],), labels)
