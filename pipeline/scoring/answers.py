r"""The only reader of model text: the thought, what follows it, the verdict, number, expression, choice or words.

The final answer is what stands after the first `</think>`. Nothing inside the thought counts. An unclosed thought, no
answer, or two that disagree are unanswered, and each reader gives the reason, a word of `reading.REASONS`:
`read_verdict`, `read_quantity`, `read_expression`, `read_choice` and `read_words`; `verdict`, `number` and their like
are the same without it. A chat format that pre-fills `<think>` (R1-Distill, tiny) makes a completion begin inside it.

Final answers other than verdicts have to be marked as such (`stated`): after `####`, in `\boxed{}` or `<answer>`,
after "answer is". Everything is read in time that grows with the length of the text only, and nothing is evaluated.
The readers of one short text are in verdicts, quantities, units, arithmetic and expressions.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cache

from pipeline.scoring.expressions import same_expression
from pipeline.scoring.quantities import LONGEST, Quantity, quantity_in, same_quantity, same_value
from pipeline.scoring.reading import REASONS, Reading, compatible, normalised, unread, unwrapped, without_invisible
from pipeline.scoring.units import Unit, unit_of
from pipeline.scoring.verdicts import YES_NO, verdict_in

__all__ = [  # what tasks and rewards may use, the other readers' too
    "CLOSE",
    "LONGEST",
    "OPEN",
    "REASONS",
    "YES_NO",
    "Parts",
    "Quantity",
    "Reading",
    "Unit",
    "answer_text",
    "choice",
    "expression",
    "final_text",
    "has_empty_thought",
    "has_thought",
    "is_well_formed",
    "normalised",
    "number",
    "quantity",
    "quantity_in",
    "read_choice",
    "read_expression",
    "read_quantity",
    "read_text",
    "read_verdict",
    "read_words",
    "same_expression",
    "same_quantity",
    "same_value",
    "split_thought",
    "stated",
    "thinks_then_answers",
    "unit_of",
    "verdict",
    "words",
]

OPEN, CLOSE = "<think>", "</think>"
MOST = 100_000  # characters after a thought, blanks taken together: no model is asked for as many


@dataclass(frozen=True)
class Parts:
    """A completion taken apart. `thought` is None where there is none, `answer` None where a thought never ends."""

    thought: str | None
    answer: str | None
    well_formed: bool  # one thought, opened and closed once, nothing before it


def split_thought(completion: str, prompt_opens_think: bool) -> Parts:
    """Split a completion into thought and answer; `prompt_opens_think`: the prompt already opened the thought."""
    text = completion if prompt_opens_think else completion.lstrip()
    if not prompt_opens_think and OPEN not in text and CLOSE not in text:
        return Parts(None, text, False)
    opened = prompt_opens_think or text.startswith(OPEN)
    before, closed, after = text.partition(CLOSE)
    thought = before if prompt_opens_think else before.partition(OPEN)[2]
    if not closed:
        return Parts(thought, None, False)
    tags = text.count(OPEN) + text.count(CLOSE) + prompt_opens_think
    return Parts(thought, after, opened and tags == 2)


def answer_text(completion: str, prompt_opens_think: bool) -> str | None:
    """What stands after the thought; None where the thought never ends or a second one begins."""
    answer = split_thought(completion, prompt_opens_think).answer
    return None if answer is None or OPEN in answer or CLOSE in answer else answer


def final_text(completion: str, prompt_opens_think: bool) -> Reading[str]:
    """The text that holds the final answer, or why there is none."""
    answer = split_thought(completion, prompt_opens_think).answer
    if answer is None:
        return unread("unclosed_thought")
    if OPEN in answer or CLOSE in answer:
        return unread("two_thoughts")
    answer = answer[:-200] + _STOP_TOKENS.sub("", answer[-200:])
    if len(answer) > MOST:
        answer = re.sub(r"\s{2,}", lambda blanks: "\n" if "\n" in blanks[0] else " ", answer)
        if len(answer) > MOST:
            return unread("too_long")
    return Reading(answer) if answer.strip() else unread("empty")


_STOP_TOKENS = re.compile(r"(?:\s{0,20}(?:<\|[A-Za-z_]{2,20}\|>|</s>|<end_of_turn>|<eos>)){1,8}\s{0,20}\Z")  # left in


def read_text(completion: str, prompt_opens_think: bool) -> Reading[str]:
    """The answer as prose, for tasks whose answers nothing verifies."""
    text = answer_text(completion, prompt_opens_think)
    if text is None:
        return unread(final_text(completion, prompt_opens_think).reason or "unread")
    return Reading(text.strip()) if text.strip() else unread("empty")


def _has_words(text: str | None) -> bool:
    """Whether a thought says something: a dot or blanks are no thought."""
    return re.search(r"[^\W_]", text or "") is not None


def has_thought(completion: str, prompt_opens_think: bool) -> bool:
    """Whether the completion thinks, in words, and comes to an end of it."""
    parts = split_thought(completion, prompt_opens_think)
    return parts.answer is not None and _has_words(parts.thought)


def has_empty_thought(completion: str) -> bool:
    """Whether there is nothing at all between the tags of a thought."""
    thought = split_thought(completion, prompt_opens_think=False).thought
    return thought is not None and not thought.strip()


def thinks_then_answers(completion: str, prompt_opens_think: bool) -> bool:
    """Whether the completion is one thought that has words, then an answer."""
    parts = split_thought(completion, prompt_opens_think)
    return bool(parts.well_formed and _has_words(parts.thought) and parts.answer and parts.answer.strip())


# ---------------------------------------------------------------- verdicts


@cache
def _verdict_alone(words: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile(rf"\s*Therefore: (?:{'|'.join(map(re.escape, words))})\s*")


def read_verdict(completion: str, prompt_opens_think: bool, words: Sequence[str] = YES_NO) -> Reading[str]:
    """`Yes`, `No` (or another of `words`), or why the completion does not commit to one of them."""
    text = final_text(completion, prompt_opens_think)
    return text if text.value is None else verdict_in(text.value, words)


def verdict(completion: str, prompt_opens_think: bool, words: Sequence[str] = YES_NO) -> str | None:
    """`Yes`, `No` (or another of `words`), or None where the completion does not commit to one of them."""
    return read_verdict(completion, prompt_opens_think, words).value


def is_well_formed(
    completion: str, prompt_opens_think: bool, words: Sequence[str] = YES_NO, *, empty_thought: bool = False
) -> bool:
    """Whether the completion is one thought that has words, then `Therefore: Yes` or `Therefore: No` alone.

    `empty_thought`: of a task that teaches no thoughts, nothing at all between the tags will do as well.
    """
    parts = split_thought(completion, prompt_opens_think)
    thinks = _has_words(parts.thought) or (empty_thought and parts.thought is not None and not parts.thought.strip())
    return parts.well_formed and thinks and bool(_verdict_alone(tuple(words)).fullmatch(parts.answer or ""))


# ---------------------------------------------------------------- final answers that are marked as such

MARKS = 20  # how often a final answer is stated: what is more is none
_MARK = re.compile(
    r"(?P<hashes>(?<!\#)\#{4}(?!\#))|(?P<box>\\(?:boxed|fbox)(?![A-Za-z]))|(?P<tag><answer>)"
    r"|(?P<loose>\banswer\b(?:\sto\s[^.:\n]{1,80}?(?=\s(?:is|are)\b))?[\s*_\"']*"
    r"(?:(?:is|are|equals|(?:should|must)\sbe)\b|[:：=])|\bcorrect\s(?:option|choice)\b[\s*_]*(?:is\b|[:：])"
    r"|答案\s?(?:是|为|[:：])|^[\#*_ \t]*(?:the[ \t])?(?:final[ \t])?answer[*_ \t]*$)",
    re.IGNORECASE | re.MULTILINE,
)
_LEAD = re.compile(r"(?:[\s*_:：]|\\\[|\\\(|\$\$|(?:therefore|thus|then|hence|simply|clearly)\b,?)+", re.IGNORECASE)
_LEADS_ON = re.compile(
    r"(?:^|[.,;:\s])\s{0,9}(?:(?:so|thus|hence|therefore),?\s{0,9})?(?:the|my|our)?\s{0,9}(?:final|correct|right)?\s{0,9}$",
    re.IGNORECASE,
)
_HOPE = re.compile(r"[\s$.]*\bI hope (?:it|this) is correct\b.*", re.IGNORECASE | re.DOTALL)
_DENIED_BEFORE = re.compile(
    r"(?:\b(?:not|never|cannot\s{1,9}be)|n['’]t"
    r"|\b(?:not|n['’]t|wrong|false|incorrect|untrue|den(?:y|ies)|doubt|reject)\b[^.,;:!?\n]{0,40}\bthat\b"
    r"|\b(?:wrong|incorrect|false|not)\s{1,9}to\s{1,9}(?:say|write|answer|claim|conclude))"
    r"(?:\s{1,9}that)?(?:\s{1,9}(?:the|my|our))?(?:\s{1,9}(?:final|correct))?(?:\s{1,9}answer\s{1,9}is)?"
    r"[\s\"'“$:*_({\\\[]{0,20}$",
    re.IGNORECASE,
)
_HEDGED_AFTER = re.compile(
    r"[\s$*_]{0,9}(?:\\text\{\s{0,9}or\s{0,9}\}|or\b|/|⁄|\ufffd)[\s$]{0,9}(-?[0-9][0-9.,]{0,40})"
)
_HEADING = re.compile(r"[0-9]{1,2}[.)]\s+\W{0,4}[A-Za-z]")  # #### 1. Add the prices
_MORE_THAN_ONE = re.compile(r"[-+$\\\s]{0,9}[0-9][0-9.,]{0,40}\s{0,9}(?:,\s|;|(?:but|or|and|not|no|wait|actually)\b)")
_DENIED_AFTER = re.compile(
    r"[\s$.*_\"'”)\]\\}]{0,9}(?:is|are|was|would\s{1,9}be)\s{1,9}(?:not|wrong|incorrect|false|untrue)\b", re.IGNORECASE
)


def stated(text: str | None) -> list[str]:
    r"""Every final answer that is marked as one: after `####`, in `\boxed{}` or `<answer>`, after "answer is".

    Four # mark one only with mathematics or a letter on their line or the next (`#### Step 1` is a heading), and an
    empty box marks none. Beside a strict mark the looser words count only where they name a number: `The answer is 6.
    #### 5` is two answers. Empty where there is none, and where one is too long, denied or marked too often.
    """
    return _stated(text or "").value or []


def _stated(text: str) -> Reading[list[str]]:
    strict, loose, headings = list[str](), list[str](), list[str]()
    text = text if text.isascii() else without_invisible(text, "\ufffd")
    for count, mark in enumerate(_MARK.finditer(text), 1):
        if count > MARKS:
            return unread("too_many_answers")
        found = _content(text, mark)
        if found is None:
            return unread("no_answer")
        content, end = found
        if mark["hashes"] and _HEADING.match(content):
            headings.append(content)
            continue
        if not content or (mark["hashes"] and not _is_final(content)):
            continue
        if _DENIED_BEFORE.search(text, max(0, mark.start() - 120), mark.start()) or _DENIED_AFTER.match(text, end):
            return unread("denied_answer")
        hedge = _HEDGED_AFTER.match(text, end)
        if hedge and not same_expression(content, hedge[1].rstrip(".,")):
            return unread("two_answers")
        if mark["loose"]:
            loose.append(content)
        elif len(content) > LONGEST:
            return unread("too_long")
        else:
            strict.append(content)
    if strict:
        return Reading([*(content for content in loose if _is_value(content)), *strict])
    if not loose and len(headings) == 1 and quantity_in(headings[0]):
        return Reading(headings)  # "#### 72. That is all.", where nothing else is an answer
    short = [content for content in loose if len(content) <= LONGEST]
    return Reading(short) if short else unread("too_long" if loose else "no_answer")


def _content(text: str, mark: re.Match[str]) -> tuple[str, int] | None:
    """(what a mark states, where that ends), empty where another mark states it; None for braces that never close."""
    place = mark.end()
    if mark["box"]:
        inner = _braces(text[place : place + LONGEST + 20])
        if inner is None:
            return None
        return ("" if re.search(r"\\(?:boxed|fbox)(?![A-Za-z])", inner) else inner.strip(), place + len(inner) + 2)
    if lead := _LEAD.match(text, place):
        place = lead.end()
    rest = text[place : place + LONGEST + 20]
    content = rest.partition("</answer>")[0] if mark["tag"] and "</answer>" in rest else rest.partition("\n")[0]
    end = place + len(content)
    if box := re.search(r"\\(?:boxed|fbox)(?![A-Za-z])", content):
        first = content[: box.start()].strip(" $=*_")  # "the answer is \boxed{5}": the box says it
        return first if _is_value(first) else "", end
    parts = _MARK.split(content, maxsplit=1)
    if len(parts) > 1:
        content = _LEADS_ON.sub("", parts[0])
    return _HOPE.sub("", content).replace(r"\]", "").replace("$$", "").strip("\ufffd \t\r").strip("*_").strip(), end


def _is_value(text: str) -> bool:
    """Whether a text is one number or one letter, which words before another answer are not."""
    return quantity_in(text) is not None or re.fullmatch(r"\(?[A-Z]\)?[.,:]?", text) is not None


def _is_final(text: str) -> bool:
    """Whether what follows four # is an answer: a number (or two), a formula, a letter; not a heading."""
    if quantity_in(text) or _MORE_THAN_ONE.match(text):
        return True
    plain = re.sub(r"\\[A-Za-z]+", " ", unwrapped(text, " "))
    return re.search(r"[^\W_]", text) is not None and re.search(r"[^\W\d_]{2}", plain) is None


