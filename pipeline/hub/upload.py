"""Upload an export to the hub with the hub library's client.

    python -m pipeline export --ckpt DIR --format merged16 --push OWNER/NAME            private, or --public

The token's write access is checked before the export starts. A push that fails loses no data: the export stays in its
folder, and the same command repeats the push alone.
"""

from __future__ import annotations

import os
from pathlib import Path

from pipeline.core.errors import LaunchError, PlanError


def check_access(repository: str) -> str:
    """Return the user of the hub token.

    Raises PlanError where the token may not write to the repository, LaunchError where the hub does not answer.
    """
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError
    from huggingface_hub.utils._validators import validate_repo_id

    try:
        validate_repo_id(repository)
        if repository.count("/") != 1:
            raise HFValidationError("no owner")
    except HFValidationError:
        raise PlanError(
            f"--push: got {repository}; expected the name of a repository. Fix: --push OWNER/NAME"
        ) from None
    if os.environ.get("HF_HUB_OFFLINE") not in (None, "", "0"):
        raise PlanError(
            "--push: HF_HUB_OFFLINE is set; expected access to the hub. Fix: unset it, or export without --push"
        )
    if get_token() is None:
        raise PlanError(
            "--push: got no token of the hub; expected one that may write. Fix: hf auth login, or set HF_TOKEN"
        )
    try:
        me = HfApi().whoami()
    except HfHubHTTPError as error:
        if error.response.status_code in (401, 403):
            raise PlanError("--push: the hub rejects the token. Fix: hf auth login, or set HF_TOKEN") from error
        raise _unreachable(error) from error
    except Exception as error:
        if _is_network(error):
            raise _unreachable(error) from error
        raise
    if me.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise PlanError(
            f"--push {repository}: got a token of {me['name']} that may only read; expected one that may write. "
            "Fix: hf auth login, or set HF_TOKEN"
        )
    owners = [me["name"], *(organisation["name"] for organisation in me.get("orgs", []))]
    owner = repository.partition("/")[0]
    if owner not in owners:
        raise PlanError(
            f"--push {repository}: got a token of {me['name']}; expected one that may write to {owner}. "
            f"Fix: push to {' or '.join(owners)}, or set HF_TOKEN"
        )
    return str(me["name"])


def push(folder: Path, repository: str, *, public: bool, message: str) -> list[str]:
    """Create the repository if it does not exist, and upload the files of `folder`. Returns messages for the user.

    Raises LaunchError where the upload fails.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    api = HfApi()
    try:
        api.create_repo(repository, private=not public, exist_ok=True)
        notes = []
        if not public and not api.model_info(repository).private:
            notes = [f"note: {repository} existed before and is public: everyone can read the pushed files"]
        commit = api.upload_folder(
            repo_id=repository, folder_path=folder, commit_message=message, ignore_patterns=[".*"]
        )
    except Exception as error:
        if not (isinstance(error, HfHubHTTPError | OSError) or _is_network(error)):
            raise
        raise LaunchError(
            f"{repository}: the push failed ({_first_line(error)})",
            f"the export is complete, in {folder}; files already uploaded stay on the hub",
            f"Fix: the same command repeats the push alone, or run: hf upload {repository} {folder}",
        ) from error
    return [f"pushed to {repository}: {commit.commit_url}", *notes]


def _unreachable(error: Exception) -> LaunchError:
    return LaunchError(
        f"--push: the hub cannot be reached ({_first_line(error)}). Fix: try again, or export without --push; the same "
        "export with --push then only pushes"
    )


def _is_network(error: Exception) -> bool:
    """Return whether an error comes from the client's HTTP library, whose exceptions are not OSErrors."""
    return type(error).__module__.partition(".")[0] in ("httpx", "httpx2", "httpcore", "httpcore2", "requests")


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
