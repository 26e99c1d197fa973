"""Corr2Cause: does a causal claim follow from a list of correlations and independences? (Jin et al. 2024)

    task: {name: corr2cause, params: {n: [3, 4, 5], variable_names: permuted, ...}}

`mode: correct` generates rows with exact labels. All Markov equivalence classes on N variables are enumerated (N =
2…6), or classes of random graphs are sampled (N = 7…10). They are split into training, validation and test by canonical
class *before* renaming, so that no test graph occurs in training under other letters. Then every row renames its
variables at random. Half of every set is Yes, within each number of variables and type of claim, so neither predicts
the answer.

`mode: paper` makes the published rows instead, including their wrong labels (`published.py`). Source `path` reads rows
in the published schema. Neither has proofs: their targets are verdicts. More in docs/corr2cause.md.
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
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Protocol

from pipeline.core.errors import DataError
from pipeline.core.schema import Constraint, Fraction, PositiveInt, added
from pipeline.scoring import answers
from pipeline.tasks.corr2cause import wording
from pipeline.tasks.corr2cause.graphs import (
    ENUMERATED_N,
    MAX_N,
    PLUSPLUS,
    PUBLISHED,
    RELATIONS,
    EquivalenceClass,
    Independence,
    Semantics,
    classes,
    sampled,
)
from pipeline.tasks.corr2cause.parse_premise import Claim
from pipeline.tasks.corr2cause.proof_writer import Form, write_proof
from pipeline.tasks.corr2cause.published_rows import COLUMNS, gold_of, label_of, question_of, words_of
from pipeline.tasks.rows import Columns, Row
from pipeline.tasks.task import Example, Grade, Needs, Splits, Task, thought_block

if TYPE_CHECKING:
    from pipeline.tasks.corr2cause.audit import Solver

MAX_ROWS = 10_000_000  # rows of one set: more would take days, and memory
Rows = Annotated[int, Constraint(f"a whole number from 0 to {MAX_ROWS:,}", lambda v: 0 <= v <= MAX_ROWS)]
SomeRows = Annotated[int, Constraint(f"a whole number from 1 to {MAX_ROWS:,}", lambda v: 1 <= v <= MAX_ROWS)]
Drawn = Annotated[int, Constraint("a whole number from 1 to 100,000", lambda v: 1 <= v <= 100_000)]
Members = Annotated[int, Constraint("a whole number from 1 to 10,000", lambda v: 1 <= v <= 10_000)]
Size = Annotated[int, Constraint(f"a whole number from 2 to {MAX_N}", lambda v: 2 <= v <= MAX_N)]


@dataclass(frozen=True)
class Phase:
    """One phase of the SFT curriculum: the numbers of variables, and the number of rows."""

    n: tuple[Size, ...]
    rows: SomeRows
    proof_fraction: Fraction = 1.0  # share of rows with a proof as thought; the others have an empty thought
    shuffled: Fraction = 0.0  # share of rows with the premise's statements in random order: no shortcut by position
    other_names: Fraction = added(0.0)  # share of rows with letters after the first N as names, in any order
    paraphrased: Fraction = added(0.0)  # share of rows with the hypothesis in the words of the paraphrased test set
    proof: Form = "full"  # short: only the links, the shared arrows and the decision; steps: one look-up a word


@dataclass(frozen=True)
class Corr2CauseParams:
    """`task.params`: the rows, their number, splits and wording."""

    n: tuple[Size, ...] = (3, 4, 5)  # numbers of variables in the GRPO, validation and test rows
    mode: Literal["correct", "paper"] = "correct"  # paper: the published rows, with their wrong labels
    style: Literal["published", "paraphrased", "refactored", "plusplus", "story"] = "published"
    semantics: Semantics | None = None  # null: the meaning of the style's wording
    labels: Literal["two", "three"] = "two"  # three: entailed Yes, contradicted No, undetermined Unknown
    balance: Literal["balanced", "natural"] = "balanced"  # balanced: as many of each answer in each (N, type)
    premise: Literal["full", "minimal"] = "full"  # minimal: one smallest separating set per pair
    variable_names: Literal["permuted", "alphabet"] = "permuted"  # the first N letters in random order, or any N of 26
    max_independences: PositiveInt | None = None  # all splits leave out classes with longer premises
    sampled_classes: Drawn = 300  # N ≥ 7: the number of classes sampled for each N
    edge_probability: Fraction = 0.4  # N ≥ 7: the probability of each arrow of a random graph
    max_members: Members = 200  # N ≥ 7: larger classes are left out
    validation_classes: Fraction = 0.1  # share of the classes of each N
    test_classes: Fraction = 0.2
    grpo_only_classes: Fraction = 0.0  # share of the training classes without SFT rows
    phases: tuple[Phase, ...] = (Phase((3, 4, 5), 1000),)  # SFT rows in the order of a curriculum
    instruction: str = wording.INSTRUCTION  # the last line of the question; "" for none
    grpo_rows: Rows = 1000
    validation_rows: Rows = 200
    test_rows: Rows = 1000
    perturbed_rows: Rows = 1000  # of the test rows, repeated in each of the two perturbed sets


class Class(Protocol):
    """The source of rows: an EquivalenceClass, or a PublishedClass with the published labels."""

    @property
    def n(self) -> int: ...
    @property
    def id(self) -> str: ...
    @property
    def independences(self) -> tuple[Independence, ...]: ...
    @property
    def size(self) -> int: ...


@dataclass(frozen=True)
class ClassClaim:
    """A claim about a class, before renaming."""

    mec: Class
    relation: str
    i: int
    j: int
    gold: str


@dataclass(frozen=True)
class RowSpec:
    """A row before it is worded: a renamed class, a claim about it, and the variables' names."""

    mec: Class
    relation: str
    i: int
    j: int
    gold: str
    names: tuple[str, ...]
    wording: int
    with_proof: bool
    shuffle: float | None  # the seed of the order of the premise's statements; None: as published
    who: str = ""  # the study in a story's premise
    proof: Form = "full"
    style: str | None = None  # None: the task's


