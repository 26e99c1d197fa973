"""Audit a file of Corr2Cause rows:   python -m pipeline audit corr2cause --data FILE

The premise of each row is parsed to independences (published wording, or `A indep B | C`). The exact solver computes
the class and the label. The audit lists, by line, wrong labels, premises to which no DAG is faithful, and rows that
cannot be parsed. The exit code is 0 if every row is right, 1 if not, 2 if the file cannot be read; `--json` is for
scripts.
Premises have up to ten variables; each claim takes a fraction of a second.

published_rows.py documents the columns of a row.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from pipeline.scoring.metrics import Outcome, compute_metrics, count_groups
from pipeline.tasks.corr2cause.decide import decide
from pipeline.tasks.corr2cause.graphs import PLUSPLUS, PUBLISHED, EquivalenceClass, Semantics
from pipeline.tasks.corr2cause.parse_premise import Claim, Premise, class_of, read_claim, read_premise
from pipeline.tasks.corr2cause.published_rows import label_of, question_of, words_of
from pipeline.tasks.rows import Row


@dataclass(frozen=True)
class Solved:
    """A parsed row and its solution. `status` is None if no DAG is faithful to the premise."""

    premise: Premise
    claim: Claim
    status: str | None  # entailed, undetermined or contradicted


@dataclass
class Audit:
    """The result of an audit. `line` is the row's line in a text file, its number in other files."""

    rows: int = 0
    malformed: list[dict[str, Any]] = field(default_factory=list)  # line, problem
    unfaithful: list[dict[str, Any]] = field(default_factory=list)  # line, said
    wrong: list[dict[str, Any]] = field(default_factory=list)  # line, n, relation, said, right
    by: dict[str, dict[str, dict[str, int]]] = field(default_factory=lambda: {"n": {}, "relation": {}})
    reproduced: int | None = None  # rows that `paper` mode makes, premise and label; None: not compared
    outcomes: list[Outcome] = field(default_factory=list)  # the solver as a model, graded by the file's labels

    @property
    def clean(self) -> bool:
        """Whether every row is right."""
        return not (self.malformed or self.unfaithful or self.wrong)

    def solver(self) -> dict[str, float]:
        """Return F1, accuracy and more of the exact solver on the file's labels: the ceiling set by label noise."""
        if not self.outcomes:
            return {}
        found = compute_metrics(count_groups(self.outcomes, ["all"]).total())
        return {name: round(float(found[name]), 4) for name in ("f1", "balanced_accuracy", "mcc", "accuracy")}

    def record(self) -> dict[str, Any]:
        """Return the audit as JSON values, for scripts."""
        return {
            "rows": self.rows,
            "clean": self.clean,
            "wrong_labels": len(self.wrong),
            "unfaithful_premises": len(self.unfaithful),
            "malformed_rows": len(self.malformed),
            "reproduced_by_paper_mode": self.reproduced,
            "solver": self.solver(),
            "by_n": self.by["n"],
            "by_relation": self.by["relation"],
            "wrong": self.wrong,
            "unfaithful": self.unfaithful,
            "malformed": self.malformed,
        }


class Solver:
    """Parses rows and decides them exactly; premises are cached."""

    def __init__(self, semantics: Semantics | None = None) -> None:
        self.semantics = semantics  # None: the meaning of the premise's wording
        self.known: dict[str, tuple[Premise, EquivalenceClass | None] | str] = {}

    def solve(self, text: str) -> Solved:
        """Solve a whole row, "Premise: …" and "Hypothesis: …". Raises ValueError if it cannot be parsed."""
        premise_text, hypothesis = question_of(text)
        if premise_text not in self.known:
            try:
                premise = read_premise(premise_text)
                mec = class_of(premise.n, premise.independences, minimal=premise.minimal)
                self.known[premise_text] = premise, mec
            except ValueError as error:
                self.known[premise_text] = str(error)
        found = self.known[premise_text]
        if isinstance(found, str):
            raise ValueError(f"premise: {found}")
        premise, mec = found
        claim = read_claim(hypothesis, premise.names)
        if mec is None:
            return Solved(premise, claim, None)
        semantics = self.semantics or (PLUSPLUS if premise.wording == "indep" else PUBLISHED)
        return Solved(premise, claim, decide(mec.pattern, claim.relation, claim.i, claim.j, semantics))


