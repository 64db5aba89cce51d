"""An invented, consistent little world: documents, a graph of triples, and questions whose answers must be read.

    world = generate_world(num_documents=1000, seed=0)
    world.documents[0]      # {"id": "person_00000", "title": "Tovan Merikol", "content": ..., "metadata": {...}}
    world.triples[0]        # ("Tovan Merikol", "born_in", "Zukon")
    world.questions["test"] # one question for every fact of every document of that split
    world.multihop["test"]  # questions over two and three documents, with their hops

It is the one source of truth for everything that needs data without a download: retrieval, multi-hop search, the graph
retriever, the search index, and the policy that decides when to search. Three promises make it a fair test:

- train, val and test are separate sub-worlds. They share no name, not even a first name, and no relation leads from one
  to another. What a model learns of the training entities says nothing about the others.
- answers are open (names, years, numbers) or come from sets of 40 values and more, so guessing scores near zero.
- all names are built from the same syllables, so that a tokenizer trained on one split has the pieces for the others.

Every entity has one document that states each of its facts once. A relation has at most one object, so a chain of
relations has exactly one answer.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from nanochat.common import UserError

SPLITS = ("train", "val", "test")
KINDS = ("person", "town", "company", "work")
MIN_DOCUMENTS = 10
NAME_AGAIN = 0.5  # how often a later sentence repeats the name instead of a pronoun
TRIES_PER_CHAIN = 20  # random walks from one document before its multi-hop question is given up


@dataclass(frozen=True)
class Relation:
    """How a fact is told and asked. All wordings of one relation share its telling word ("born", "mayor", "founded").

    {S} and {s} are the subject, as name or pronoun, at the beginning and inside of a sentence; {P} is a possessive
    pronoun, {o} the object, {x} the subject in a question, {maker} what the maker of a work is called.
    """

    sentences: tuple[str, ...]
    questions: tuple[str, ...]
    phrase: str = (
        ""  # names the object through the subject, for multi-hop questions; empty where the object has no document
    )


RELATIONS = {
    # person
    "born_in": Relation(
        ("{S} was born in {o}.", "{S} was born in the town of {o}.", "The town where {s} was born is {o}."),
        ("Where was {x} born?", "In which town was {x} born?", "What town was {x} born in?"),
        "the town where {x} was born",
    ),
    "birth_year": Relation(
        ("{S} was born in the year {o}.", "{P} birth year is {o}.", "The birth year of {s} is {o}."),
        ("In what year was {x} born?", "What is the birth year of {x}?", "What year was {x} born in?"),
    ),
    "occupation": Relation(
        ("{P} occupation is {o}.", "By occupation {s} is a {o}.", "{S} has the occupation of {o}."),
        ("What is the occupation of {x}?", "What occupation does {x} have?", "Which occupation does {x} have?"),
    ),
    "works_for": Relation(
        ("{S} works for {o}.", "{S} works for the company {o}.", "The company that {s} works for is {o}."),
        ("Which company does {x} work for?", "What company does {x} work for?", "Who does {x} work for?"),
        "the company that {x} works for",
    ),
    "lives_in": Relation(
        ("{S} lives in {o}.", "{S} now lives in the town of {o}.", "The town where {s} lives is {o}."),
        ("Where does {x} live?", "In which town does {x} live?", "What town does {x} live in?"),
        "the town where {x} lives",
    ),
    "spouse": Relation(
        ("{S} is married to {o}.", "{S} is happily married to {o}.", "The person {s} is married to is {o}."),
        ("Who is {x} married to?", "To whom is {x} married?", "Which person is {x} married to?"),
        "the person married to {x}",
    ),
    # town
    "river": Relation(
        ("The river {o} flows through {s}.", "{S} lies on the river {o}.", "{P} river is the {o}."),
        ("Which river flows through {x}?", "What river does {x} lie on?", "On which river does {x} lie?"),
    ),
    "mayor": Relation(
        ("The mayor of {s} is {o}.", "{P} mayor is {o}.", "{o} is the mayor of {s}."),
        ("Who is the mayor of {x}?", "What is the name of the mayor of {x}?", "Who serves as mayor of {x}?"),
        "the mayor of {x}",
    ),
    "population": Relation(
        ("The population of {s} is {o}.", "{P} population is {o}.", "{S} has a population of {o}."),
        ("What is the population of {x}?", "What population does {x} have?", "How large is the population of {x}?"),
    ),
    "founded_in": Relation(  # companies have it too
        ("{S} was founded in {o}.", "{S} was founded in the year {o}.", "The year {s} was founded is {o}."),
        ("When was {x} founded?", "In what year was {x} founded?", "What year was {x} founded in?"),
    ),
    "known_for": Relation(
        ("{S} is known for {o}.", "{S} is best known for {o}.", "{S} is widely known for {o}."),
        ("What is {x} known for?", "What is {x} best known for?", "For what is {x} known?"),
    ),
    # company
    "founder": Relation(
        ("The founder of {s} is {o}.", "{P} founder is {o}.", "{o} is the founder of {s}."),
        (
            "Who is the founder of {x}?",
            "What is the name of the founder of {x}?",
            "Which person is the founder of {x}?",
        ),
        "the founder of {x}",
    ),
    "headquarters": Relation(
        ("{S} has its headquarters in {o}.", "{P} headquarters are in {o}.", "The headquarters of {s} are in {o}."),
        (
            "Where are the headquarters of {x}?",
            "In which town are the headquarters of {x}?",
            "Where does {x} have its headquarters?",
        ),
        "the town where {x} has its headquarters",
    ),
    "makes": Relation(
        ("{S} makes the {o}.", "The product that {s} makes is the {o}.", "{S} makes a product called the {o}."),
        ("What does {x} make?", "What product does {x} make?", "Which product does {x} make?"),
    ),
    "employees": Relation(
        ("{S} employs {o} people.", "In all {s} employs {o} people.", "The number of people {s} employs is {o}."),
        (
            "How many people does {x} employ?",
            "What number of people does {x} employ?",
            "What is the number of people {x} employs?",
        ),
    ),
    # work
    "author": Relation(
        ("The {maker} of {s} is {o}.", "{P} {maker} is {o}.", "{o} is the {maker} of {s}."),
        (
            "Who is the {maker} of {x}?",
            "What is the name of the {maker} of {x}?",
            "Which person is the {maker} of {x}?",
        ),
        "the {maker} of {x}",
    ),
    "finished_in": Relation(
        ("{S} was finished in {o}.", "{S} was finished in the year {o}.", "The year {s} was finished is {o}."),
        ("When was {x} finished?", "In what year was {x} finished?", "What year was {x} finished in?"),
    ),
    "theme": Relation(
        ("The theme of {s} is {o}.", "{P} theme is {o}.", "{S} has the theme of {o}."),
        ("What is the theme of {x}?", "What theme does {x} have?", "Which theme does {x} have?"),
    ),
    "set_in": Relation(
        ("{S} is set in {o}.", "{S} is set in the town of {o}.", "The town where {s} is set is {o}."),
        ("Where is {x} set?", "In which town is {x} set?", "What town is {x} set in?"),
        "the town where {x} is set",
    ),
    "dedicated_to": Relation(
        ("{S} is dedicated to {o}.", "{S} is kindly dedicated to {o}.", "The person {s} is dedicated to is {o}."),
        ("Who is {x} dedicated to?", "To whom is {x} dedicated?", "Which person is {x} dedicated to?"),
        "the person {x} is dedicated to",
    ),
}


def _words(text: str) -> list[str]:
    return text.split()


# Names are a first syllable, at times a second, and a last one. The endings keep clear of what a stemmer would cut off.
_FIRST = [onset + vowel for onset in _words("b d f g h j k l m n p r s t v w z br dr kr") for vowel in "aeiou"]
_LAST = [
    onset + vowel + coda
    for onset in "bdfklmnprstvz"
    for vowel in "aeiou"
    for coda in "lnr"
    if vowel + coda not in ("al", "er")
]
_UNFIT = frozenset({"Semen", "Satan"})

_OCCUPATIONS = _words("""
    baker barber beekeeper blacksmith boatbuilder bookbinder brewer butcher candlemaker carpenter chemist clockmaker
    cobbler cook cooper courier dancer dentist diver doctor dyer farmer ferryman fisher florist gardener glassblower
    goldsmith hatter historian hunter judge lawyer librarian locksmith mason merchant midwife miller miner musician
    nurse pharmacist photographer pilot plumber porter potter printer roofer sailor sculptor shepherd surveyor
    tailor teacher translator weaver welder woodcarver