class Corr2Cause(Task):
    name = "corr2cause"
    title = "Corr2Cause: causal claims from correlations"
    Params = Corr2CauseParams
    sources = ("generated", "path")
    columns: ClassVar[Columns] = COLUMNS
    positive = "Yes"
    answer_kind = "verdict"
    needs: ClassVar[Needs] = dict.fromkeys(("sft", "grpo"), 'input ("Premise: … Hypothesis: …") and label (0 or 1)')
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
    _solver: Solver | None = None

    def load(self) -> Splits:
        if self.source == "path":
            return self._read()
        parts = split_classes(self.params, self.seed)
        p, sft_parts = self.params, parts["sft"] + parts["both"]
        sft = []
        for k, phase in enumerate(p.phases):
            for row, spec in enumerate(self._draw(f"sft{k}", sft_parts, phase)):
                example = self.example(spec, f"sft{k}-{row}")
                sft.append(replace(example, tags={**example.tags, "phase": k}))
        grpo = self._draw("grpo", parts["grpo"] + parts["both"], Phase(p.n, p.grpo_rows, 0.0))
        proofs = float(p.mode == "correct")
        validation = self._draw(
            "validation",
            parts["validation"],
            Phase(p.n, p.validation_rows, proofs, proof=p.phases[-1].proof),
            distinct=True,
        )
        test = self._draw("test", parts["test"], Phase(p.n, p.test_rows, 0.0), distinct=True)
        perturbed = list(enumerate(test[: p.perturbed_rows]))
        tests = {
            "test": [self.example(spec, f"test-{k}") for k, spec in enumerate(test)],
            **{
                style: [self.example(spec, f"{style}-{k}", style=style) for k, spec in perturbed]
                for style in ("paraphrased", "refactored")
            },
        }
        return Splits(
            sft,
            [self.example(spec, f"grpo-{k}") for k, spec in enumerate(grpo)],
            [self.example(spec, f"validation-{k}") for k, spec in enumerate(validation)],
            tests,
            _split_summary(parts, sft, tests),
        )

    def grade(self, example: Example, completion: str, prompt_opens_think: bool) -> Grade:
        reading = answers.read_verdict(completion, prompt_opens_think, self.golds)
        return Grade(reading.value == example.gold, reading.value is not None, reading.value, reason=reading.reason)

    def is_well_formed(self, completion: str, prompt_opens_think: bool) -> bool:
        return answers.is_well_formed(completion, prompt_opens_think, self.golds, empty_thought=not self.proves)

    def check_thought(self, example: Example, completion: str, prompt_opens_think: bool) -> float | None:
        """Return the share of the thought's lines before the first that does not follow; 1 for a proof of the verdict.

        None for a task whose rows have no proofs, and for a question that is not in its words.
        """
        if not self.proves:
            return None
        from pipeline.tasks.corr2cause.proof_checker import check_proof

        thought = answers.split_thought(completion, prompt_opens_think).thought
        if not thought:
            return 0.0
        three = self.params.labels == "three"
        try:
            proof = check_proof(example.question, thought, self.semantics, three=three)
        except ValueError:  # a typed question that is not in the task's words
            return None
        verdict = answers.read_verdict(completion, prompt_opens_think, self.golds).value
        return 1.0 if proof.valid and proof.verdict == verdict else proof.followed / (proof.lines + 1)

    @property
    def proves(self) -> bool:
        """Whether SFT learns proofs. If all its targets are bare verdicts, the format expects an empty thought."""
        return self.source == "generated" and any(phase.proof_fraction for phase in self.params.phases)

    def solve(self, example: Example) -> str | None:
        """Return the exact answer, from the question's text alone; None if it cannot be parsed, or no DAG fits it."""
        from pipeline.tasks.corr2cause.audit import Solver

        if self._solver is None:
            # the wording of a file's rows determines their semantics, unless the recipe sets it
            self._solver = Solver(self.params.semantics if self.source == "path" else self.semantics)
        try:
            status = self._solver.solve(example.question).status
        except ValueError:
            return None
        if status == "undetermined":
            return self.golds[-1]
        return {"entailed": "Yes", "contradicted": "No", None: None}[status]

    @property
    def golds(self) -> tuple[str, ...]:
        return ("Yes", "No", "Unknown") if self.params.labels == "three" else ("Yes", "No")

    @property
    def semantics(self) -> Semantics:
        return self.params.semantics or (PLUSPLUS if self.params.style == "plusplus" else PUBLISHED)

    @property
    def instruction(self) -> str:
        """The last line of the question: the recipe's, or the default for labels and style."""
        p = self.params
        if p.instruction != wording.INSTRUCTION:
            return p.instruction
        instruction = wording.INSTRUCTION_THREE if p.labels == "three" else wording.INSTRUCTION
        return f"{instruction} {wording.EDGES}" if p.style == "plusplus" else instruction

    def example_from_text(self, question: str) -> Example:
        """Return an example for a typed premise and hypothesis; the instruction is appended if it is missing."""
        instruction = self.params.instruction
        whole = question if not instruction or question.endswith(instruction) else f"{question}\n{instruction}"
        return super().example_from_text(whole)

    def problems(self) -> list[str]:
        p, found = self.params, []
        if p.validation_classes + p.test_classes >= 1:
            found.append(
                f"task.params.test_classes: {p.test_classes} and validation_classes {p.validation_classes} "
                "leave no class for training. Fix: keep their sum below 1"
            )
        if p.mode == "paper":
            found += [
                f"task.params.phases[{k}].proof_fraction: got {phase.proof_fraction:g}; expected 0, because mode paper "
                "has wrong labels, and a proof cannot end in a wrong label. Fix: set it to 0"
                for k, phase in enumerate(p.phases)
                if phase.proof_fraction
            ]
            if max({*p.n, *(n for phase in p.phases for n in phase.n)}) > ENUMERATED_N:
                found.append(f"task.params.n: the published set, which mode paper makes, ends at n = {ENUMERATED_N}")
            fixed = {"labels": "two", "semantics": None, "premise": "full", "variable_names": "permuted"}
            found += [
                f"task.params.{name}: mode paper makes the published rows, which have no such option. Fix: leave it out"
                for name, default in fixed.items()
                if getattr(p, name) != default
            ]
            if p.style in ("plusplus", "story"):
                found.append(
                    f"task.params.style: got {p.style}; expected published, paraphrased or refactored in mode paper"
                )
        if not p.phases:
            found.append("task.params.phases: got none; expected at least one, such as {n: [3, 4], rows: 1000}")
        return found

    def smoke_test_params(self) -> dict[str, Any]:
        phase = {"n": [3, 4], "rows": 48, "proof_fraction": 1.0, "shuffled": 0.0}
        few = {"grpo_rows": 32, "validation_rows": 0, "test_rows": 12, "perturbed_rows": 6}
        return {"n": [4], "validation_classes": 0.0, "test_classes": 0.4, "phases": [phase], **few}

    def audit_examples(self) -> list[Example]:
        """Return two rows about a collider, with a proof: every reward can score them, the structure reward too."""
        premise = (
            "Suppose there is a closed system of 3 variables, A, B and C. All the statistical relations among these 3 "
            "variables are as follows: A correlates with C. B correlates with C. However, A is independent of B."
        )
        question = f"Premise: {premise}\nHypothesis: A directly causes C."
        thought = thought_block("A B apart given nothing. A C ->. B C ->.")
        return [Example("1", question, gold, "g", target=f"{thought}\nTherefore: {gold}") for gold in ("Yes", "No")]

    def split_names(self) -> list[str]:
        perturbed = ["paraphrased", "refactored"] if self.source == "generated" else []
        return ["test", *perturbed, "validation"]

    def _draw(self, use: str, part: list[Class], phase: Phase, *, distinct: bool = False) -> list[RowSpec]:
        """Draw the rows of a phase, balanced by answer within each (N, type), classes evenly, variables renamed.

        `use` seeds the draw and names the split in errors. Raises DataError if the classes do not yield so many rows.
        """
        rng = random.Random(f"{self.seed}/{use}")  # a text, so that the stream is the same on every machine
        balanced, count = self.params.balance == "balanced", phase.rows
        cells = self._cells(part, phase.n)
        if not count:
            return []
        if not cells:
            raise DataError(
                f"task.params: got {count} {use} rows, but no type of claim has every answer among the {len(part)} "
                "classes of that split. Fix: use larger n or a larger share of classes (N = 3 has one class with a "
                "valid claim, which is used for training)"
            )
        keys = sorted(cells)
        weights = [len({claim.mec.id for claims in cells[key].values() for claim in claims}) for key in keys]
        everything = [] if balanced else [claim for mec in part if mec.n in phase.n for claim in self.claims(mec)]
        found: dict[object, RowSpec] = {}
        for _ in range(100 * count):
            if balanced:
                key = rng.choices(keys, weights)[0]
                claim = rng.choice(cells[key][self.golds[len(found) % len(self.golds)]])
            else:
                claim = rng.choice(everything)
            with_proof, shuffle = rng.random() < phase.proof_fraction, rng.random() < phase.shuffled
            spec = replace(self.rename(rng, claim, with_proof=with_proof, shuffle=shuffle), proof=phase.proof)
            if phase.other_names and not spec.who and rng.random() < phase.other_names:  # a story has words
                spec = replace(spec, names=tuple(rng.sample(ascii_uppercase[spec.mec.n :], spec.mec.n)))
            if phase.paraphrased and rng.random() < phase.paraphrased:
                spec = replace(spec, style="paraphrased")
            identity = (spec.mec.independences, spec.relation, spec.i, spec.j, spec.names, spec.wording)
            found.setdefault(identity if distinct else len(found), spec)
            if len(found) == count:
                return list(found.values())
        raise DataError(
            f"task.params: got {count} {use} rows; expected at most {len(found)}, because the classes of that split "
            "have no more different ones. Fix: set fewer rows or larger n"
        )

    def claims(self, mec: Class) -> Iterator[ClassClaim]:
        """Return every claim about a class with its answer, in the task's semantics and answers."""
        return claims_of(mec, self.semantics, three=self.params.labels == "three")

    def _cells(self, part: Iterable[Class], sizes: Iterable[int]) -> dict[tuple[int, str], dict[str, list[ClassClaim]]]:
        """Group claims by (N, type) and answer; for balanced rows, only groups that have every answer."""
        wanted = set(sizes)
        cells: dict[tuple[int, str], dict[str, list[ClassClaim]]] = {}
        for mec in part:
            if mec.n in wanted:
                for claim in self.claims(mec):
                    cell = cells.setdefault((mec.n, claim.relation), {gold: [] for gold in self.golds})
                    cell[claim.gold].append(claim)
        if self.params.balance == "natural":
            return cells
        return {key: cell for key, cell in cells.items() if all(cell.values())}

    def rename(self, rng: random.Random, claim: ClassClaim, *, with_proof: bool, shuffle: bool) -> RowSpec:
        """Return a row for a claim, with variable names and a wording drawn from `rng`."""
        n, relation = claim.mec.n, claim.relation
        if isinstance(claim.mec, EquivalenceClass):
            order = rng.sample(range(n), n)
            mec: Class = claim.mec.renamed(tuple(order))
            i, j = order[claim.i], order[claim.j]
        else:  # published rows keep their letters, which follow a topological order: one of the set's shortcuts
            mec, i, j = claim.mec, claim.i, claim.j
        if i > j and relation in _INVERSE:
            relation, i, j = _INVERSE[relation], j, i  # the published types name the earlier letter first
        elif relation not in _INVERSE and rng.random() < 0.5:
            i, j = j, i  # the symmetric types name either first
        who = ""
        if self.params.style == "story":
            who, measured = rng.choice(wording.STUDIES)
            names = rng.sample(measured.split(), n)
        else:
            names = list(ascii_uppercase[:n])
            if self.params.variable_names == "alphabet":
                names = sorted(rng.sample(ascii_uppercase, n))
        seed = rng.random() if shuffle else None
        return RowSpec(mec, relation, i, j, claim.gold, tuple(names), rng.randrange(2), with_proof, seed, who)

    def example(self, spec: RowSpec, id: str, *, style: str | None = None) -> Example:
        """Return the example of a row, worded in the task's style or in another."""
        mec, params = spec.mec, self.params
        style, names = style or spec.style or params.style, list(spec.names)
        if style != "story" and spec.who:
            names = list(ascii_uppercase[: mec.n])
        if style == "refactored":
            names = wording.refactored(names)
        minimal = params.premise == "minimal"
        dependent, independent = wording.relations(mec)
        if minimal:
            independent = wording.smallest(independent)
        elif style == "plusplus":
            independent.sort(key=lambda one: (one[:2], len(one[2])))
        if spec.shuffle is not None:
            rng = random.Random(spec.shuffle)
            rng.shuffle(dependent)
            rng.shuffle(independent)
        premise = wording.premise(names, dependent, independent, style, minimal=minimal, who=spec.who)
        claim = wording.hypothesis(spec.relation, names[spec.i], names[spec.j], wording=spec.wording, style=style)
        thought = ""
        if spec.with_proof and isinstance(mec, EquivalenceClass):
            about = Claim(spec.relation, spec.i, spec.j)
            three = params.labels == "three"
            thought = write_proof(mec, names, about, independent, self.semantics, form=spec.proof, three=three)
            if style == "plusplus":
                edges = [f"{names[a]} has a direct causal effect on {names[b]}." for a, b in sorted(mec.pattern.arrows)]
                thought += f"\n{' '.join(edges) or 'No edge is shared.'}"
        return Example(
            id=id,
            question=wording.question(premise, claim, self.instruction),
            gold=spec.gold,
            group=mec.id,
            tags={
                "n": mec.n,
                "relation": spec.relation,
                "members": mec.size,
                "names": ("" if not spec.who else " ").join(names),
                "i": spec.i,
                "j": spec.j,
                "premise_tokens": len(re.findall(r"\w+|[^\w\s]", premise)),  # words and marks
                "mode": params.mode,
                "style": style,
                "seed": self.seed,
            },
            target=f"{thought_block(thought)}\nTherefore: {spec.gold}",
        )

    def _read(self) -> Splits:
        """Return the rows of files, split by premise; the rows of `task.test_path` and `.validation_path` are fixed."""
        rows, skipped = self.read(self.row_problem)
        named, more = self.read_named(self.row_problem)
        given = {name: [self._published(row) for row in rows_] for name, rows_ in named.items()}
        held = {example.group for examples in given.values() for example in examples}
        pool = [self._published(row) for row in rows]
        by_premise: dict[str, list[Example]] = {}
        for example in pool:
            if example.group not in held:
                by_premise.setdefault(example.group, []).append(example)
        groups = sorted(by_premise)
        random.Random(f"{self.seed}/path").shuffle(groups)
        shares = {"test": self.params.test_classes, "validation": self.params.validation_classes}
        cut = [0 if name in given else round(len(groups) * share) for name, share in shares.items()]
        parts = [groups[: cut[0]], groups[cut[0] : sum(cut)], groups[sum(cut) :]]
        test, validation, train = ([e for g in part for e in by_premise[g]] for part in parts)
        test, validation = given.get("test", test), given.get("validation", validation)
        premises = [len({example.group for example in part}) for part in (test, validation, train)]
        left = [example.id for example in pool if example.group in held]
        summary = {
            "rows": len(pool),
            "skipped": skipped + more,
            "premises": premises,
            "overlap": 0,
            "same_question": left,
        }
        return Splits(train, train, validation, {"test": test}, summary)

    def row_problem(self, values: Any) -> str | None:
        """Return the problem of a file's row; None if it is good."""
        try:
            text = words_of(values)
            gold_of(label_of(values), three=self.params.labels == "three")
        except ValueError as error:
            return str(error)
        try:
            premise, _ = question_of(text)
        except ValueError as error:
            return f"input is {error}"
        return None if _VARIABLES.search(premise) else 'the premise has no "closed system of N variables"'

    def _published(self, row: Row) -> Example:
        """Return the example of a file's row in the published schema."""
        premise, claim = question_of(words_of(row.values))
        gold = gold_of(label_of(row.values), three=self.params.labels == "three")
        group = sha256(premise.encode()).hexdigest()[:10]
        variables = _VARIABLES.search(premise)
        tags = {"n": int(variables["n"])} if variables else {}
        target = f"{thought_block('')}\nTherefore: {gold}"
        question = wording.question(premise, claim, self.instruction)
        return Example(f"{Path(row.source).stem}-{row.line}", question, gold, group, tags, target)


