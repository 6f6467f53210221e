"""Repositories of models on the Hugging Face hub, through huggingface_hub: pip install -e '.[hub]'.

Which hub, whose token and which cache are the library's own settings: HF_ENDPOINT, HF_TOKEN or `hf auth login`, HF_HOME,
HF_HUB_OFFLINE. Errors do not name the repository: whoever was given it does.
"""

import dataclasses
import errno
import glob
import json
import re
import sys
import types
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from speedit_jax.errors import UserError
from speedit_jax.storage import files

NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
IN_REPOSITORY = re.compile(rf"{NAME.pattern}(/[\w.-]+)*")  # OWNER/NAME, or a folder in it
SCHEME = "hf:"
_PLACE = re.compile(rf"{SCHEME}(?P<name>{NAME.pattern})(@(?P<revision>refs/(pr|convert)/[^/@]+|[^/@]+))?(/(?P<path>[^@]+))?")
_LOG_IN = "log in with hf auth login, or set HF_TOKEN"

# The names of the files in a repository -> (what is to be opened, the files that it needs).
Choose = Callable[[Sequence[str]], tuple[str, list[str]]]


@dataclasses.dataclass(frozen=True)
class Place:
    """hf:OWNER/NAME[@REVISION][/PATH].

    Attributes:
      repository: OWNER/NAME.
      revision: a branch, a tag or a commit; None is the newest commit.
      path: a folder or a file in it; "" is all of it.
    """

    repository: str
    revision: str | None = None
    path: str = ""

    def __str__(self) -> str:
        revision, path = f"@{self.revision}" if self.revision else "", f"/{self.path}" if self.path else ""
        return f"{SCHEME}{self.repository}{revision}{path}"


def parse(where: str) -> Place:
    """The place that a user names.

    Raises:
      UserError: it is not written so.
    """
    match = _PLACE.fullmatch(where)
    if not match:
        raise UserError("write it as hf:OWNER/NAME, hf:OWNER/NAME@REVISION or hf:OWNER/NAME/FILE")
    return Place(match["name"], match["revision"], (match["path"] or "").strip("/"))


def download(place: Place, choose: Choose, cached_first: bool = False) -> tuple[Path, str]:
    """Brings what is needed of a repository into the library's cache.

    Where the hub cannot be reached, or with HF_HUB_OFFLINE=1, what the cache has is used.

    Args:
      choose: which files; raises a UserError where there are none that serve.
      cached_first: ask the hub only if the cache has not got them, however old they are.

    Returns:
      What `choose` says is to be opened, on this machine, and the commit that it is of.

    Raises:
      UserError: huggingface_hub is not installed, there is no such repository, it may not be read, or the hub cannot be reached
        and the cache has not got it.
    """
    hub = _library()
    if cached_first and (found := _cached(hub, place, choose)):
        return found
    try:
        info = hub.HfApi().model_info(place.repository, revision=place.revision, timeout=_patience(hub))
    except Exception as error:  # each way to fail has its class, and some are of the HTTP library
        found = None if _answered(error) else _cached(hub, place, choose)
        if not found:
            here = "" if _answered(error) else ", and the cache has not got it"
            raise UserError(f"{_explained(hub, place, error)}{here}") from error
        print(f"note: the hub cannot be reached; {place} is taken from the cache, commit {found[1][:12]}")
        return found
    opened, wanted = choose([file.rfilename for file in info.siblings or ()])
    try:
        folder = hub.snapshot_download(
            place.repository, revision=place.revision, allow_patterns=[glob.escape(name) for name in wanted]
        )
    except Exception as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        if isinstance(error, hub.errors.LocalEntryNotFoundError) and error.__cause__:
            error = error.__cause__  # why the library then looked in the cache
        reason = _explained(hub, place, error)
        if not _answered(error):
            reason = f"the download broke off: {reason}; the same command continues it"
        raise UserError(reason) from error
    return Path(folder, opened), Path(folder).name


def _cached(hub: types.ModuleType, place: Place, choose: Choose) -> tuple[Path, str] | None:
    """What `download` returns, of the cache alone; None where it has no such revision, or not all of its files."""
    try:
        repositories = hub.scan_cache_dir().repos
    except hub.errors.CacheNotFound:
        return None
    for repository in repositories:
        if (repository.repo_type, repository.repo_id) != ("model", place.repository):
            continue
        commits = {revision.commit_hash: revision for revision in repository.revisions}
        if revision := repository.refs.get(place.revision or "main") or commits.get(place.revision):
            folder = revision.snapshot_path
            try:
                opened, _ = choose([file.relative_to(folder).as_posix() for file in files(folder)])
            except UserError:
                return None
            return folder / opened, revision.commit_hash
    return None