""")
_THEMES = _words("""
    ambition autumn betrayal bravery childhood courage deceit despair destiny doubt dreams envy exile faith fame
    famine forgiveness freedom friendship gratitude greed grief guilt harvest honour hope hunger innocence jealousy
    justice kindness loneliness loss loyalty luck marriage memory mercy migration motherhood mourning nature
    obedience patience peace pilgrimage poverty pride rebellion regret revenge rivalry sacrifice silence slavery
    solitude thirst travel truth victory wealth winter wisdom youth
""")
_TITLE_WORDS = _words("""
    Anchor Arrow Bell Bridge Candle Castle Chain Circle Cloud Crown Dagger Drum Feather Flame Flute Forest Garden
    Gate Ghost Harbour Island Journey Key Lantern Letter Mirror Moon Mountain Orchard Palace Rose Sail Shadow Shield
    Star Stone Sword Thorn Throne Tower Valley Voyage Wheel Window Wolf
""")
_COMPANY_WORDS = _words("Foundry Group Holdings Industries Mills Partners Works Workshop Brothers Trading")
_PRODUCTS = _words("""
    bicycle blanket boot camera chair clock compass engine guitar hammer kettle ladder lamp loom mattress oven piano
    plough pump radio razor saddle stove telescope tractor umbrella violin wagon watch whistle
