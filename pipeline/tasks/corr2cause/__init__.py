"""Corr2Cause: does a causal claim follow from a list of correlations and independences? (Jin et al. 2024)

    task: {name: corr2cause, params: {n: [3, 4, 5], letters: permuted, ...}}

`correct` data, generated exactly: every Markov equivalence class on N variables is enumerated, split into
training, validation and test by canonical class *before* renaming, so that no graph of a test row was ever seen
under other letters; then every row renames its variables at random. Half of every set is Yes, within each number
of variables and type of claim, so neither tells the answer. `path` reads rows in the published schema, which have
no proofs: their targets are verdicts.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from hashlib import sha256
from itertools import combinations, permutations
from pathlib import Path
from string import ascii_uppercase
from typing import Annotated, Any, Literal

from pipeline import answers
from pipeline.errors import DataError
from pipeline.rows import file_rows, good_rows, lacks
from pipeline.tasks.corr2cause import text
from pipeline.tasks.corr2cause.graphs import MAX_N, RELATIONS, EquivalenceClass, classes
from pipeline.tasks.corr2cause.trace import proof
from pipeline.tasks.task import Example, Splits, Task, Verdict
from pipeline.typed import Check, Count, Positive, Share

Size = Annotated[int, Check(f"a whole number from 2 to {MAX_N}", lambda v: 2 <= v <= MAX_N)]


@dataclass(frozen=True)
class Phase:
    """A stretch of the SFT rows: which numbers of variables, and how many rows."""

    n: tuple[Size, ...]
    rows: Positive
    traces: Share = 1.0  # share whose target is a proof in the thought; the others state the verdict at once
    shuffled: Share = 0.0  # share whose premise tells its statements in random order: no short cut by position


@dataclass(frozen=True)
class Corr2CauseParams:
    """`task.params`: which rows, how many, how they are split and told."""

    n: tuple[Size, ...] = (3, 4, 5)  # numbers of variables in the GRPO, validation and test rows
    letters: Literal["permuted", "alphabet"] = "permuted"  # the first N letters in random order, or any N of 26
    max_independences: Positive | None = None  # leaves classes out, of all sets alike, whose premises are longer
    validation_classes: Share = 0.1  # share of the classes of each N
    test_classes: Share = 0.2
    grpo_only_classes: Share = 0.0  # share of the training classes that SFT does not see
    phases: tuple[Phase, ...] = (Phase((3, 4, 5), 1000),)  # SFT rows in the order of a curriculum
    instruction: str = text.INSTRUCTION  # the last line of the question; "" for none
    grpo_rows: Count = 1000
    validation_rows: Count = 200
    test_rows: Count = 1000
    perturbed_rows: Count = 1000  # of the test rows, repeated in each of the two perturbed sets


@dataclass(frozen=True)
class Slot:
    """A claim about a class, before renaming."""

    mec: EquivalenceClass
    relation: str
    i: int
    j: int
    label: bool


@dataclass(frozen=True)
class Draw:
    """A row before it is put into words: a renamed class, a claim about it, and the names."""

    mec: EquivalenceClass
    relation: str
    i: int
    j: int
    label: bool
    names: tuple[str, ...]
    wording: int
    with_trace: bool
    shuffle: float | None  # the seed of the order in which the premise is told; None: as published


class Corr2Cause(Task):
    name = "corr2cause"
    title = "Corr2Cause: causal claims from correlations"
    Params = Corr2CauseParams
    sources = ("generated", "path")
    positive = "Yes"
    answer_kind = "verdict"
    breakdowns = ("n", "relation")
    published = (
        {"name": "Random", "f1": 0.204},
        {"name": "GPT-4", "f1": 0.291},
        {"name": "Qwen3-32B, direct", "f1": 0.327},
        {"name": "BART-MNLI, best off the shelf", "f1": 0.334},
        {"name": "Qwen3-32B with a knowledge-graph step", "f1": 0.483},
        {"name": "RoBERTa-large-MNLI fine-tuned", "f1": 0.947, "paraphrased": 0.555, "refactored": 0.679},
        {"name": "Exact solver (the ceiling of its label noise)", "f1": 0.952},
    )

    params: Corr2CauseParams

    def load(self) -> Splits:
        if self.source == "path":
            return self._read(Path(self.choice.path or ""))
        parts = split_classes(self.params, self.seed)
        p, sft_parts = self.params, parts["sft"] + parts["both"]
        sft = []
        for k, phase in enumerate(p.phases):
            draws = self._draw(f"sft{k}", sft_parts, phase.n, phase.rows, traces=phase.traces, shuffled=phase.shuffled)
            for row, draw in enumerate(draws):
                example = self._example(draw, f"sft{k}-{row}")
                sft.append(replace(example, tags={**example.tags, "phase": k}))
        grpo = self._draw("grpo", parts["grpo"] + parts["both"], p.n, p.grpo_rows)
        validation = self._draw("validation", parts["validation"], p.n, p.validation_rows, traces=1.0, distinct=True)
        test = self._draw("test", parts["test"], p.n, p.test_rows, distinct=True)
        perturbed = list(enumerate(test[: p.perturbed_rows]))
        tests = {
            "test": [self._example(draw, f"test-{k}") for k, draw in enumerate(test)],
            "paraphrased": [self._example(draw, f"paraphrased-{k}", paraphrased=True) for k, draw in perturbed],
            "refactored": [
                self._example(replace(draw, names=tuple(text.refactored(draw.names))), f"refactored-{k}")
                for k, draw in perturbed
            ],
        }
        return Splits(
            sft,
            [self._example(draw, f"grpo-{k}") for k, draw in enumerate(grpo)],
            [self._example(draw, f"validation-{k}") for k, draw in enumerate(validation)],
            tests,
            _proof_of_split(parts, sft, tests),
        )

    def grade(self, example: Example, completion: str, prefilled: bool) -> Verdict:
        said = answers.verdict(completion, prefilled)
        return Verdict(said == example.gold, said is not None, said)

    def is_well_formed(self, completion: str, prefilled: bool) -> bool:
        return answers.is_well_formed(completion, prefilled)

    def problems(self) -> list[str]:
        p, found = self.params, []
        if p.validation_classes + p.test_classes >= 1:
            found.append(
                f"task.params.test_classes: {p.test_classes} and validation_classes {p.validation_classes} "
                "leave no class for training; their sum must be below 1"
            )
        if not p.phases:
            found.append("task.params.phases: empty; list at least one, such as {n: [3, 4], rows: 1000}")
        return found

    def rehearsal(self) -> dict[str, Any]:
        phase = {"n": [3, 4], "rows": 48, "traces": 1.0, "shuffled": 0.0}
        few = {"grpo_rows": 32, "validation_rows": 0, "test_rows": 12, "perturbed_rows": 6}
        return {"n": [4], "validation_classes": 0.0, "test_classes": 0.4, "phases": [phase], **few}

    def specimens(self) -> list[Example]:
        return [Example("1", "Premise: x\nHypothesis: y", gold, "g") for gold in ("Yes", "No")]

    def split_names(self) -> list[str]:
        perturbed = ["paraphrased", "refactored"] if self.source == "generated" else []
        return ["test", *perturbed, "validation"]

    def _draw(
        self,
        use: str,
        part: list[EquivalenceClass],
        sizes: Iterable[int],
        count: int,
        *,
        traces: float = 0.0,
        shuffled: float = 0.0,
        distinct: bool = False,
    ) -> list[Draw]:
        """`count` rows, half Yes within each (N, type); classes are drawn evenly, variables renamed in each row."""
        rng = random.Random(f"{self.seed}/{use}")  # a text, so that the stream is the same on every machine
        cells = balanced_cells(part, sizes)
        if not count:
            return []
        if not cells:
            raise DataError(
                f"task.params: {count} {use} rows were asked for, but no type of claim has both answers among the "
                f"{len(part)} classes of that split; use larger n or a larger share of classes (N = 3 has one class "
                "with a valid claim, which is used for training)"
            )
        keys = sorted(cells)
        weights = [len({slot.mec.id for label in (True, False) for slot in cells[key][label]}) for key in keys]
        found: dict[object, Draw] = {}
        for _ in range(100 * count):
            key = rng.choices(keys, weights)[0]
            slot = rng.choice(cells[key][len(found) % 2 == 0])
            draw = self._rename(rng, slot, with_trace=rng.random() < traces, shuffle=rng.random() < shuffled)
            asked = (draw.mec.pattern.code, draw.relation, draw.i, draw.j, draw.names, draw.wording)
            found.setdefault(asked if distinct else len(found), draw)
            if len(found) == count:
                return list(found.values())
        raise DataError(
            f"task.params: only {len(found)} different {use} rows can be drawn from the classes of that split, "
            f"{count} were asked for; ask for fewer rows or for larger n"
        )

    def _rename(self, rng: random.Random, slot: Slot, *, with_trace: bool, shuffle: bool) -> Draw:
        n = slot.mec.n
        order = rng.sample(range(n), n)
        mec, relation, i, j = slot.mec.renamed(tuple(order)), slot.relation, order[slot.i], order[slot.j]
        if i > j and relation in _INVERSE:
            relation, i, j = _INVERSE[relation], j, i  # the published types name the earlier letter first
        elif relation not in _INVERSE and rng.random() < 0.5:
            i, j = j, i  # the symmetric types name either first
        names = ascii_uppercase[:n] if self.params.letters == "permuted" else sorted(rng.sample(ascii_uppercase, n))
        seed = rng.random() if shuffle else None
        return Draw(mec, relation, i, j, slot.label, tuple(names), rng.randrange(2), with_trace, seed)

    def _example(self, draw: Draw, id: str, *, paraphrased: bool = False) -> Example:
        names, mec = draw.names, draw.mec
        dependent, independent = text.relations(mec)
        if draw.shuffle is not None:
            rng = random.Random(draw.shuffle)
            rng.shuffle(dependent)
            rng.shuffle(independent)
        claim = text.hypothesis(
            draw.relation, names[draw.i], names[draw.j], wording=draw.wording, paraphrased=paraphrased
        )
        gold, thought = "Yes" if draw.label else "No", ""
        if draw.with_trace:
            thought = proof(mec, names, draw.relation, draw.i, draw.j, independent) + "\n"
        return Example(
            id=id,
            question=text.question(text.premise(names, dependent, independent), claim, self.params.instruction),
            gold=gold,
            group=mec.id,
            tags={
                "n": mec.n,
                "relation": draw.relation,
                "members": len(mec.members),
                "names": "".join(names),
                "i": draw.i,
                "j": draw.j,
            },
            target=f"{answers.OPEN}\n{thought}{answers.CLOSE}\nTherefore: {gold}",
        )

    def _read(self, path: Path) -> Splits:
        """Rows of the published schema (`input`, `label`) as training and test rows, by premise."""
        rows, skipped = read_published(path, self.params.instruction, skip_bad=self.choice.bad_rows == "skip")
        by_premise: dict[str, list[Example]] = {}
        for example in rows:
            by_premise.setdefault(example.group, []).append(example)
        groups = sorted(by_premise)
        random.Random(f"{self.seed}/path").shuffle(groups)
        cut = [round(len(groups) * share) for share in (self.params.test_classes, self.params.validation_classes)]
        parts = [groups[: cut[0]], groups[cut[0] : sum(cut)], groups[sum(cut) :]]
        test, validation, train = ([e for g in part for e in by_premise[g]] for part in parts)
        proof_ = {"rows": len(rows), "skipped": skipped, "premises": [len(part) for part in parts], "overlap": 0}
        return Splits(train, train, validation, {"test": test}, proof_)


_INVERSE = {"parent": "child", "child": "parent", "ancestor": "descendant", "descendant": "ancestor"}


def split_classes(params: Corr2CauseParams, seed: int) -> dict[str, list[EquivalenceClass]]:
    """The classes of each part: test, validation, sft (SFT only is empty), grpo (GRPO only), both.

    Drawn for each N by itself. Where only one class of an N has a valid claim (N = 3), it is used for training.
    """
    parts: dict[str, list[EquivalenceClass]] = {name: [] for name in ("test", "validation", "sft", "grpo", "both")}
    sizes = sorted({*params.n, *(n for phase in params.phases for n in phase.n)})
    for n in sizes:
        known = [mec for mec in classes(n) if len(mec.independences) <= (params.max_independences or 1 << 30)]
        random.Random(f"{seed}/classes/{n}").shuffle(known)
        fruitful = [mec for mec in known if any(slot.label for slot in slots_of(mec))]
        if len(fruitful) == 1:
            known.remove(fruitful[0])
            known.append(fruitful[0])
        test, validation = round(len(known) * params.test_classes), round(len(known) * params.validation_classes)
        training = known[test + validation :]
        held = round(len(training) * params.grpo_only_classes)
        parts["test"] += known[:test]
        parts["validation"] += known[test : test + validation]
        parts["grpo"] += training[:held]
        parts["both"] += training[held:]
    return parts


def slots_of(mec: EquivalenceClass) -> Iterator[Slot]:
    """Every claim about a class: unordered for the symmetric types, one direction for the others' inverses."""
    for i, j in permutations(range(mec.n), 2):
        for relation in RELATIONS:
            if relation in ("child", "descendant") or (relation in ("collider", "confounder") and i > j):
                continue
            yield Slot(mec, relation, i, j, mec.entails(relation, i, j))