_VARIABLES = re.compile(r"closed system of (?P<n>\d+) ")


_INVERSE = {"parent": "child", "child": "parent", "ancestor": "descendant", "descendant": "ancestor"}


def known_classes(params: Corr2CauseParams, n: int, seed: int) -> list[Class]:
    """Return all classes of n variables from which rows are made, in a fixed order."""
    bound = params.max_independences or 1 << 30
    if params.mode == "paper":
        from pipeline.tasks.corr2cause.published import published_classes

        return [mec for mec in published_classes(n) if len(mec.independences) <= bound]
    minimal = params.premise == "minimal"
    found: Iterable[EquivalenceClass] = (
        classes(n)
        if n <= ENUMERATED_N
        else sampled(
            n,
            params.sampled_classes,
            edge_probability=params.edge_probability,
            seed=f"{seed}/sampled/{n}",
            most_members=params.max_members,
            most_independences=None if minimal else params.max_independences,
        )
    )
    return [mec for mec in found if len(wording.smallest(mec.independences) if minimal else mec.independences) <= bound]


def split_classes(params: Corr2CauseParams, seed: int) -> dict[str, list[Class]]:
    """Return the classes of each part: test, validation, sft (always empty), grpo (GRPO only), both.

    Each N is split separately. If only one class of an N has a valid claim (N = 3), it is used for training.
    """
    parts: dict[str, list[Class]] = {name: [] for name in ("test", "validation", "sft", "grpo", "both")}
    sizes = sorted({*params.n, *(n for phase in params.phases for n in phase.n)})
    for n in sizes:
        same: dict[str, list[Class]] = {}
        for mec in known_classes(params, n, seed):
            same.setdefault(mec.id, []).append(mec)  # the published set has six classes twice
        known = list(same.values())
        random.Random(f"{seed}/classes/{n}").shuffle(known)
        with_yes = [unit for unit in known if any(claim.gold == "Yes" for mec in unit for claim in claims_of(mec))]
        if len(with_yes) == 1:
            known.remove(with_yes[0])
            known.append(with_yes[0])
        test, validation = round(len(known) * params.test_classes), round(len(known) * params.validation_classes)
        training = known[test + validation :]
        held = round(len(training) * params.grpo_only_classes)
        cuts = {
            "test": known[:test],
            "validation": known[test : test + validation],
            "grpo": training[:held],
            "both": training[held:],
        }
        for name, units in cuts.items():
            parts[name] += [mec for unit in units for mec in unit]
    return parts


