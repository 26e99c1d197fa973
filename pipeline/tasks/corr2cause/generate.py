"""Whole sets of rows as files:   python -m pipeline generate corr2cause --n 2 3 4 5 6 --out DIR

Every claim about every class (N = 2…6; of drawn classes for N ≥ 7), each row under letters of its own, in
`train.parquet`, `validation.parquet` and `test.parquet`, split by canonical class, with `splits.json` (which class is
where) and a data card, `README.md`. Rows are written as they are made, so a set need not fit in memory; `--copies K`
makes each claim under K renamings. The same seed gives the same bytes, whatever the number of processes: a group of
rows depends on the seed and its classes alone, and groups are written in their order.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from hashlib import sha256
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.config.recipe import TaskChoice
from pipeline.core.errors import DataError
from pipeline.tasks.corr2cause import Class, ClassClaim, Corr2Cause, Corr2CauseParams, split_classes
from pipeline.tasks.corr2cause.graphs import EquivalenceClass
from pipeline.tasks.task import task_of

MOST_ROWS = 1_000_000_000  # of a set: a day's work of a large machine
CLASSES = {2: 2, 3: 5, 4: 20, 5: 142, 6: 2201}  # of N unlabelled nodes; beyond, as many as are drawn
GROUP = 32  # classes in a group of rows
SPLITS = {"train": ("sft", "both", "grpo"), "validation": ("validation",), "test": ("test",)}
STATUS = {"Yes": "entailed", "No": "contradicted", "Unknown": "undetermined"}


def most_rows(params: Corr2CauseParams, copies: int) -> int:
    """How many rows a set can have at most: before anything is made."""
    classes = {n: CLASSES.get(n, params.sampled_classes) for n in set(params.n)}
    return copies * sum(count * 3 * n * (n - 1) for n, count in classes.items())


@dataclass(frozen=True)
class GenerationSpec:
    """What is to be made: everything the bytes depend on."""

    params: str  # the task's params as canonical JSON: it travels to the processes
    seed: int
    copies: int
    proof: str  # none, short or full

    @property
    def task(self) -> Corr2Cause:
        choice = TaskChoice("corr2cause", "generated", None, None, "error", json.loads(self.params))
        task = task_of(choice, self.seed)
        assert isinstance(task, Corr2Cause)
        return task


@cache
def _parts(order: GenerationSpec) -> dict[str, list[list[Class]]]:
    """The groups of classes of each split, by N."""
    task = order.task
    found = split_classes(task.params, order.seed)
    parts = {}
    for split, names in SPLITS.items():
        groups = []
        for n in sorted(set(task.params.n)):
            mine = sorted((mec for name in names for mec in found[name] if mec.n == n), key=lambda mec: mec.id)
            groups += [mine[k : k + GROUP] for k in range(0, len(mine), GROUP)]
        parts[split] = groups
    return parts


Job = tuple[GenerationSpec, str, int, int]  # and split, group, copy


def _group(job: Job) -> list[dict[str, Any]]:
    """The rows of one group of classes under one renaming: a function of the order alone."""
    order, split, number, copy = job
    task, rows = order.task, []
    for mec in _parts(order)[split][number]:
        rng = random.Random(f"{order.seed}/rows/{copy}/{mec.id}")
        chosen = enumerate(_chosen(task, rng, mec))
        rows += [_row(task, rng, slot, f"{split}/{copy}/{mec.id}/{k}", order) for k, slot in chosen]
    return rows


def _chosen(task: Corr2Cause, rng: random.Random, mec: Class) -> list[ClassClaim]:
    """All claims about a class; of even sets, as many with each answer within each type."""
    slots = list(task.claims(mec))
    if task.params.balance == "natural":
        return slots
    kept = []
    for relation in dict.fromkeys(slot.relation for slot in slots):
        by_gold: dict[str, list[ClassClaim]] = {gold: [] for gold in task.golds}
        for slot in slots:
            if slot.relation == relation:
                by_gold[slot.gold].append(slot)
        fewest = min(len(mine) for mine in by_gold.values())
        kept += [slot for mine in by_gold.values() for slot in rng.sample(mine, fewest)]
    return kept


def _row(task: Corr2Cause, rng: random.Random, slot: ClassClaim, id: str, order: GenerationSpec) -> dict[str, Any]:
    draw = task.rename(rng, slot, with_trace=order.proof != "none", shuffle=False)
    example = task.example(replace(draw, proof=order.proof), id)
    tags, mec = example.tags, draw.mec
    exact = isinstance(mec, EquivalenceClass)
    arrows = sorted(mec.pattern.arrows) if exact else []  # type: ignore[attr-defined]
    names = tags["names"].split(" ") if draw.who else list(tags["names"])
    row = {
        "id": id,
        "input": example.question,
        "label": int(example.gold == "Yes"),
        "status": STATUS[example.gold] if exact and (len(task.golds) == 3 or example.gold == "Yes") else None,
        "num_variables": tags["n"],
        "relation_type": tags["relation"],
        "class": example.group,
        "class_size": tags["members"],
        "premise_tokens": tags["premise_tokens"],
        "names": names,
        "mode": tags["mode"],
        "style": tags["style"],
        "seed": order.seed,
        "forced_edges": [[names[a], names[b]] for a, b in arrows] if exact else None,
        "num_edges": len(arrows) if exact else None,
        "completion": example.target,
    }
    if tags["style"] == "plusplus":
        premise, claim = example.question.removeprefix("Premise: ").split("\nHypothesis: ")
        row["query"] = f"Premise:\n{premise}\n\nHypothesis: {claim}"
    return row


def _schema(style: str) -> pa.Schema:
    text, number = pa.string(), pa.int32()
    fields = {
        "id": text,
        "input": text,
        "label": number,
        "status": text,
        "num_variables": number,
        "relation_type": text,
        "class": text,
        "class_size": number,
        "premise_tokens": number,
        "names": pa.list_(text),
        "mode": text,
        "style": text,
        "seed": pa.int64(),
        "forced_edges": pa.list_(pa.list_(text)),
        "num_edges": number,
        "completion": text,
    }
    return pa.schema(list((fields | ({"query": text} if style == "plusplus" else {})).items()))


def generate(
    out: Path, params: Mapping[str, Any], *, seed: int = 0, copies: int = 1, proof: str = "none", processes: int = 1
) -> dict[str, Any]:
    """Write the set to the empty or new folder `out`; returns what the data card counts.

    RecipeError for params that cannot be, DataError where the folder holds something already.
    """
    if out.exists() and not out.is_dir():
        raise DataError(f"--out: {out} is a file; give a new folder")
    if out.exists() and any(not path.name.startswith(".") for path in out.iterdir()):  # a broken run leaves such
        raise DataError(f"--out: {out} is not empty; give a new folder")
    settled = {"instruction": "", **params}
    if settled.get("mode") == "paper":
        settled.setdefault("phases", [{"n": list(settled.get("n", (3, 4, 5))), "rows": 1, "proof_fraction": 0.0}])
    order = GenerationSpec(json.dumps(settled, sort_keys=True), seed, copies, proof)
    task = order.task  # says what is wrong with the params before anything is written
    if (most := most_rows(task.params, copies)) > MOST_ROWS:
        fits = max(1, copies * MOST_ROWS // most)
        told = f"--copies: got {copies}, which is up to {most:,} rows; expected at most {MOST_ROWS:,} rows"
        raise DataError(f"{told}. Fix: --copies {fits}")
    out.mkdir(parents=True, exist_ok=True)
    parts = _parts(order)
    ids = {split: sorted({mec.id for group in groups for mec in group}) for split, groups in parts.items()}
    overlap = sum(len(set(ids[a]) & set(ids[b])) for a in ids for b in ids if a < b)
    counts: dict[str, Counter[tuple[int, str]]] = {split: Counter() for split in parts}
    hashes = {}
    context = get_context("spawn")
    with context.Pool(processes) if processes > 1 else _Here() as pool:
        for split, groups in parts.items():
            if not groups:
                continue
            partial, path = out / f".{split}.parquet", out / f"{split}.parquet"
            schema = _schema(task.params.style)
            with pq.ParquetWriter(partial, schema, compression="zstd") as writer:
                jobs = ((order, split, k, copy) for copy in range(copies) for k in range(len(groups)))
                windows = _windows(jobs, 4 * processes)
                for rows in (rows for window in windows for rows in pool.imap(_group, window)):
                    if rows:  # a few groups are under way at a time, so none piles up
                        writer.write_table(pa.Table.from_pylist(rows, schema=schema))
                        said = ("status",) if len(task.golds) == 3 else ("label",)
                        counts[split].update((row["num_variables"], str(row[said[0]])) for row in rows)
            partial.replace(path)
            hashes[path.name] = _sha256(path)
    listed = {split: [[n, said, rows] for (n, said), rows in sorted(count.items())] for split, count in counts.items()}
    record = {"overlap": overlap, "classes": {split: len(mine) for split, mine in ids.items()}, "rows": listed}
    (out / "splits.json").write_text(json.dumps({"overlap": overlap, "classes": ids}) + "\n", encoding="utf-8")
    (out / "README.md").write_text(_card(order, record, hashes), encoding="utf-8")
    return record


def _windows(jobs: Iterator[Job], size: int) -> Iterator[list[Job]]:
    """The jobs, a few at a time."""
    while window := list(islice(jobs, size)):
        yield window


class _Here:
    """One process: no pool."""

    def __enter__(self) -> _Here:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def imap(self, function: Any, jobs: Sequence[Any]) -> Iterator[Any]:
        return map(function, jobs)


def _sha256(path: Path) -> str:
    found = sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            found.update(block)
    return found.hexdigest()


def _card(order: GenerationSpec, record: Mapping[str, Any], hashes: Mapping[str, str]) -> str:
    """The data card: what the rows are, how they were made, how many there are, and that no class is in two splits."""
    task = order.task
    p = task.params
    sizes = ", ".join(map(str, sorted(set(p.n))))
    lines = [
        "---",
        "task_categories: [text-classification]",
        "language: [en]",
        "tags: [causal-reasoning, corr2cause]",
        "configs:",
        "- config_name: default",
        "  data_files:",
        *(f"  - {{split: {Path(name).stem}, path: {name}}}" for name in hashes),
        "---",
        "",
        f"# Corr2Cause, {p.mode}, style {p.style}, N = {sizes}",
        "",
        "Does a causal claim about two of N variables hold in every causal graph that has exactly the independences of",
        "the premise? Made from first principles by Therefore (`python -m pipeline generate corr2cause`), after",
        "Jin et al. 2024.",
        "",
        (
            "The published rows with the wrong labels of their program, for comparison with published figures."
            if p.mode == "paper"
            else "Labels are exact; variables are renamed at random in every row."
        ),
        "",
        f"- Semantics: {json.dumps(asdict(task.semantics))}",
        f"- Answers: {', '.join(task.golds)}; share: {p.balance}; premises: {p.premise}; proofs: {order.proof}",
        f"- Seed {order.seed}, {order.copies} renaming(s) a claim",
        f"- No class of isomorphic graphs is in two splits: overlap {record['overlap']} (`splits.json` lists them)",
        "",
        "| split | N | answer | rows |",
        "|---|---|---|---|",
        *(f"| {split} | {n} | {said} | {rows} |" for split, mine in record["rows"].items() for n, said, rows in mine),
        "",
        f"Classes: {', '.join(f'{split} {count}' for split, count in record['classes'].items())}.",
        "",
        "Fields: `input`, `label` (1: entailed), `status` (of three answers), `num_variables`, `relation_type`,",
        "`class` (canonical), `class_size` (members), `premise_tokens` (words and marks), `names` in the premise's",
        "order, `mode`, `style`, `seed`, `forced_edges` (compelled, tail and head), `completion` (with the proof,",
        "where asked for).",
        "",
        "| file | sha256 |",
        "|---|---|",
        *(f"| {name} | {digest} |" for name, digest in hashes.items()),
        "",
        f"Params: `{order.params}`",
    ]
    return "\n".join(lines) + "\n"
