"""What of a run may go: old checkpoints, leftovers of killed attempts, or all of it."""

import contextlib
import logging
from collections.abc import Collection, Mapping, Sequence

from job.checkpoint.commit import CLAIM_NAME, DATA_NAME, Commit, Rejection, commit_entries, read, readable_commits
from job.checkpoint.transfer import check_sizes
from job.errors import ConfigError, JobError
from job.storage import files
from job.storage.probe import PLACE as PROBES

logger = logging.getLogger(__name__)

LAYOUT = ("result.json", "report.html", "commits", "data", "eval", "export", "base", "attempts", "config.json")
"""All that a run consists of, in the order in which it is removed: an interrupted removal can be repeated."""


UPLOADED = ("data", "base", "export")
"""Where files are large enough to be uploaded in parts."""


def prune(run: str, *, attempt: int, damaged: Collection[str], keep: int, keep_every: int, best_step: int | None) -> list[str]:
    """See `RunStore.prune`. Args: attempt: ours. damaged: names of commits that count for nothing, whatever their sizes."""
    # The data is listed before the commits, so that no folder that is committed in between is taken for a leftover.
    sizes = by_folder(files.list_files(files.join(run, "data")))
    entries, commits = commit_entries(run), readable_commits(run)
    whole = [commit for commit in commits if commit.name not in damaged and is_whole(commit, sizes)]
    removed = unneeded(commits, whole=whole, keep=max(keep, 1), keep_every=keep_every, best_step=best_step)
    for commit in removed:
        files.remove(files.join(run, "commits", commit.name))
        files.remove_tree(files.join(run, "data", commit.data))
    for folder in leftovers(sizes, commits=commits, entries=entries, attempt=attempt):
        files.remove_tree(files.join(run, "data", folder))
    files.remove_temporaries(run, before=files.join(run, "attempts", f"{attempt:06}.json"))
    return [commit.name for commit in removed]


def abort_uploads(run: str) -> None:
    """Ends what older attempts were uploading when they were killed. Call it after the claim and before an upload of our own.

    A store that can't do it is no reason to end a job.
    """
    try:
        if aborted := sum(files.abort_uploads(files.join(run, part)) for part in UPLOADED):
            logger.info("unfinished uploads of earlier attempts aborted", extra={"uploads": aborted})
    except JobError as error:
        logger.warning("unfinished uploads of earlier attempts may be left", extra={"reason": str(error)})


def is_whole(commit: Commit, sizes: Mapping[str, Mapping[str, int]]) -> bool:
    """Whether every file of a commit is there with its size. Args: sizes: data folder -> file -> bytes."""
    try:
        check_sizes(commit.files, sizes.get(commit.data, {}))
    except Rejection:
        return False
    return True


def unneeded(
    commits: Sequence[Commit], *, whole: Sequence[Commit], keep: int, keep_every: int, best_step: int | None
) -> list[Commit]:
    """The commits to remove, oldest first.

    Args:
        commits: all readable ones, newest first.
        whole: those of them that can be restored, newest first. While there is none, nothing is removed.
        keep, keep_every, best_step: as in `RunStore.prune`.
    """
    kept = {commit.name for commit in whole[:keep]}
    seen: set[int] = set()
    for commit in whole:
        wanted = commit.step == best_step or (keep_every > 0 and commit.step > 0 and commit.step % keep_every == 0)
        if wanted and commit.step not in seen:
            kept.add(commit.name)
        seen.add(commit.step)
    return [commit for commit in reversed(commits) if commit.name not in kept] if whole else []


def leftovers(
    folders: Collection[str], *, commits: Sequence[Commit], entries: Collection[tuple[int, int, str]], attempt: int
) -> list[str]:
    """The data folders that older attempts never committed.

    Args:
        entries: (attempt, step, name) of every commit file; of one that can't be read, all folders that may be its own stay.
        attempt: our own number; what it has or what is newer stays, for it may be in use.
    """
    referenced = {commit.data for commit in commits}
    unreadable = {entry[:2] for entry in entries} - {(commit.attempt, commit.step) for commit in commits}
    found = []
    for folder in sorted(set(folders) - referenced):
        match = DATA_NAME.fullmatch(folder)
        if match and int(match["attempt"]) < attempt and (int(match["attempt"]), int(match["step"])) not in unreadable:
            found.append(folder)
    return found


def remove_run(uri: str) -> int:
    """Removes a run, and nothing else that lies beside its files. Returns: the number of objects removed.

    Raises: ConfigError, when this is not a run.
    """
    listed = check_is_run(uri)
    removed = 0
    for part in LAYOUT:
        removed += sum(name == part or name.startswith(part + "/") for name in listed)
        files.remove(files.join(uri, part)) if "." in part else files.remove_tree(files.join(uri, part))
    for folder in {name.split("/")[0] for name in listed if name.startswith(PROBES)}:  # of a killed attempt
        files.remove_tree(files.join(uri, folder))
    if files.is_local(uri):
        with contextlib.suppress(OSError):  # other people's files are in it
            files.local_path(uri).rmdir()
    return removed


def by_folder(listed: Mapping[str, int]) -> dict[str, dict[str, int]]:
    """folder/file -> bytes, as folder -> file -> bytes."""
    found: dict[str, dict[str, int]] = {}
    for path, size in listed.items():
        folder, _, name = path.partition("/")
        found.setdefault(folder, {})[name] = size
    return found


def check_is_run(uri: str) -> dict[str, int]:
    """The objects of a run, as `files.list_files` gives them. Raises: ConfigError, when this is not a run."""
    listed = files.list_files(uri)
    known = any(map(CLAIM_NAME.fullmatch, by_folder(listed).get("attempts", {})))
    with contextlib.suppress(Rejection, FileNotFoundError):
        read(files.join(uri, "config.json"))
        known = True
    if not known:
        raise ConfigError(
            f"{files.shown(uri)} is not a run of clipjob: {len(listed)} objects, no config.json of ours, no attempts. Nothing done."
        )
    return listed