def check_access(repository: str) -> bool | None:
    """Whether a repository to write to is public; None where it does not exist. Before anything is computed.

    Raises:
      UserError: huggingface_hub is not installed, nobody is logged in, or the hub cannot be reached or refuses.
    """
    hub, place = _library(), Place(repository)
    if not hub.get_token():
        raise UserError(f"this needs a token that may write: {_LOG_IN}")
    try:
        return not hub.HfApi().model_info(repository, timeout=_patience(hub)).private
    except hub.errors.RepositoryNotFoundError:
        return None
    except Exception as error:
        raise UserError(_explained(hub, place, error)) from error


def publish(repository: str, directory: Path, message: str, public: bool) -> tuple[str, list[str]]:
    """Uploads the files of a directory as one commit.

    Args:
      public: whether the repository is made public, where it does not exist yet.

    Returns:
      The address of the commit, and what the hub says of the model card.

    Raises:
      UserError: the hub refuses it, or the upload breaks off; what is there stays as it was.
    """
    hub = _library()
    operations = [hub.CommitOperationAdd(file.relative_to(directory).as_posix(), str(file)) for file in files(directory)]
    try:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always", UserWarning)
            api = hub.HfApi()
            api.create_repo(repository, private=not public, exist_ok=True)
            # Not upload_folder, which may make several commits.
            commit = api.create_commit(repository, operations, commit_message=message)
    except Exception as error:
        raise UserError(f"{_explained(hub, Place(repository), error)}; nothing was uploaded") from error
    said = [" ".join(str(warning.message).split()) for warning in told if issubclass(warning.category, UserWarning)]
    return commit.commit_url, said


def address(repository: str) -> str:
    """Of a repository's page."""
    return f"{_library().constants.ENDPOINT}/{repository}"


def front_matter(**fields: Any) -> str:
    """The YAML between the first two lines of dashes of a model card."""
    return _library().ModelCardData(**fields).to_yaml()


def _library() -> types.ModuleType:
    """huggingface_hub, which then prints no log lines, and bars only for a person.

    Raises:
      UserError: it is not installed.
    """
    try:
        import huggingface_hub
        import huggingface_hub.constants
        import huggingface_hub.errors
        import huggingface_hub.utils
    except ImportError as e:
        raise UserError("the Hugging Face hub needs huggingface_hub: pip install -e '.[hub]'") from e
    huggingface_hub.utils.logging.set_verbosity_error()
    if not sys.stderr.isatty():
        huggingface_hub.utils.disable_progress_bars()
    return huggingface_hub


def _status(error: Exception) -> int | None:
    """The HTTP status with which the hub refused; None where it did not answer."""
    return getattr(getattr(error, "response", None), "status_code", None)


def _answered(error: Exception) -> bool:
    """Whether the hub did answer, so that a copy of its files must not take its place; a broken server did not."""
    refused = isinstance(error, ValueError) and not isinstance(error, json.JSONDecodeError)
    return refused or (_status(error) or 500) < 500


def _explained(hub: types.ModuleType, place: Place, error: Exception) -> str:
    """One line for what the library raises in many."""
    errors, status, at = hub.errors, _status(error), hub.constants.ENDPOINT
    said = " ".join((getattr(error, "server_message", None) or str(error)).split())[:300]
    if isinstance(error, errors.GatedRepoError):
        return f"it is gated: ask for access on {at}/{place.repository}, then {_LOG_IN}"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"it has no revision {place.revision!r}; name a branch, a tag or a commit"
    if status == 401 and "credentials" in said:
        return f"the hub refuses the token of HF_TOKEN or hf auth login; make a new one on {at}/settings/tokens"
    if isinstance(error, errors.RepositoryNotFoundError) or status in (401, 404):
        return f"there is no such model on {at}, or it is private: check the name; for a private one {_LOG_IN}"
    if status == 403:
        return f"the token may not do this ({said}); make one that may on {at}/settings/tokens"
    if status:
        return f"the hub at {at} answers {status} ({said}); try again later"
    if isinstance(error, errors.OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE forbids asking the hub"
    if isinstance(error, json.JSONDecodeError):
        return f"{at} does not answer as a hub does; check HF_ENDPOINT, and whether the network wants a login"
    if isinstance(error, ValueError):  # a name that the library refuses, or a model card that the hub refuses
        return said
    return f"no connection to the hub at {at} ({said or type(error).__name__}); check the network and HF_ENDPOINT"


def _patience(hub: types.ModuleType) -> float:
    """Seconds for the hub's first answer: 10, or the library's setting HF_HUB_ETAG_TIMEOUT."""
    return float(hub.constants.HF_HUB_ETAG_TIMEOUT)