def balanced_cells(
    part: Iterable[EquivalenceClass], sizes: Iterable[int]
) -> dict[tuple[int, str], dict[bool, list[Slot]]]:
    """Claims by (N, type) and label, of the cells that have both labels."""
    wanted, cells = set(sizes), {}  # type: ignore[var-annotated]
    for mec in part:
        if mec.n in wanted:
            for slot in slots_of(mec):
                cells.setdefault((mec.n, slot.relation), {True: [], False: []})[slot.label].append(slot)
    return {key: cell for key, cell in cells.items() if cell[True] and cell[False]}


def _proof_of_split(
    parts: dict[str, list[EquivalenceClass]], sft: list[Example], tests: dict[str, list[Example]]
) -> dict[str, Any]:
    """Which canonical classes are where, and that no two parts share one."""
    ids = {name: sorted({mec.id for mec in part}) for name, part in parts.items()}
    overlap = sum(len(set(a) & set(b)) for a, b in combinations(ids.values(), 2))
    trained = {example.group for example in sft}
    tested = {example.group for rows in tests.values() for example in rows}
    if overlap or trained & tested:
        raise AssertionError(f"classes in two splits: {sorted(trained & tested)}")
    return {"overlap": overlap, "classes": ids, "tested": len(tested)}


def read_published(path: Path, instruction: str, *, skip_bad: bool) -> tuple[list[Example], list[str]]:
    """Rows of a file with `input` and `label`; DataError names each bad one by its line."""
    found, skipped = good_rows(file_rows(path), _problem, str(path), skip_bad=skip_bad)
    rows = []
    for row in found:
        premise, _, claim = str(row.values["input"]).partition("\n")
        premise, claim = premise.removeprefix("Premise: "), claim.removeprefix("Hypothesis: ")
        group = sha256(premise.encode()).hexdigest()[:10]
        gold = "Yes" if row.text("label") == "1" else "No"
        tags = {"n": int(premise.split("closed system of ")[1].split()[0])}
        target = f"{answers.OPEN}\n{answers.CLOSE}\nTherefore: {gold}"
        question = text.question(premise, claim, instruction)
        rows.append(Example(f"{path.stem}-{row.line}", question, gold, group, tags, target))
    return rows, skipped


def _problem(values: Any) -> str | None:
    if told := lacks(values, "input", "label"):
        return told
    if str(values["label"]).strip() not in ("0", "1"):
        return f"label {values['label']!r} is neither 0 nor 1"
    if not re.match(r"Premise: .*closed system of \d+ .*\nHypothesis: ", str(values["input"])):
        return 'input is not "Premise: …" and, on the next line, "Hypothesis: …"'
    return None


TASK = Corr2Cause