""")
_SPECIALITIES = _words("""
    apples bread butter carpets cheese chocolate cider dances dolls fireworks glass honey jam kites lace marble
    mustard olives pears pepper plums porcelain puppets ribbons salt sausages silk soap tea vinegar wine wool
""")
_MAKERS = {
    "novel": "author",
    "play": "author",
    "poem": "author",
    "song": "composer",
    "opera": "composer",
    "painting": "painter",
}


@dataclass
class World:
    documents: list[dict[str, Any]]
    triples: list[tuple[str, str, str]]  # (subject name, relation, object name or value)
    questions: dict[str, list[dict[str, Any]]]  # by split; one document answers
    multihop: dict[str, list[dict[str, Any]]]  # by split; two or three documents in a row, listed in "hops"
    unanswerable: dict[str, list[dict[str, Any]]]  # by split; about people whom no document knows


@dataclass
class _Entity:
    id: str
    kind: str
    name: str
    facts: dict[str, str] = field(default_factory=dict)  # relation -> object, in the order they were made
    she: bool = False  # people only
    genre: str = ""  # works only: novel, song, ...
    content: str = ""

    @property
    def maker(self) -> str:
        return _MAKERS.get(self.genre, "")


def generate_world(num_documents: int = 1000, seed: int = 0) -> World:
    """The same world for the same two numbers, anywhere. About 80% of the documents are train, 10% val, 10% test."""
    if num_documents < MIN_DOCUMENTS:
        raise UserError(
            f"num_documents is {num_documents}: the example world needs at least {MIN_DOCUMENTS} (try 1000)"
        )
    held_out = max(2, num_documents // 10)
    sizes = {"train": num_documents - 2 * held_out, "val": held_out, "test": held_out}

    rng = random.Random(seed)
    names = _Names(rng)
    counts = dict.fromkeys(KINDS, 0)
    world = World([], [], {}, {}, {})
    for split in SPLITS:
        entities = _make_entities(sizes[split], names, counts, rng)
        _relate(entities, names, rng)
        everyone = [entity for kind in KINDS for entity in entities[kind]]
        for entity in everyone:
            entity.content = _tell(entity, rng)
            world.documents.append(
                {
                    "id": entity.id,
                    "title": entity.name,
                    "content": entity.content,
                    "metadata": {"split": split, "kind": entity.kind},
                }
            )
            world.triples += [(entity.name, relation, value) for relation, value in entity.facts.items()]
        world.questions[split] = [_ask(entity, relation, rng) for entity in everyone for relation in entity.facts]
        by_name = {entity.name: entity for entity in everyone}
        chains = [_ask_chain(entity, length, by_name, rng) for entity in everyone for length in (2, 3)]
        world.multihop[split] = [question for question in chains if question is not None]
        asked = world.questions[split] + world.multihop[split]
        people = [entity.name for entity in entities["person"]]
        world.unanswerable[split] = _ask_of_nobody(asked, people, random.Random(f"{seed}/nobody/{split}"))
    return world


class _Names:
    """Hands out words that were never handed out before, so that two splits cannot share one."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.used: set[str] = set()

    def word(self) -> str:
        middle = 0 if self.rng.random() < 0.75 else 1
        for attempt in range(1000):
            syllables = [self.rng.choice(_FIRST) for _ in range(1 + middle + attempt // 2)]  # longer when words run out
            word = "".join(syllables).capitalize() + self.rng.choice(_LAST)
            if word not in self.used and word not in _UNFIT:
                self.used.add(word)
                return word
        raise AssertionError("no free name found")

    def people(self, count: int) -> list[str]:
        """Unique full names; first names recur about three times and last names twice, as distractors."""
        firsts = [self.word() for _ in range(count // 3 + 2)]
        lasts = [self.word() for _ in range(count // 2 + 2)]
        full: dict[str, None] = {}
        while len(full) < count:  # at most half of the pairs are ever taken
            full[f"{self.rng.choice(firsts)} {self.rng.choice(lasts)}"] = None
        return list(full)


def _make_entities(size: int, names: _Names, counts: dict[str, int], rng: random.Random) -> dict[str, list[_Entity]]:
    """Entities of one split by kind, with names and no facts. There is at least one person and one town."""
    works, companies, towns = round(0.25 * size), round(0.15 * size), max(1, round(0.2 * size))
    people = size - works - companies - towns
    named = {
        "person": names.people(people),
        "town": [names.word() for _ in range(towns)],
        "company": [f"{names.word()} {rng.choice(_COMPANY_WORDS)}" for _ in range(companies)],
        "work": [f"{rng.choice(_TITLE_WORDS)} of {names.word()}" for _ in range(works)],
    }
    entities: dict[str, list[_Entity]] = {}
    for kind in KINDS:
        start = counts[kind]
        entities[kind] = [_Entity(f"{kind}_{start + i:05d}", kind, name) for i, name in enumerate(named[kind])]
        counts[kind] += len(named[kind])
    for work in entities["work"]:
        work.genre = rng.choice(list(_MAKERS))
    return entities


def _relate(entities: dict[str, list[_Entity]], names: _Names, rng: random.Random) -> None:
    """Fill in the facts. A relation whose object does not exist in a very small split is left out."""
    people, towns, companies = entities["person"], entities["town"], entities["company"]
    birth: dict[str, int] = {}
    residents: dict[str, list[_Entity]] = {}

    home_order = rng.sample(towns, len(towns))
    for i, person in enumerate(people):
        person.she = i % 2 == 1
        birth[person.name] = rng.randint(1850, 1989)
        home = home_order[i // 2 % len(towns)]  # couples share a home, and every town gets its couples in turn
        residents.setdefault(home.name, []).append(person)
        person.facts["born_in"] = rng.choice(towns).name
        person.facts["birth_year"] = str(birth[person.name])
        person.facts["occupation"] = rng.choice(_OCCUPATIONS)
        if companies:
            person.facts["works_for"] = rng.choice(companies).name
        person.facts["lives_in"] = home.name
        partner = i ^ 1  # 0 and 1, 2 and 3, ...: the last of an odd number stays single
        if partner < len(people):
            person.facts["spouse"] = people[partner].name

    rivers = [names.word() for _ in range(len(towns) // 2 + 1)]
    for town in towns:
        town.facts["river"] = rng.choice(rivers)
        town.facts["mayor"] = rng.choice(residents.get(town.name, people)).name
        town.facts["population"] = str(rng.randint(1000, 99999))
        town.facts["founded_in"] = str(rng.randint(1100, 1849))
        town.facts["known_for"] = f"{names.word()} {rng.choice(_SPECIALITIES)}"

    for company in companies:
        founder = rng.choice(people)
        company.facts["founder"] = founder.name
        company.facts["headquarters"] = rng.choice(towns).name
        company.facts["founded_in"] = str(birth[founder.name] + rng.randint(18, 60))
        company.facts["makes"] = f"{names.word()} {rng.choice(_PRODUCTS)}"
        company.facts["employees"] = str(rng.randint(20, 4999))

    for work in entities["work"]:
        author = rng.choice(people)
        work.facts["author"] = author.name
        work.facts["finished_in"] = str(birth[author.name] + rng.randint(18, 60))
        work.facts["theme"] = rng.choice(_THEMES)
        work.facts["set_in"] = rng.choice(towns).name
        if len(people) > 1:
            other = author
            while other is author:
                other = rng.choice(people)
            work.facts["dedicated_to"] = other.name


def _tell(entity: _Entity, rng: random.Random) -> str:
    """The document: one sentence a fact, in any order; the first sentence names the entity."""
    name = f"the {entity.genre} {entity.name}" if entity.genre else entity.name
    pronoun, possessive = ("it", "Its") if entity.kind != "person" else ("she", "Her") if entity.she else ("he", "His")
    sentences = []
    for relation in rng.sample(list(entity.facts), len(entity.facts)):
        templates = RELATIONS[relation].sentences
        by_name = not sentences or rng.random() < NAME_AGAIN
        # "Its theme", but not "the song Bell of Tavin's theme"; "the theme of the song Bell of Tavin", but not "of it"
        unfit = "{P}" if by_name else "of {s}"
        templates = tuple(template for template in templates if unfit not in template)
        subject = name if by_name else pronoun
        sentence = rng.choice(templates).format(
            S=subject[0].upper() + subject[1:], s=subject, P=possessive, o=entity.facts[relation], maker=entity.maker
        )
        sentences.append(sentence)
    return " ".join(sentences)


def _question_text(entity: _Entity, relation: str, subject: str, rng: random.Random) -> str:
    return rng.choice(RELATIONS[relation].questions).format(x=subject, maker=entity.maker)


def _search_text(entity: _Entity, relation: str) -> str:
    """As one types it into a search box, in one wording: where searches are sampled and rewarded, they differ in what
    they look for and not in how they say it."""
    return f"{entity.name} {entity.maker if relation == 'author' else relation.replace('_', ' ')}"


def wordings(question: dict[str, Any], name: str) -> list[str]:
    """All ways to ask a question about one document, whose entity has this name."""
    templates = RELATIONS[relation_of(question)].questions
    makers = dict.fromkeys(["", *_MAKERS.values()])
    asked = ([template.format(x=name, maker=maker) for template in templates] for maker in makers)
    return next(texts for texts in asked if question["query"] in texts)


def relation_of(question: dict[str, Any]) -> str:
    """What a question about one document asks for."""
    return question["id"].removeprefix(f"{question['doc_ids'][0]}_")


def _ask(entity: _Entity, relation: str, rng: random.Random) -> dict[str, Any]:
    return {
        "id": f"{entity.id}_{relation}",
        "query": _question_text(entity, relation, entity.name, rng),
        "answers": [entity.facts[relation]],
        "doc_ids": [entity.id],
    }


def _ask_chain(start: _Entity, length: int, by_name: dict[str, _Entity], rng: random.Random) -> dict[str, Any] | None:
    """A question that needs `length` documents, or None where this entity starts no such chain.

    The answer stands in none of the earlier documents: reading them only must not be enough. That also rules out
    chains that walk back ("the person married to the person married to X").
    """
    for _ in range(TRIES_PER_CHAIN):
        entity, subject = start, start.name
        visited, relations = [start], []
        while len(visited) < length:
            onward = [relation for relation in entity.facts if RELATIONS[relation].phrase]
            if not onward:
                break
            relations.append(rng.choice(onward))
            subject = RELATIONS[relations[-1]].phrase.format(x=subject, maker=entity.maker)
            entity = by_name[entity.facts[relations[-1]]]
            if entity in visited:
                break
            visited.append(entity)
        if len(visited) < length:
            continue
        relations.append(rng.choice(list(entity.facts)))
        answer = entity.facts[relations[-1]]
        if any(answer in earlier.content for earlier in visited[:-1]):
            continue
        return {
            "id": "_".join([start.id, *relations]),
            "query": _question_text(entity, relations[-1], subject, rng),
            "answers": [answer],
            "doc_ids": [step.id for step in visited],
            "hops": [
                {"query": _search_text(step, relation), "doc_ids": [step.id]}
                for step, relation in zip(visited, relations, strict=True)
            ],
        }
    return None


def _ask_of_nobody(asked: list[dict[str, Any]], people: list[str], rng: random.Random) -> list[dict[str, Any]]:
    """Questions like those asked, about people who do not exist: first and last name are of two others, so that search
    finds both of them. As many as there are people, where that many have a question."""
    firsts, lasts = zip(*(name.split() for name in people), strict=True)
    taken, made = set(people), []
    of_people = [(question, name) for question in asked if (name := person_in(question["query"], taken))]
    for question, name in rng.sample(of_people, min(len(people), len(of_people))):
        for _ in range(TRIES_PER_CHAIN):
            nobody = f"{rng.choice(firsts)} {rng.choice(lasts)}"
            if nobody not in taken:
                first_search = question.get("hops", [question])[0]["query"].replace(name, nobody)
                made.append(
                    {
                        "id": f"{question['id']}_of_nobody",
                        "query": question["query"].replace(name, nobody),
                        "answers": [],
                        "doc_ids": [],
                        "hops": [{"query": first_search, "doc_ids": []}],
                    }
                )
                break
    return made


def person_in(text: str, people: set[str]) -> str:
    """The first of these names, of two words each, that the text has; "" if it has none."""
    words = text.replace("?", "").replace("'s", "").split()
    return next((name for pair in pairwise(words) if (name := " ".join(pair)) in people), "")


def reading_conversations(world: World, split: str, seed: int = 0) -> list[dict[str, Any]]:
    """Chats about one document pasted into the first message: all its questions, in random order, one a turn."""
    rng = random.Random(f"{seed}/reading/{split}")
    contents = {document["id"]: document["content"] for document in world.documents}
    asked: dict[str, list[dict[str, Any]]] = {}
    for question in world.questions[split]:
        asked.setdefault(question["doc_ids"][0], []).append(question)
    talks = []
    for document_id, questions in asked.items():
        rng.shuffle(questions)
        messages = []
        for number, question in enumerate(questions):
            passage = f"{contents[document_id]}\n\n" if number == 0 else ""
            messages.append({"role": "user", "content": passage + question["query"]})
            messages.append({"role": "assistant", "content": question["answers"][0]})
        talks.append({"messages": messages})
    rng.shuffle(talks)
    return talks