def audit_rows(rows: Iterable[Row], semantics: Semantics | None = None, *, paper: bool = False) -> Audit:
    """Audit rows of `rows.file_rows`. With `paper`, also count the rows that mode paper reproduces."""
    solver, found = Solver(semantics), Audit(reproduced=0 if paper else None)
    for row in rows:
        found.rows += 1
        line = row.line
        try:
            if row.fault:
                raise ValueError(row.fault)
            text, label = words_of(row.values), label_of(row.values)
            solved = solver.solve(text)
        except ValueError as error:
            found.malformed.append({"line": line, "problem": str(error)})
            continue
        right = solved.status == "entailed" if isinstance(label, bool) else solved.status
        keys = {"n": str(solved.premise.n), "relation": solved.claim.relation}
        cells = [
            found.by[by].setdefault(key, {"rows": 0, "false_no": 0, "false_yes": 0, "unfaithful": 0})
            for by, key in keys.items()
        ]
        yes = label if isinstance(label, bool) else label == "entailed"
        found.outcomes.append(Outcome(str(line), "all", yes, (solved.status == "entailed") == yes, True, 0))
        for cell in cells:
            cell["rows"] += 1
            cell["unfaithful"] += solved.status is None
            cell["false_no"] += solved.status == "entailed" and not yes
            cell["false_yes"] += solved.status not in ("entailed", None) and yes
        if solved.status is None:
            found.unfaithful.append({"line": line, "n": solved.premise.n, "said": _as_written(label)})
        elif right != label:
            found.wrong.append(
                {"line": line, "n": solved.premise.n, "relation": solved.claim.relation}
                | {"said": _as_written(label), "right": _as_written(right)}
            )
        if paper:
            found.reproduced = (found.reproduced or 0) + _is_published(solved, yes)
    return found


def _as_written(label: bool | str | None) -> str | int | None:
    return int(label) if isinstance(label, bool) else label


def _is_published(solved: Solved, yes: bool) -> bool:
    """Return whether the published program makes this row: this premise in these letters, with this label."""
    from string import ascii_uppercase

    from pipeline.tasks.corr2cause.published import published_index

    premise, claim = solved.premise, solved.claim
    if premise.n > 6 or premise.names != tuple(ascii_uppercase[: premise.n]):
        return False
    mec = published_index(premise.n).get(premise.independences)
    i, j = sorted((claim.i, claim.j))
    return mec is not None and mec.entails(claim.relation, i, j) == yes


def audit_text(found: Audit, name: str, most: int = 20) -> str:
    """Return the audit as text: counts, by n and by type, and the first rows of each kind of error."""
    lines = [
        f"{name}: {found.rows} rows, {len(found.wrong)} wrong labels, {len(found.unfaithful)} rows with a premise to "
        f"which no DAG is faithful, {len(found.malformed)} that cannot be read"
    ]
    for by in ("n", "relation"):
        if found.by[by]:
            lines.append(f"\n{by:<12} {'rows':>8} {'false No':>9} {'false Yes':>10} {'unfaithful':>11}")
        for key, cell in sorted(found.by[by].items()):
            lines.append(
                f"{key:<12} {cell['rows']:>8} {cell['false_no']:>9} {cell['false_yes']:>10} {cell['unfaithful']:>11}"
            )
    if solver := found.solver():
        scores = ", ".join(f"{name.replace('_', ' ')} {value:.3f}" for name, value in solver.items())
        lines.append(f"\nscores of the exact solver on these labels: {scores}")
    if found.reproduced is not None:
        lines.append(f"paper mode makes {found.reproduced} of these {found.rows} rows, premise and label")
    kinds = (
        ("wrong labels", found.wrong, "{relation}, n {n}: label {said}, expected {right}"),
        ("no DAG is faithful to the premise", found.unfaithful, "n {n}, label {said}"),
        ("cannot be read", found.malformed, "{problem}"),
    )
    for title, listed, form in kinds:
        if listed:
            lines.append(f"\n{title}:")
            lines += [f"{name}:{row['line']}: {form.format(**row)}" for row in listed[:most]]
            if len(listed) > most:
                lines.append(f"… and {len(listed) - most} more: --json lists all")
    return "\n".join(lines)
