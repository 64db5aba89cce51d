"""Questions and answers out of plain text by rules, without a model.

    pairs = write_by_rules(document, 3)      # [("When was the bridge built?", "1904"), ...]

English only. Each rule reads one sentence and asks for a piece of it, which is the answer, word for word:

    definition   X is a ...                 What is X?
    passive      X was built in 1904        When was X built?   (in Vienna: where; by Ada Lind: by whom)
    year, date   ... moved there in 1904    ... moved there in which year?
    number       X has 42 rooms             How many rooms does X have?
    agent        Ada Lind designed the ...  Who designed the ...?
    initials     World Health Organization (WHO)   What does WHO stand for?
    field        - Weight: 12 kg            What is the weight of X?
    faq          How do I reset it? Hold ...       How do I reset it?

A sentence that begins with "he", "she" or "it" is about the document's title, where that can be. A question that names
nothing is asked "According to <title>". Such questions are plain; the answers are true to the text, which is what
training to read needs. A model writes better ones (tasks/question_writers.py).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

from nanochat.retrieval.chunking import sentences
from nanochat.retrieval.document import Document

Pair = tuple[str, str]

MAX_QUESTION_WORDS, MAX_ANSWER_WORDS = 32, 14
MONTH = "(?:January|February|March|April|May|June|July|August|September|October|November|December)"
DATE = rf"(?:\d{{1,2}} {MONTH} \d{{4}}|{MONTH} \d{{1,2}}, \d{{4}})"
YEAR = r"(?:1[0-9]{3}|20[0-9]{2})"
NAME = r"(?:[A-Z][\w'’.&-]*(?: (?:of|the|de|van|von|and|for|al|la|du|di) (?=[A-Z])| (?=[A-Z0-9]))?)+"
BE = r"(?:is|are|was|were)"
PARTICIPLE = (
    r"(?:\w+ed|born|built|made|held|won|written|founded|found|led|set|known|shot|sold|given|taken|drawn|chosen|sung"
    r"|begun|cut|put|shown|thrown|torn|bought|brought|taught|sent|spent|lost|left|hit|laid)"
)
PAST = (
    r"(?:\w+ed|won|wrote|made|led|became|took|built|founded|found|held|sang|began|gave|drew|chose|lost|left|sold|sent"
    r"|taught|brought|bought|shot|beat|broke|came|went|grew|kept|met|ran|wore)"
)
PERSON = re.compile(
    r"\b(?:actor|actress|architect|artist|athlete|author|bishop|chemist|coach|composer|cricketer|dancer|designer|director"
    r"|doctor|economist|engineer|explorer|film-?maker|footballer|general|guitarist|historian|inventor|journalist|judge"
    r"|king|lawyer|linguist|mathematician|musician|novelist|officer|painter|philosopher|photographer|physicist|pianist"
    r"|pilot|player|poet|politician|priest|producer|professor|queen|rapper|scientist|sculptor|singer|soldier|songwriter"
    r"|swimmer|teacher|writer)\b"
)
NO_SUBJECT = re.compile(
    r"^(?:This|That|These|Those|There|Here|Such|Some|Many|Most|Several|One|Two|Three|Another|Other|Each|Both|All|They"
    r"|Their|His|Her|We|Our|I|You|Your|What|When|Where|Which|Who|While|As|If|Although|Because|After|Before|During|In|At|On|By"
    r"|From|Under|With|For|Of|Within|Among|Since|Until|Despite|According|Not|No|Only|Now|Its|To)\b"
)
CONNECTIVE = re.compile(
    r"^(?:However|Moreover|Furthermore|Additionally|In addition|Also|Therefore|Thus|Meanwhile|Nevertheless|Later"
    r"|Then|Afterwards|Eventually|Subsequently|Today|Initially|Originally|But|And|Finally),? ",
)
COUNTED = {"has": ("does", "have"), "have": ("do", "have"), "had": ("did", "have"), "contains": ("does", "contain")}
COUNTED |= {"contained": ("did", "contain"), "includes": ("does", "include"), "included": ("did", "include")}
COUNTED |= {"employs": ("does", "employ"), "employed": ("did", "employ"), "covers": ("does", "cover")}


def write_by_rules(document: Document, count: int) -> list[Pair]:
    """At most `count` pairs, of different answers, those of the rules first that ask most plainly."""
    topic = document.title.split(":")[0].strip()
    found: list[tuple[int, Pair]] = []
    texts = [document.content[a:b] for a, b in sentences(document.content)]
    about_topic = False
    for at, raw in enumerate(texts):
        following = texts[at + 1] if at + 1 < len(texts) else ""
        sentence, about_topic = _stands_alone(" ".join(raw.split()), topic, about_topic)
        plain = re.sub(r" ?\([^()]*\)", "", sentence)
        for rank, rule in enumerate(RULES):
            read = sentence if rule in (_faq, _initials) else plain
            found += [(rank, pair) for pair in rule(read, topic, " ".join(following.split()))]
    content = " ".join(document.content.split())
    pairs: list[Pair] = []
    for _, (question, answer) in sorted(found, key=lambda one: one[0]):
        question = _with_context(question, topic)
        if _usable(question, answer, content) and not any(question == q or answer == a for q, a in pairs):
            pairs.append((question, answer))
    return pairs[:count]


def _stands_alone(sentence: str, topic: str, about_topic: bool) -> tuple[str, bool]:
    """The sentence with the topic for a pronoun it begins with, where the topic can be meant, and whether it is."""
    sentence = CONNECTIVE.sub("", sentence)
    sentence = sentence[:1].upper() + sentence[1:]
    person = re.fullmatch(NAME, topic) and len(topic.split()) in (2, 3)
    if topic and sentence.startswith(topic):
        return sentence, True
    if topic and (match := re.match(r"(He|She|It) ", sentence)) and (about_topic or (person and match[1] != "It")):
        return f"{topic} {sentence[match.end() :]}", True
    return sentence, False


def _with_context(question: str, topic: str) -> str:
    first = question.split()[0]
    plain = first in ("What", "Who", "When", "Where", "By", "How", "The", "A", "An", "In")
    named = re.search(rf"\b{NAME}", question[len(first) if plain else 0 :])
    if named or not topic or topic.lower() in question.lower():
        return question
    return f"According to {topic}, {first.lower()}{question[len(first) :]}"


def _usable(question: str, answer: str, content: str) -> bool:
    return (
        answer in content
        and 0 < len(answer.split()) <= MAX_ANSWER_WORDS
        and 3 < len(question.split()) <= MAX_QUESTION_WORDS
        and all(text.count(a) == text.count(b) for text in (question, answer) for a, b in ("()", "[]", "“”"))
        and all(text.count('"') % 2 == 0 for text in (question, answer))
        and answer.lower() not in question.lower()
        and not re.search(r"\b(?:he|she|they|his|her|their|him|them|this|these|those)\b", question)
    )


# --- the rules: (sentence, topic, the sentence after it) -> pairs


def _faq(sentence: str, topic: str, following: str) -> Iterator[Pair]:
    question = re.sub(r"^(?:Q\d*[:.)]|\d+[.)]|-)\s*", "", sentence)
    if question.endswith("?") and 4 <= len(question.split()) <= 20 and following and not following.endswith("?"):
        yield question, re.sub(r"^A\d*[:.)]\s*", "", following).rstrip(".")


def _definition(sentence: str, topic: str, following: str) -> Iterator[Pair]:
    match = re.match(rf"(?P<x>[^,;:]{{2,60}}?) (?P<be>{BE}) (?P<y>(?:an?|the|one of) [^;:]+)", sentence)
    if match is None or not _is_subject(match["x"]):
        return
    ends = r",|\. |\.$| (?:who|which|that|where|when|(?:\w+ed )?by|and (?:is|was|has|had))\b"
    answer = re.sub(
        r"(?: (?:in|on|at|of|for|from|with|to|and|or|located|situated|based))+$", "", re.split(ends, match["y"])[0]
    )
    answer = answer.strip()
    if len(answer.split()) > 2:
        who = "Who" if PERSON.search(answer) and match["x"][0].isupper() else "What"
        yield f"{who} {match['be']} {_in_question(match['x'])}?", answer


def _passive(sentence: str, topic: str, following: str) -> Iterator[Pair]:
    match = re.match(rf"(?P<x>[^,;:]{{2,60}}?) (?P<be>{BE}) (?P<verb>{PARTICIPLE})\b(?P<rest>[^;:]*)", sentence)
    if match is None or not _is_subject(match["x"]) or match["x"].startswith(("A ", "An ")):
        return
    said = f"{match['be']} {_in_question(match['x'])} {match['verb']}"
    ends = r"(?=[,.)]| (?:in|on|at|by|to|and|as|from|for|with|when|where|after|before|until|during)\b|$)"
    for asked, pattern in (
        ("When", rf"(?:on|in) (?P<a>{DATE}|{MONTH} {YEAR}|{YEAR}){ends}"),
        ("Where", rf"(?:in|at) (?!{MONTH}\b)(?P<a>(?:the )?{NAME}(?:, {NAME})?){ends}"),
        ("By whom", rf"by (?P<a>(?:the )?{NAME}){ends}"),
    ):
        if found := re.search(rf"(?P<before>.*?) {pattern}", match["rest"]):
            between = re.sub(rf" (?:(?:on|in) )?(?:{DATE}|{MONTH} {YEAR}|{YEAR})\b,?", "", found["before"])
            if len(between.split()) <= 10 and not re.search(r"[.,?!]|\b(?:and|but|who|which)\b", between):
                yield f"{asked} {said}{between}?", found["a"].rstrip(".")


def _when(sentence: str, topic: str, following: str) -> Iterator[Pair]:
    for pattern, asked in (
        (rf"\bon (?P<a>{DATE})", "on which date"),
        (rf"\bin (?P<a>{YEAR})\b(?![-–])", "in which year"),
    ):
        match = re.search(pattern, sentence)
        before = sentence[: match.start()].strip() if match else ""
        if match and len(before.split()) >= 4 and _is_subject(before) and not before.endswith((",", "(", "and")):
            yield f"{before} {asked}?", match["a"]


def _number(sentence: str, topic: str, following: str) -> Iterator[Pair]:
    number = r"(?:\d[\d,]*(?:\.\d+)?|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|twenty|thirty|fifty)"
    counted = rf"(?P<verb>{'|'.join(COUNTED)}) (?:about |over |around |nearly |some )?(?P<a>{number}) (?P<what>[a-z]+s)"
    pattern = rf"(?P<x>[^,;:]{{2,60}}?) {counted}\b"
    if (match := re.match(pattern, sentence)) and _is_subject(match["x"]):
        aid, verb = COUNTED[match["verb"]]
        yield f"How many {match['what']} {aid} {_in_question(match['x'])} {verb}?", match["a"]


def _agent(sentence: str, topic: str, following: str) -> Iterator[Pair]:
    match = re.match(rf"(?P<a>{NAME}) (?P<verb>{PAST}) (?P<rest>[^.;:()]+)", sentence)
    if match and 2 <= len(match["a"].split()) <= 5 and _is_subject(match["a"]):
        rest = match["rest"].split(", ")[0].rstrip(",")
        if len(rest.split()) >= 3:
            yield f"Who {match['verb']} {rest}?", match["a"]


def _initials(sentence: str, topic: str, following: str) -> Iterator[Pair]:
    for match in re.finditer(rf"(?P<a>{NAME}) \((?P<short>[A-Z]{{2,8}})\)", sentence):
        words = match["a"].split()
        for start in reversed(range(len(words))):
            initials = "".join(part[0] for word in words[start:] for part in word.split("-") if part[:1].isupper())
            if initials == match["short"]:
                yield f"What does {match['short']} stand for?", " ".join(words[start:])


def _field(sentence: str, topic: str, following: str) -> Iterator[Pair]:
    match = re.fullmatch(r"(?:[-*•] )?(?P<key>[A-Z][a-z]+(?: [a-z]+){0,3}): (?P<a>[^:?]+?)\.?", sentence)
    if match and topic:
        yield f"What is the {match['key'].lower()} of {topic}?", match["a"]


RULES: tuple[Callable[[str, str, str], Iterator[Pair]], ...] = (
    _faq, _passive, _definition, _number, _field, _initials, _agent, _when
)  # fmt: skip


def _is_subject(text: str) -> bool:
    """Something that can stand by itself, and no clause before it."""
    clause = rf"\b(?:He|She|It|he|she|it|who|which|{BE})\b|\b(?:one|ones|others?|notably|also|then|still|now|\w+ly)$"
    return not NO_SUBJECT.match(text) and "," not in text and not re.search(clause, text)


def _in_question(subject: str) -> str:
    """As it stands inside a sentence: "The bridge" is "the bridge", a name is as it is."""
    first, _, rest = subject.partition(" ")
    return f"{first.lower()} {rest}".strip() if first in ("The", "A", "An") else subject
