"""Put an export on the hub, with the hub library's own client.

    python -m pipeline export --ckpt DIR --format merged16 --push OWNER/NAME            private; --public opens it

Whether the token may write there is asked before anything long happens. A push that breaks off loses nothing: the
export stays where it is, and the same command resumes with the push alone.
"""

from __future__ import annotations

import os
from pathlib import Path

from pipeline.core.errors import LaunchError, PlanError


def check_access(repository: str) -> str:
    """The user whose token it is. PlanError where it may not write to the repository, LaunchError without an answer."""
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError
    from huggingface_hub.utils._validators import validate_repo_id

    try:
        validate_repo_id(repository)
        if repository.count("/") != 1:
            raise HFValidationError("no owner")
    except HFValidationError:
        raise PlanError(f"--push {repository}: not the name of a repository; write OWNER/NAME") from None
    if os.environ.get("HF_HUB_OFFLINE") not in (None, "", "0"):
        raise PlanError("--push: HF_HUB_OFFLINE is set, so the hub is not asked; unset it, or export without --push")
    if get_token() is None:
        raise PlanError("--push: no token of the hub is here; hf auth login, or set HF_TOKEN to one that may write")
    try:
        me = HfApi().whoami()
    except HfHubHTTPError as error:
        if error.response.status_code in (401, 403):
            raise PlanError("--push: the hub does not know the token; hf auth login, or set HF_TOKEN") from error
        raise _unreachable(error) from error
    except Exception as error:
        if _is_network(error):
            raise _unreachable(error) from error
        raise
    if me.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise PlanError(f"--push {repository}: the token of {me['name']} may only read; make one that may write")
    owners = [me["name"], *(one["name"] for one in me.get("orgs", []))]
    owner = repository.partition("/")[0]
    if owner not in owners:
        raise PlanError(f"--push {repository}: the token is of {me['name']}, who may write to {', '.join(owners)}")
    return str(me["name"])


def push(folder: Path, repository: str, *, public: bool, message: str) -> list[str]:
    """Create the repository where there is none, and upload the files of `folder`. Returns what to tell."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    api = HfApi()
    try:
        api.create_repo(repository, private=not public, exist_ok=True)
        told = [f"pushed to {repository}"]
        if not public and not api.model_info(repository).private:
            told.append(f"note: {repository} was there before and is public: everyone can read what was pushed")
        commit = api.upload_folder(
            repo_id=repository, folder_path=folder, commit_message=message, ignore_patterns=[".*"]
        )
    except Exception as error:
        if not (isinstance(error, HfHubHTTPError | OSError) or _is_network(error)):
            raise
        raise LaunchError(
            f"{repository}: the push failed ({_first_line(error)})",
            f"the export is whole, in {folder}; what has arrived at the hub stays there",
            "the same command resumes with the push alone, or by hand: hf upload " + f"{repository} {folder}",
        ) from error
    told[0] += f": {commit.commit_url}"
    return told


def _unreachable(error: Exception) -> LaunchError:
    return LaunchError(
        f"--push: the hub cannot be asked ({_first_line(error)}); try again, or export without --push: a later export "
        "of the same with --push only pushes"
    )


def _is_network(error: Exception) -> bool:
    """Errors of the client's HTTP library, whose exceptions are no OSErrors."""
    return type(error).__module__.partition(".")[0] in ("httpx", "httpx2", "httpcore", "httpcore2", "requests")


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
