"""Is a file of Corr2Cause rows right?   python -m pipeline audit corr2cause --data FILE

Each row's premise is read back to independences (published wording, or `A indep B | C`), the class and the label are
found by the exact solver, and what disagrees is listed: wrong labels, premises that no DAG is faithful to, rows that
cannot be read, each by its line. Exit code 0 when every row is right, 1 when not, 2 when the file cannot be read;
`--json` for scripts. Premises of up to ten variables are decided, each claim in a fraction of a second.

published_rows.py says which columns a row may have.
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
    """A row as read and as solved. `status` is None where no DAG is faithful to the premise."""

    premise: Premise
    claim: Claim
    status: str | None  # entailed, undetermined or contradicted


@dataclass
class Audit:
    """What was found; `lines` count the rows of the file, or its lines where it has lines."""

    rows: int = 0
    malformed: list[dict[str, Any]] = field(default_factory=list)  # line, problem
    unfaithful: list[dict[str, Any]] = field(default_factory=list)  # line, said
    wrong: list[dict[str, Any]] = field(default_factory=list)  # line, n, relation, said, right
    by: dict[str, dict[str, dict[str, int]]] = field(default_factory=lambda: {"n": {}, "relation": {}})
    reproduced: int | None = None  # rows that `paper` mode has, premise and label; None: not asked
    outcomes: list[Outcome] = field(default_factory=list)  # the solver as a model, judged by the file's labels

    @property
    def clean(self) -> bool:
        return not (self.malformed or self.unfaithful or self.wrong)

    def solver(self) -> dict[str, float]:
        """F1, accuracy and the like of the exact solver on the file's own labels: the ceiling of their noise."""
        if not self.outcomes:
            return {}
        found = compute_metrics(count_groups(self.outcomes, ["all"]).total())
        return {name: round(float(found[name]), 4) for name in ("f1", "balanced_accuracy", "mcc", "accuracy")}

    def record(self) -> dict[str, Any]:
        """For scripts."""
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
    """Reads rows and decides them exactly; a premise that comes again is not solved again."""

    def __init__(self, semantics: Semantics | None = None) -> None:
        self.semantics = semantics  # None: what the wording of the premise means
        self.known: dict[str, tuple[Premise, EquivalenceClass | None] | str] = {}

    def solve(self, words: str) -> Solved:
        """A whole row, "Premise: …" and "Hypothesis: …"; ValueError where it cannot be read."""
        told, asked = question_of(words)
        if told not in self.known:
            try:
                premise = read_premise(told)
                self.known[told] = premise, class_of(premise.n, premise.independences, minimal=premise.minimal)
            except ValueError as error:
                self.known[told] = str(error)
        found = self.known[told]
        if isinstance(found, str):
            raise ValueError(f"premise: {found}")
        premise, mec = found
        claim = read_claim(asked, premise.names)
        if mec is None:
            return Solved(premise, claim, None)
        semantics = self.semantics or (PLUSPLUS if premise.wording == "indep" else PUBLISHED)
        return Solved(premise, claim, decide(mec.pattern, claim.relation, claim.i, claim.j, semantics))


def audit_rows(rows: Iterable[Row], semantics: Semantics | None = None, *, paper: bool = False) -> Audit:
    """Audit rows of a file, as `rows.file_rows` reads them."""
    solver, found = Solver(semantics), Audit(reproduced=0 if paper else None)
    for row in rows:
        found.rows += 1
        line = row.line
        try:
            if row.fault:
                raise ValueError(row.fault)
            words, said = words_of(row.values), label_of(row.values)
            solved = solver.solve(words)
        except ValueError as error:
            found.malformed.append({"line": line, "problem": str(error)})
            continue
        right = solved.status == "entailed" if isinstance(said, bool) else solved.status
        keys = {"n": str(solved.premise.n), "relation": solved.claim.relation}
        cells = [
            found.by[by].setdefault(key, {"rows": 0, "false_no": 0, "false_yes": 0, "unfaithful": 0})
            for by, key in keys.items()
        ]
        yes = said if isinstance(said, bool) else said == "entailed"
        found.outcomes.append(Outcome(str(line), "all", yes, (solved.status == "entailed") == yes, True, 0))
        for cell in cells:
            cell["rows"] += 1
            cell["unfaithful"] += solved.status is None
            cell["false_no"] += solved.status == "entailed" and not yes
            cell["false_yes"] += solved.status not in ("entailed", None) and yes
        if solved.status is None:
            found.unfaithful.append({"line": line, "n": solved.premise.n, "said": _shown(said)})
        elif right != said:
            found.wrong.append(
                {"line": line, "n": solved.premise.n, "relation": solved.claim.relation}
                | {"said": _shown(said), "right": _shown(right)}
            )
        if paper:
            found.reproduced = (found.reproduced or 0) + _is_published(solved, yes)
    return found


def _shown(said: bool | str | None) -> str | int | None:
    return int(said) if isinstance(said, bool) else said


def _is_published(solved: Solved, yes: bool) -> bool:
    """Whether the published program makes this row: its premise in these letters, and this label."""
    from string import ascii_uppercase

    from pipeline.tasks.corr2cause.published import published_index

    premise, claim = solved.premise, solved.claim
    if premise.n > 6 or premise.names != tuple(ascii_uppercase[: premise.n]):
        return False
    one = published_index(premise.n).get(premise.independences)
    i, j = sorted((claim.i, claim.j))
    return one is not None and one.entails(claim.relation, i, j) == yes


def audit_text(found: Audit, name: str, most: int = 20) -> str:
    """The audit as text: what was found, by n and by type, and the first rows of each kind."""
    lines = [
        f"{name}: {found.rows} rows, {len(found.wrong)} wrong labels, {len(found.unfaithful)} rows whose premise no "
        f"DAG is faithful to, {len(found.malformed)} that cannot be read"
    ]
    for by in ("n", "relation"):
        if found.by[by]:
            lines.append(f"\n{by:<12} {'rows':>8} {'false No':>9} {'false Yes':>10} {'unfaithful':>11}")
        for key, cell in sorted(found.by[by].items()):
            lines.append(
                f"{key:<12} {cell['rows']:>8} {cell['false_no']:>9} {cell['false_yes']:>10} {cell['unfaithful']:>11}"
            )
    if solver := found.solver():
        told = ", ".join(f"{name.replace('_', ' ')} {value:.3f}" for name, value in solver.items())
        lines.append(f"\nthe exact solver, judged by these labels: {told}")
    if found.reproduced is not None:
        lines.append(f"paper mode makes {found.reproduced} of these {found.rows} rows, premise and label")
    kinds = (
        ("wrong labels", found.wrong, "{relation}, n {n}: said {said}, right is {right}"),
        ("no DAG is faithful to the premise", found.unfaithful, "n {n}, said {said}"),
        ("cannot be read", found.malformed, "{problem}"),
    )
    for title, listed, words in kinds:
        if listed:
            lines.append(f"\n{title}:")
            lines += [f"{name}:{row['line']}: {words.format(**row)}" for row in listed[:most]]
            if len(listed) > most:
                lines.append(f"… and {len(listed) - most} more: --json lists all")
    return "\n".join(lines)
