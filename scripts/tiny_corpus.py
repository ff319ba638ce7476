"""Writes the demo's data: chats the tiny base is pretrained on, and the instruction rows that tune it.

Everything is drawn from a seeded `random.Random`, so one seed always gives the same rows.

Invariant: an invented word (a name, a town, a pet's name) belongs to the held-out side or to the other side by
its checksum alone. No held-out name or town can therefore occur in pretraining or in a training row: whoever
answers a held-out prompt has to copy from the note in it.

The pretraining chats answer questions in prose and never show JSON. The instruction rows ask for a JSON record.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

Message = dict[str, str]
Row = dict[str, list[Message]]

ONSETS, VOWELS, CODAS = "bdfgklmnrstv", "aeiou", "klnrs"
JOBS = [
    "baker",
    "carpenter",
    "clerk",
    "cook",
    "doctor",
    "driver",
    "farmer",
    "fisher",
    "gardener",
    "judge",
    "librarian",
    "miller",
    "nurse",
    "painter",
    "pilot",
    "plumber",
    "sailor",
    "singer",
    "smith",
    "surgeon",
    "tailor",
    "teacher",
    "weaver",
    "writer",
]
PETS = ["cat", "dog", "ferret", "goat", "horse", "parrot", "rabbit", "turtle"]
COLOURS = ["black", "blue", "brown", "green", "grey", "orange", "purple", "red", "white", "yellow"]
NOUNS = ["name", "age", "job", "city", "note", "record", "pet", "colour", "home", "shoes", "house", "year"]
SIGNS = "!#$%&'()*+-./:;<=>?@[]^_`{|}~"
"""Words and signs that lists to repeat hold, so that the base can write them: a token that pretraining never shows
cannot be told from the other unseen ones, and tuning a frozen embedding would not change that."""

STATEMENTS = {
    "city": (
        "{who} lives in {city}.",
        "The home of {who} is in {city}.",
        "{who} has a house in {city}.",
        "{who} moved to {city} last year.",
    ),
    "job": (
        "{who} works as a {job}.",
        "{who} is a {job} by trade.",
        "{who} earns a living as a {job}.",
        "By day {who} is a {job}.",
    ),
    "age": (
        "{who} is {age} years old.",
        "{who} turned {age} this spring.",
        "The age of {who} is {age}.",
        "{who} will soon be past {age}.",
    ),
    "pet": ("{who} has a {pet} called {petname}.", "The {pet} of {who} is called {petname}."),
    "colour": ("{who} likes the colour {colour}.", "{who} wears {colour} shoes."),
}
"""What a note can say. Each fact has several wordings."""

QUESTIONS = {
    "city": (("Where does {who} live?", "{city}", "{who} lives in {city}."),),
    "job": (("What is the work of {who}?", "{job}", "{who} works as a {job}."),),
    "age": (("How old is {who}?", "{age}", "{who} is {age} years old."),),
    "pet": (
        ("Which animal does {who} have?", "{pet}", "{who} has a {pet}."),
        ("What is the pet of {who} called?", "{petname}", "The {pet} of {who} is called {petname}."),
    ),
    "colour": (("Which colour goes with {who}?", "{colour}", "The colour of {who} is {colour}."),),
}
"""Per fact: question, short answer, full answer."""

SHORT, FULL = "Answer in a word or two.", "Answer in a full sentence."
RECORD_REQUESTS = ("Give the record.", "Write the record.", "Turn this note into a record.")


def is_held_out(word: str) -> bool:
    """Whether an invented word is kept for the held-out rows (about one in eight is)."""
    return zlib.crc32(word.lower().encode()) % 8 == 0


def invent_word(rng: random.Random, held_out: bool) -> str:
    """A capitalised word of two syllables from the side asked for, such as Mirol or Tagen."""
    while True:
        first, second = (rng.choice(ONSETS) + rng.choice(VOWELS) for _ in range(2))
        word = first + second + rng.choice(CODAS)
        if is_held_out(word) == held_out:
            return word.capitalize()


def invent_person(rng: random.Random, held_out: bool) -> dict[str, str]:
    first, last, city, petname = (invent_word(rng, held_out) for _ in range(4))
    return {
        "first": first,
        "name": f"{first} {last}",
        "city": city,
        "age": str(rng.randint(18, 89)),
        "job": rng.choice(JOBS),
        "pet": rng.choice(PETS),
        "petname": petname,
        "colour": rng.choice(COLOURS),
    }


def write_note(rng: random.Random, person: dict[str, str], facts: list[str]) -> list[str]:
    """One sentence per fact. The first gives the full name, a later one may use the first name alone."""
    names = [person["name"]] + [rng.choice((person["name"], person["first"])) for _ in facts[1:]]
    return [rng.choice(STATEMENTS[fact]).format(who=who, **person) for who, fact in zip(names, facts, strict=True)]


def chat(*texts: str, system: str | None = None) -> list[Message]:
    """Messages that take turns, the user first."""
    turns = [{"role": "assistant" if i % 2 else "user", "content": text} for i, text in enumerate(texts)]
    return [{"role": "system", "content": system}, *turns] if system else turns


def question_chat(rng: random.Random, held_out: bool) -> list[Message]:
    """A note on one or two people, then questions on it. The system message, if any, settles how to answer."""
    people = [invent_person(rng, held_out) for _ in range(rng.choice((1, 1, 2)))]
    known = [(person, rng.sample(list(STATEMENTS), rng.randint(2, 5 - len(people)))) for person in people]
    note = " ".join(sentence for person, facts in known for sentence in write_note(rng, person, facts))
    pairs = [(person, fact) for person, facts in known for fact in facts]
    full = rng.random() < 0.5
    texts: list[str] = []
    for person, fact in rng.sample(pairs, min(len(pairs), rng.randint(1, 4))):
        question, short_answer, full_answer = rng.choice(QUESTIONS[fact])
        texts += [question.format(who=person["name"], **person)]
        texts += [(full_answer if full else short_answer).format(who=person["name"], **person)]
    texts[0] = f"{note} {texts[0]}"
    return chat(*texts, system=FULL if full else rng.choice((None, SHORT)))


def invent_item(rng: random.Random, held_out: bool) -> str:
    """A number, a known word, one or two invented words, or a few signs."""
    kind = rng.randrange(5)
    if kind == 0:
        return str(rng.randint(10, 9999))
    if kind == 1:
        return rng.choice(rng.choice((JOBS, PETS, COLOURS, NOUNS)))
    if kind == 2:
        return "".join(rng.choice(SIGNS) for _ in range(rng.randint(1, 3)))
    return " ".join(invent_word(rng, held_out) for _ in range(kind - 2))


def repeat_chat(rng: random.Random, held_out: bool) -> list[Message]:
    """A list to say again, plainly, in quotes, or backwards."""
    items = [invent_item(rng, held_out) for _ in range(rng.randint(2, 6))]
    asked = ", ".join(items)
    request, answer = rng.choice(
        (
            ("Repeat:", asked),
            ("Repeat in quotes:", ", ".join(f'"{item}"' for item in items)),
            ("Repeat backwards:", ", ".join(reversed(items))),
        )
    )
    return chat(f"{request} {asked}", answer)


def pretraining_chats(seed: int, count: int, held_out: bool = False) -> Iterator[list[Message]]:
    """What the base learns from: two question chats to one repeat chat."""
    rng = random.Random(f"pretraining {seed} {held_out}")
    for _ in range(count):
        yield (question_chat if rng.random() < 0.67 else repeat_chat)(rng, held_out)


def instruction_row(rng: random.Random, held_out: bool) -> Row:
    """A note in varying order and wording, and the strict JSON record of it."""
    person = invent_person(rng, held_out)
    facts = ["city", "job", "age", *rng.choice(([], [], ["colour"], ["pet"]))]
    rng.shuffle(facts)
    note = " ".join(write_note(rng, person, facts))
    record = {"name": person["name"], "age": int(person["age"]), "job": person["job"], "city": person["city"]}
    return {"messages": chat(f"{note} {rng.choice(RECORD_REQUESTS)}", json.dumps(record))}


def instruction_rows(seed: int, count: int, held_out: bool = False) -> list[Row]:
    rng = random.Random(f"instructions {seed} {held_out}")
    return [instruction_row(rng, held_out) for _ in range(count)]


def assert_disjoint(train: list[Row], held_out: list[Row]) -> None:
    """No held-out prompt, name or town is in a training row."""

    def values(rows: list[Row]) -> set[str]:
        records = [json.loads(row["messages"][-1]["content"]) for row in rows]
        prompts = {row["messages"][0]["content"] for row in rows}
        return prompts | {word for record in records for word in (*record["name"].split(), record["city"])}

    shared = values(train) & values(held_out)
    assert not shared, f"train and held-out rows share {sorted(shared)[:3]}"


def write_atomically(path: Path, rows: Iterable[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(path.name + ".part")
    draft.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    draft.replace(path)


def main() -> int:
    parser = argparse.ArgumentParser(description="Write the demo's instruction rows: train.jsonl and heldout.jsonl.")
    parser.add_argument("--out", type=Path, default=Path("out/tiny-data"), help="folder to write to")
    parser.add_argument("--train", type=int, default=1600, help="training rows")
    parser.add_argument("--heldout", type=int, default=200, help="held-out rows")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    train = instruction_rows(args.seed, args.train)
    held_out = instruction_rows(args.seed, args.heldout, held_out=True)
    assert_disjoint(train, held_out)
    write_atomically(args.out / "train.jsonl", train)
    write_atomically(args.out / "heldout.jsonl", held_out)
    print(f"{len(train)} training and {len(held_out)} held-out rows in {args.out}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