def _braces(text: str) -> str | None:
    """The content of the braces that the text begins with; None where there are none or they never close."""
    text, depth, place = text.lstrip(), 0, 0
    while place < len(text):
        letter = text[place]
        if letter == "\\":
            place += 2
            continue
        depth += (letter == "{") - (letter == "}")
        if depth == 0:
            return text[1:place] if place else None
        place += 1
    return None


def _marked(completion: str, prompt_opens_think: bool) -> Reading[list[str]]:
    text = final_text(completion, prompt_opens_think)
    return unread(text.reason or "unread") if text.value is None else _stated(text.value)


# ---------------------------------------------------------------- numbers and expressions


def read_quantity(completion: str, prompt_opens_think: bool) -> Reading[Quantity]:
    """The number (with its unit) that the completion states as its final answer, or why there is none."""
    texts = _marked(completion, prompt_opens_think)
    if texts.value is None:
        return unread(texts.reason or "unread")
    found = [quantity_in(text) for text in texts.value]
    one = found[-1]
    if one is None or None in found:
        return unread("no_number")
    return Reading(one) if all(same_value(one, other) for other in found if other) else unread("two_numbers")


def quantity(completion: str, prompt_opens_think: bool) -> Quantity | None:
    """The number (with its unit) that the completion states as its final answer; None where two disagree."""
    return read_quantity(completion, prompt_opens_think).value


