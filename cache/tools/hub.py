"""Pushing a store to a repository of the Hugging Face Hub: all of it in one commit, so that a copy is whole or absent.

Each file that is written through fsspec would be a commit of its own there. Uploaded blobs outlast a push that is
stopped: the next one does not send them again.
"""

import hashlib
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ezsd.cache.errors import StoreError
from ezsd.cache.files import FileDigest, read_bytes
from ezsd.cache.format.commit_mark import COMMIT, ENVIRONMENT, CommitMark
from ezsd.cache.format.names import inside
from ezsd.cache.storage.locations import LocalPlace
from ezsd.cache.storage.remote import RemotePlace


def not_as_committed(file: Path) -> StoreError:
    """The error for a file of a store to be sent that is damaged."""
    return StoreError(
        f"{file}: its bytes are not those that were committed (sha256 differs); the store is damaged: "
        "`repair()` mends it"
    )


def require_as_committed(source: Path, mark: CommitMark, names: Iterable[str]) -> None:
    """Refuse to send any of these files of a store where one is damaged."""
    for name, found in LocalPlace(source).digests(names):
        if found != mark.files[name]:
            raise not_as_committed(source / name)


def is_repository(there: RemotePlace) -> bool:
    """True if a place is in a git repository of the Hub; its buckets take files one by one, as any file system does.

    Raises:
        StoreError: there is no such repository, or it cannot be reached.
    """
    if not there.is_on_hub:
        return False
    with there.errors():
        try:
            return hasattr(there.files.resolve_path(there.path("")), "repo_id")
        except FileNotFoundError as error:
            raise StoreError(
                f"{there}: there is no such repository, or you may not see it; create it on the Hub, log in "
                "(`hf auth login`) and push again"
            ) from error


def push_to_repository(
    source: Path, there: RemotePlace, mark: CommitMark, data: bytes, environment: bytes | None, *, complete: bool
) -> int:
    """Copy a store to a place in a repository that holds no other store; returns what `push` does.

    Args:
        source: the store's folder.
        there: the place.
        mark: the store's commit mark.
        data: the commit mark's bytes.
        environment: the store's `environment.json`, if it is to be sent.
        complete: the same commit mark is there.

    Raises:
        StoreError: the store is damaged, something else is there, or the Hub refuses.
    """
    found = there.details()
    foreign = sorted(found.keys() - {*mark.files, COMMIT, ENVIRONMENT, *there.not_ours})
    if foreign:
        raise StoreError(f"{there}: holds {foreign[0]!r}, which is not a file of this store; choose another URL")
    missing = _not_held(found, source, mark, mark.files)
    if complete and not missing and environment is None:
        return 0
    require_as_committed(source, mark, missing)
    contents: dict[str, str | bytes] = {name: str(inside(source, name)) for name in missing}
    contents |= {COMMIT: data} if environment is None else {COMMIT: data, ENVIRONMENT: environment}
    with there.errors():
        _commit(there, contents)
    left = _not_held(there.details(), source, mark, missing)
    if left:
        raise StoreError(f"{there}/{left[0]}: did not arrive as it was sent; push again")
    return len(missing) or 1


def _commit(there: RemotePlace, contents: Mapping[str, str | bytes]) -> None:
    """Commit files, each from its path or its bytes."""
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.utils.tqdm import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()
    target = there.files.resolve_path(there.path(""))
    prefix = f"{target.path_in_repo.rstrip('/')}/".lstrip("/")
    try:
        HfApi(endpoint=there.files.endpoint, token=there.files.token).create_commit(
            target.repo_id,
            [CommitOperationAdd(path_in_repo=f"{prefix}{name}", path_or_fileobj=of) for name, of in contents.items()],
            commit_message=f"Store {there.url.rpartition('/')[2]}",
            repo_type=target.repo_type,
            revision=target.revision,
        )
    except RuntimeError as error:
        # It names the file that was being sent, and only its cause says what went wrong.
        raise error.__cause__ or error from None


def _not_held(
    found: Mapping[str, Mapping[str, Any]], source: Path, mark: CommitMark, names: Iterable[str]
) -> list[str]:
    """Names of files that the Hub does not have as they were committed, by the digests that it states."""
    return [name for name in names if not _is_held(found.get(name), inside(source, name), mark.files[name])]


def _is_held(there: Mapping[str, Any] | None, here: Path, expected: FileDigest) -> bool:
    if there is None or there["size"] != expected.size:
        return False
    if there["lfs"] is not None:
        return bool(there["lfs"]["sha256"] == expected.sha256)
    # A small file is a blob of git, and stated by the name that git gives it.
    blob = read_bytes(here)
    return bool(there["blob_id"] == hashlib.sha1(b"blob %d\0" % len(blob) + blob, usedforsecurity=False).hexdigest())
