"""Download models and data sets to the local cache on a login node, so that no job waits for the hub.

    python -m pipeline download RECIPE…            downloads the pinned model, tokenizer and data

Jobs run with HF_HUB_OFFLINE=1 (configs/clusters/). `not_downloaded` reports missing repositories before submission.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from pipeline.config.cluster import Cluster
from pipeline.config.recipe import Recipe
from pipeline.core.errors import LaunchError
from pipeline.tasks.task import task_of

MODEL_FILES = ["*.safetensors", "*.json", "*.jinja", "*.txt", "tokenizer.model"]


@dataclass(frozen=True)
class Repository:
    """A model or data set on the hub that a recipe needs."""

    name: str
    kind: str  # model or dataset
    revision: str | None


def repositories(recipe: Recipe) -> list[Repository]:
    """Return the recipe's model and data sets that are on the hub."""
    needed = []
    if not recipe.model.random_init and not recipe.model.gguf and not Path(recipe.model.name).exists():
        needed.append(Repository(recipe.model.name, "model", recipe.model.revision))
    task = task_of(recipe.task, recipe.seed)
    if task.source == "hub":
        needed += [Repository(name, "dataset", revision) for name, revision in task.repositories().items()]
    return needed


def download(recipes: Iterable[Recipe], cluster: Cluster) -> Iterator[str]:
    """Download the repositories that the cache lacks, with a progress bar. Yields a line for each repository.

    Raises LaunchError where one cannot be downloaded.
    """
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    for name, needed in _needed(recipes).items():
        if not needed:
            yield f"{name}: nothing to download: model and data are generated locally"
        for repository in needed:
            label = f"{repository.kind} {repository.name}"
            try:
                folder = Path(_snapshot(repository, cluster, local=False))
            except RepositoryNotFoundError as error:
                raise LaunchError(
                    f"{label}: not found on the hub, or not public. Fix: correct the name, or hf auth login"
                ) from error
            except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
                reason = str(error).strip().splitlines()[0]
                raise LaunchError(
                    f"{label}: cannot be downloaded ({reason}). Fix: run the same command again; it resumes"
                ) from error
            several = sum(other.kind == repository.kind for other in needed) > 1
            key = "model.revision" if repository.kind == "model" else "task.revision"
            key += f".{repository.name}" if repository.kind != "model" and several else ""
            pin = "" if repository.revision else f"; pin it: {key}={folder.name}"
            yield f"{name}: {label} at {folder.name}, {_size(folder) / 1e9:.2f} GB in {folder}{pin}"


def not_downloaded(recipes: Iterable[Recipe], cluster: Cluster) -> list[str]:
    """Return a message for each repository that jobs without internet access need and the local cache lacks."""
    if cluster.slurm.environment.get("HF_HUB_OFFLINE") in (None, "0", ""):
        return []
    return [
        f"{repository.kind} {repository.name} is not in the local cache ({missing}), and the nodes have no internet. "
        f"Fix: python -m pipeline download {name}"
        for name, needed in _needed(recipes).items()
        for repository in needed
        if (missing := _missing(repository, cluster))
    ]


def _needed(recipes: Iterable[Recipe]) -> dict[str, list[Repository]]:
    return {recipe.name: repositories(recipe) for recipe in recipes}


def _missing(repository: Repository, cluster: Cluster) -> str | None:
    """Return the part of a repository that the cache lacks, as the hub library reports it; None if complete."""
    from huggingface_hub.errors import IncompleteSnapshotError, LocalEntryNotFoundError

    try:
        _snapshot(repository, cluster, local=True)
    except IncompleteSnapshotError as error:
        return re.sub(r"^.*?is incomplete: |\. Outgoing.*$", "", " ".join(str(error).split()))
    except LocalEntryNotFoundError:
        return f"no revision {repository.revision}" if repository.revision else "no file"
    return None


def _snapshot(repository: Repository, cluster: Cluster, *, local: bool) -> str:
    from huggingface_hub import snapshot_download

    return str(
        snapshot_download(
            repository.name,
            repo_type=repository.kind,
            revision=repository.revision,
            cache_dir=_cache(cluster),
            allow_patterns=MODEL_FILES if repository.kind == "model" else None,
            local_files_only=local,
        )
    )


def _cache(cluster: Cluster) -> str | None:
    """Return the cache folder that the jobs read; None for the hub library's default."""
    variables = cluster.slurm.environment
    home = variables.get("HF_HUB_CACHE") or (f"{variables['HF_HOME']}/hub" if variables.get("HF_HOME") else None)
    return os.path.expandvars(str(Path(home).expanduser())) if home else None


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
