r"""Verdicts: `Therefore: Yes`, and what may stand around it.

A mention is `Therefore:`. It counts where it goes on to a verdict (or to both), through nothing but emphasis, quotes,
boxes and "the answer is". What may follow a verdict is a closed list: the end, a line, a full stop, a comma, a dash or
brackets, or a reason that begins with a word of `_REASON_WORDS`; so `Therefore: No direct edge joins A and B` is a
sentence and no verdict, and `Yes?` is none either. `Therefore: Yes, and …` is one: whoever adds to it does not take
it back. Nothing after the verdict may contradict it: the other verdict standing as an answer (`No.` or `is: No`, not
`No graph lacks it`), or words that take it back. Mentions that count have to agree.

The text is read twice: as it stands, and with look-alike letters turned to Latin ones and what is invisible taken out.
Where the two differ, something hides, and nothing is read.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

from pipeline.scoring.reading import INVISIBLE, Reading, compatible, latin, unread, without_invisible

YES_NO = ("Yes", "No")
MENTIONS, STATED = 1000, 20  # how often Therefore: may stand, and a verdict be stated: more is none
_START, _END = r"(?<![^\W_])", r"(?![^\W_])"  # of a word; unlike \b, an underscore is emphasis
_MENTION = re.compile(r"\bTherefore\b[\s*_\"'“”`]{0,40}:", re.IGNORECASE)
_FONT = r"\\(?:text(?:bf|it|rm|tt)?|math(?:rm|bf|it)|boxed|fbox|emph|underline|bf|rm)(?![A-Za-z])"
_OPENERS = re.compile(
    rf"[\s*_\"'“”„‘’«»`$~({{\[✅✔☑]+|[-•]\s|{_FONT}|\\[(\[,;:! ]|<(?:answer|b|i|em|strong)>"
    r"|(?:the\s{1,9})?(?:final\s{1,9}|correct\s{1,9})?answer(?:\s{1,9}is\b|(?=\s{0,9}:))\s{0,9}:?",
    re.IGNORECASE,
)
_CLOSERS = re.compile(r"[*_\"'“”‘’«»`$})\]✅✔☑]+|\\[)\]]|</(?:answer|b|i|em|strong)>|[ \t]+(?=[*_\"'”’»`$})\]✅✔☑])")
_REASON_WORDS = r"indeed|because|since|as|given|due\s{1,9}to|it|the|this|that|there"
_FOLLOWS = re.compile(rf"\s*\Z|[^\S\n]*(?:\n|[.,;:!—–(]|-{{1,2}}(?=\s)|(?:{_REASON_WORDS})\b|<)", re.IGNORECASE)
_GOES_ON = re.compile(r"[\s-]*[^\W_]")  # "No direct edge", "No-one": a sentence
# a verdict after the first one stands as an answer, unless a word follows it at once: "no graph", "no-one"
_STANDS = rf"(?!-\w|[^\S\n]{{1,9}}(?!(?:{_REASON_WORDS}|or|and|but)\b)[^\W_])"
_BOTH_WITHIN = 40  # characters after a verdict in which the other one makes it both
_HEDGES = re.compile(
    r"(?:maybe|perhaps|possibly|unclear|undetermined|undecided|uncertain|neither|both|either|it depends"
    r"|i (?:do not|don['’]t) know)"
    r"(?=\s*(?:\Z|[.,;!?\n)*_]))",
    re.IGNORECASE,
)
_RETRACTIONS = (
    r"\b(?:scratch\s{1,9}that|on\s{1,9}second\s{1,9}thoughts?|i\s{1,9}take\s{1,9}(?:that|it)\s{1,9}back|just\s{1,9}kidding"
    r"|or\s{1,9}(?:maybe\s{1,9}|perhaps\s{1,9})?not|the\s{1,9}opposite(?:\s{1,9}is\s{1,9}(?:true|right|the\s{1,9}case))?"
    r"(?=\s{0,9}(?:[.!,\n]|\Z))|the\s{1,9}(?:verdict|answer)\s{1,9}(?:above\s{1,9})?is\s{1,9}(?:wrong|incorrect|not\b|false)"
    r"|not\s{1,9}(?:really|sure|certain)\b|wait\s{0,9}[,.!:])"
)
_CLAIM = r"\bthe\s{1,9}(?:claim|hypothesis|statement|conclusion|answer|verdict)\s{1,9}"
_AGAINST = {  # what contradicts a verdict in words
    "Yes": rf"(?:{_CLAIM}|\b(?:it|this|that|which)\s{{1,9}})(?:is|was)\s{{1,9}}(?:false|wrong|incorrect|untrue|negative"
    r"|not\s{1,9}(?:true|right|correct|so\b|the\s{1,9}case(?!\s{1,9}that)))"
    rf"|{_CLAIM}(?:is\s{{1,9}}not|isn['’]t|does\s{{1,9}}not|doesn['’]t|cannot|fails)\b",
    "No": rf"{_CLAIM}(?:is\s{{1,9}}(?:true|right|correct|entailed|affirmative|positive)|holds)\b",
}
_SENTENCE_END = re.compile(r"[.!?\n;,…—–]")
_DENIES = re.compile(
    r"\b(?:not|never|cannot|wrong|false|incorrect|untrue|den(?:y|ies|ied)|reject(?:s|ed)?|refuse[sd]?|doubt(?:s|ed)?|unless|if"
    r"|whether|instead|rather|neither|nor|unable|would|should|could|might|may|mistake|hardly)\b|n['’]t\b",
    re.IGNORECASE,
)
_OPEN_CLAUSE = re.compile(
    r"\b(?:that|if|whether|not|never|than|of|to|with|either|say(?:s|ing)?|said|writ(?:e|es|ing)|answer(?:s|ed|ing)?"
    r"|conclude[sd]?|claim(?:s|ed)?|be|is|state[sd]?|like|as|conclusion|mean(?:s|ing)?)[\s\"'“”:*_`]*\Z",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class _Words:
    word: re.Pattern[str]  # one of the verdicts
    stated: re.Pattern[str]  # one that is stated without Therefore: (boxed, or after "answer is")
    against: dict[str, re.Pattern[str]]  # what contradicts each


@lru_cache(maxsize=8)
def _patterns(words: tuple[str, ...]) -> _Words:
    one = "|".join(map(re.escape, words))
    against = {}
    for word in words:
        others = [re.escape(other) for other in words if other != word]
        plain = [other for other in others if other in YES_NO]
        rare = [other for other in others if other not in YES_NO]  # an ordinary word, so only written as a verdict
        found = [rf"{_START}(?i:{'|'.join(plain)}){_END}{_STANDS}"] if plain else []
        found += [rf"{_START}(?:{'|'.join(rare)}|{'|'.join(map(str.upper, rare))}){_END}{_STANDS}"] if rare else []
        found += [_RETRACTIONS, *([_AGAINST[word]] if word in _AGAINST else [])]
        against[word] = re.compile(
            "|".join(f"(?i:{part})" if k >= bool(plain) + bool(rare) else part for k, part in enumerate(found))
        )
    boxed = rf"\\boxed\s{{0,9}}\{{\s{{0,9}}(?:{_FONT}\s{{0,9}}\{{)?"
    answered = r"\banswer[\s*_]{0,9}(?:is\b|:)[\s*_:\"'“]{0,9}"
    stated = rf"(?:{boxed}|{answered})({one}){_END}{_STANDS}"
    return _Words(re.compile(rf"(?:{one}){_END}", re.IGNORECASE), re.compile(stated, re.IGNORECASE), against)


def verdict_in(answer: str, words: Sequence[str] = YES_NO) -> Reading[str]:
    """The verdict of the text after a thought: one of `words`, or why there is none."""
    patterns = _patterns(tuple(words))
    plain = compatible(answer)
    broken = without_invisible(re.sub(rf"(?<=[A-Za-z])[{INVISIBLE}]+(?=[A-Za-z])", "\ufffd", plain))
    bared = latin(without_invisible(plain))
    reading = _read(broken, patterns)
    if plain.isascii() or broken == bared:
        return reading
    hidden = _read(bared, patterns)
    if hidden.value == reading.value and hidden.reason == reading.reason:
        return reading
    return hidden if hidden.reason and hidden.reason != "no_verdict" else unread("lookalike")


def _read(text: str, patterns: _Words) -> Reading[str]:
    said, half = set[str](), set[str]()
    end, count = -1, 0
    for word, after in _mentions(text, patterns):
        if after < 0:
            half.add(word)
            continue
        if word == _DENIED:
            return unread("denied_verdict")
        if word == _BOTH:
            return unread("two_verdicts")
        if word == _MANY:
            return unread("too_many_answers")
        said.add(word)
        end, count = after if end < 0 else end, count + 1
        if count > STATED:
            return unread("too_many_answers")
    if not said:
        return unread("no_verdict")
    said |= half | {match[1].capitalize() for match in patterns.stated.finditer(text)}
    if len(said) != 1:
        return unread("two_verdicts")
    (word,) = said
    return unread("two_verdicts") if patterns.against[word].search(text, end) else Reading(word)


_BOTH, _DENIED, _MANY = "both", "denied", "many"


def _mentions(text: str, patterns: _Words) -> Iterator[tuple[str, int]]:
    """(its verdict, or `both` or `denied`; where that ends) of each mention that counts.

    -1 for one that a sign follows which ends no verdict (`Yes=`): it gives none, and the other may not stand beside it.
    """
    for count, mention in enumerate(_MENTION.finditer(text)):
        if count == MENTIONS:
            yield _MANY, mention.end()
            return
        place = mention.end()
        while opener := _OPENERS.match(text, place):
            place = opener.end()
        found = patterns.word.match(text, place)
        if found is None:
            if _HEDGES.match(text, place):
                yield _BOTH, place
            continue
        word = found[0].capitalize()
        after = found.end()
        while closer := _CLOSERS.match(text, after):
            after = closer.end()
        near = text[after : after + _BOTH_WITHIN].partition("\n")[0]
        if _FOLLOWS.match(text, after) is None:
            if patterns.against[word].search(near):
                yield _BOTH, after
            elif not _GOES_ON.match(text, after):
                yield word, -1
            continue
        yield _DENIED if _is_denied(text, mention.start()) else word, after


def _is_denied(text: str, place: int) -> bool:
    """Whether the clause that leads to a mention denies it: `It is not the case that Therefore: Yes`."""
    before = text[max(0, place - 200) : place]
    ends = [match.end() for match in _SENTENCE_END.finditer(before)]
    clause = before[ends[-1] if ends else 0 :].rstrip()
    if not clause.strip(" \"'“”*_`:>#-"):
        return False
    if clause.endswith(":") and not _OPEN_CLAUSE.search(clause):
        return False  # "B is not a cause of C: Therefore: No"
    sentence = before[max((match.end() for match in re.finditer(r"[.!?\n]", before)), default=0) :]
    return bool(_DENIES.search(clause) or (_OPEN_CLAUSE.search(clause) and _DENIES.search(sentence)))