def number(completion: str, prompt_opens_think: bool) -> Fraction | None:
    """The number that the completion states as its final answer."""
    found = quantity(completion, prompt_opens_think)
    return found.value if found else None


def read_expression(completion: str, prompt_opens_think: bool) -> Reading[str]:
    """The final answer as written, or why there is none."""
    texts = _marked(completion, prompt_opens_think)
    if texts.value is None:
        return unread(texts.reason or "unread")
    found = [_formula(text) for text in texts.value]
    return Reading(found[-1]) if all(same_expression(found[-1], one) for one in found[:-1]) else unread("two_answers")


def expression(completion: str, prompt_opens_think: bool) -> str | None:
    """The final answer as written; None where there is none, or two that are not the same."""
    return read_expression(completion, prompt_opens_think).value


def _formula(text: str) -> str:
    """A final answer without the sentence around it: `$x = 5$, which …` is `x = 5`."""
    formula = re.match(r"\$([^$]+)\$\s*(?:[.,;]\s|[.,;]?$)|\\\((.+?)\\\)\s*(?:[.,;]\s|[.,;]?$)", text)
    if formula and not re.search(r"\$", text[formula.end() :]):
        return (formula[1] or formula[2]).strip()
    return re.split(r"\.(?=\s|$)", text, maxsplit=1)[0].strip()