def claims_of(mec: Class, semantics: Semantics = PUBLISHED, *, three: bool = False) -> Iterator[ClassClaim]:
    """Yield every claim about a class: unordered pairs for the symmetric types, one direction for inverse types.

    For a published class, yield all six types of every pair i < j, with the published labels.
    """
    if not isinstance(mec, EquivalenceClass):
        for i, j in combinations(range(mec.n), 2):
            for relation in RELATIONS:
                yield ClassClaim(mec, relation, i, j, "Yes" if mec.entails(relation, i, j) else "No")  # type: ignore[attr-defined]
        return
    for i, j in permutations(range(mec.n), 2):
        for relation in RELATIONS:
            if relation in ("child", "descendant") or (relation in ("collider", "confounder") and i > j):
                continue
            if mec.entails(relation, i, j, semantics):
                gold = "Yes"
            else:
                gold = "Unknown" if three and mec.allows(relation, i, j, semantics) else "No"
            yield ClassClaim(mec, relation, i, j, gold)


def _split_summary(
    parts: dict[str, list[Class]], sft: list[Example], tests: dict[str, list[Example]]
) -> dict[str, Any]:
    """Return the canonical classes of each part, and their overlap; raises AssertionError if two parts share one."""
    ids = {name: sorted({mec.id for mec in part}) for name, part in parts.items()}
    overlap = sum(len(set(a) & set(b)) for a, b in combinations(ids.values(), 2))
    trained = {example.group for example in sft}
    tested = {example.group for rows in tests.values() for example in rows}
    if overlap or trained & tested:
        raise AssertionError(f"classes in two splits: {sorted(trained & tested)}")
    return {"overlap": overlap, "classes": ids, "tested": len(tested)}


TASK = Corr2Cause