# ---------------------------------------------------------------- choices and words

_CHOICE = re.compile(r"\(?(?P<letter>[A-E])\)?(?=\s*(?:$|[.,:;)\]]|because\b|since\b|\n))")
_OTHER = re.compile(
    r"(?:\b(?:or|and|but|not|rather|actually)\b|[,;/&|])[^.\n]{0,24}?\(?(?<![A-Za-z])(?:[B-E]|A(?!\s+[a-z]))(?![A-Za-z'-])"
)
_LISTED = re.compile(r"(?<![A-Za-z])([A-E])\)")  # a choice as it is listed in a question


def read_choice(completion: str, prompt_opens_think: bool) -> Reading[str]:
    """The letter A-E that the completion states, marked as its answer or alone, or why there is none."""
    text = final_text(completion, prompt_opens_think)
    if text.value is None:
        return text
    marked = _stated(text.value)
    found = marked.value or []
    if not found and marked.reason == "no_answer" and len(text.value.strip()) <= len("**(A)**."):
        found = [text.value.strip()]
    if not found:
        return unread(marked.reason or "no_answer")
    plain = [
        re.sub(
            r"^(?:option|choice|letter)\s+",
            "",
            unwrapped(compatible(one), r"\1").strip(" $*_\"'`“”‘’"),
            flags=re.IGNORECASE,
        )
        for one in found
    ]
    letters = {match["letter"] if match else None for match in map(_CHOICE.match, plain)}
    if None in letters:
        return unread("no_choice")
    plain = [re.split(r"\b(?:because|since)\b", one, maxsplit=1)[0] for one in plain]
    if len(letters) != 1 or any(_OTHER.search(one) or len(set(_LISTED.findall(one))) > 1 for one in plain):
        return unread("two_choices")
    return Reading(letters.pop())


def choice(completion: str, prompt_opens_think: bool) -> str | None:
    """The letter A-E that the completion states, marked as its answer or alone; None where it names two."""
    return read_choice(completion, prompt_opens_think).value


def read_words(completion: str, prompt_opens_think: bool) -> Reading[str]:
    """The final answer in normalised words, or why there is none."""
    texts = _marked(completion, prompt_opens_think)
    if texts.value is None:
        return unread(texts.reason or "unread")
    found = {normalised(text) for text in texts.value}
    if len(found) != 1:
        return unread("two_answers")
    said = found.pop()
    return Reading(said) if said else unread("no_words")


def words(completion: str, prompt_opens_think: bool) -> str | None:
    """The final answer in normalised words; None where there is none, or two that differ."""
    return read_words(completion, prompt_opens_think).value
