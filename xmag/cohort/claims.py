"""Claims on outputs, so that several runs over one folder share its slides.

A claim is a lock that the operating system holds for a process and drops with it, however it ends:
no claim outlives its run. The lock is on an empty, hidden file beside the output, which is removed
with the claim; one that a killed run left behind is claimed by nobody, whatever its age.
"""

import errno
import hashlib
import logging
import os
import stat
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import Self

from xmag import files
from xmag.cohort.jobs import Job, Settings
from xmag.cohort.resume import Found, Seen, find_earlier
from xmag.errors import MismatchError, OutputError
from xmag.provenance import Provenance
from xmag.urls import Place, Url

logger = logging.getLogger(__name__)

_NO_LOCKS = {
    getattr(errno, name)
    for name in ("ENOLCK", "ENOSYS", "EOPNOTSUPP", "ENOTSUP", "EINVAL")
    if hasattr(errno, name)
}
"""Errors of file systems without locks."""

_ATTEMPTS, _PAUSE_S = 20, 0.05
"""Attempts at a lock whose maker may be about to share it, and seconds between them."""

_LOOK_AGAIN_S = 0.5
"""Seconds between looks whether another run is through with a slide."""

if sys.platform == "win32":
    import msvcrt

    def try_lock(fd: int) -> bool:
        """Whether an open file could be locked, at once; OSError where there are no locks."""
        try:
            msvcrt.locking(fd, msvcrt.LK_NBLCK, 1)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EDEADLK):
                return False
            raise
        return True

    def _unlock(fd: int, path: Path) -> None:
        # An open file cannot be removed there; one that another run has opened since stays.
        os.close(fd)
        with suppress(OSError):
            path.unlink()

else:
    import fcntl

    def try_lock(fd: int) -> bool:
        """Whether an open file could be locked, at once; OSError where there are no locks."""
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def _unlock(fd: int, path: Path) -> None:
        # Removed while it is locked: who has it open already finds that it has lost its name.
        with suppress(OSError):
            path.unlink()
        with suppress(OSError):
            fcntl.flock(fd, fcntl.LOCK_UN)  # else a fork of this process would keep it
        os.close(fd)


class Claims:
    """The claims of one run on the outputs in a folder; a context manager that drops them all.

    They also see that the folder is still the one it was: what is written to the empty mount point
    of a share that went away would fill another disk, and be hidden when the share is back.

    A store has no locks: every output there is this run's to make. Two runs over one URL do the
    same slides, and each file is whole, from one run or the other.
    """

    def __init__(self, out: Place) -> None:
        self._out = out
        self._held: dict[Job, tuple[int, Path]] = {}
        self._identity: tuple[int, int] | None = None
        self._can_lock = True
        self._seen: set[Path] = set()

    def __enter__(self) -> Self:
        self._identity = self._identity_now()
        return self

    def __exit__(self, *_: object) -> None:
        for job in list(self._held):
            self.release(job)

    def take(self, job: Job) -> bool:
        """Whether the output of a job is this run's to make; its folder is there then.

        Raises OutputError where the folder is gone, and OSError where it takes no files.
        """
        if isinstance(self._out, Url):
            return True
        self.check_folder()
        folder, path = (self._out / job.output).parent, _lock_path(self._out, job)
        folder.mkdir(parents=True, exist_ok=True)
        fd = self._locked(path)
        if fd is None:
            return False
        self._held[job] = (fd, path)
        if folder not in self._seen:
            self._seen.add(folder)
            files.remove_leftovers(folder)
        return True

    def check_folder(self) -> None:
        """Raise OutputError where the folder is not the one that it was."""
        if self._identity_now() != self._identity:
            raise OutputError(
                f"the output folder {self._out} is not there any more, or is another one than when"
                " the cohort began; bring it back (is a share not mounted?)"
            ) from OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    def release(self, job: Job) -> None:
        """Drop the claim on a job's output, if there is one."""
        held = self._held.pop(job, None)
        if held is not None:
            _unlock(*held)

    def _identity_now(self) -> tuple[int, int] | None:
        """Identity of the folder on its file system; None where it is gone, or in a store."""
        if isinstance(self._out, Path):
            with suppress(OSError):
                found = self._out.stat()
                return found.st_dev, found.st_ino
        return None

    def _locked(self, path: Path) -> int | None:
        """The descriptor of the locked file at `path`; None while another run has the lock."""
        while True:
            fd = open_lock(path, shared=True)
            try:
                is_locked = self._lock(fd)
                if is_locked and (not self._can_lock or _is_at(fd, path)):
                    return fd
            except BaseException:
                os.close(fd)
                raise
            os.close(fd)
            if not is_locked:
                return None

    def _lock(self, fd: int) -> bool:
        if not self._can_lock:
            return True
        try:
            return try_lock(fd)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            logger.warning(
                "%s cannot lock files (%s): another run over it would do the same slides again",
                self._out,
                error.strerror,
            )
            self._can_lock = False
            return True


class Share(Claims):
    """Jobs of a cohort that this run takes, as other runs over the folder leave them.

    Two runs over one folder each take what the other has not taken. What is left in the end is
    waited for: it is done by the other run, or by this one if the other ends without.
    """

    def __init__(self, slides: Iterable[Sequence[Job]], settings: Settings) -> None:
        """Look for the earlier bags of a list of slides' jobs; of other iterables, as each comes.

        Raises MismatchError, see `find_earlier`: for a list before any work.
        """
        super().__init__(settings.out)
        self._slides, self._settings = slides, settings
        self._expected = {
            model: Provenance(fingerprint=settings.fingerprint(model), record={})
            for model in settings.encoders
        }
        self._found: dict[Job, Found | OutputError | None] = {}
        self.seen = Seen(settings.out)
        if isinstance(slides, Sequence):
            for job in chain.from_iterable(slides):
                self._look_at(job)

    def __exit__(self, *_: object) -> None:
        self.seen.write()
        super().__exit__()

    def rounds(self) -> Iterator[Iterator[Sequence[Job]]]:
        """Rounds of the jobs to do now, by slide, until none is left. Exhaust each before the next.

        Have all that was taken done and released before asking for the next round: the other run
        may be waiting for it.
        """
        waiting, postponed = self._slides, list[Sequence[Job]]()
        while True:
            yield self._takeable(waiting, postponed)
            if not postponed:
                return
            if waiting is self._slides:
                logger.info("waiting for %d slides that another run is at", len(postponed))
            time.sleep(_LOOK_AGAIN_S)
            waiting, postponed = postponed, []

    def earlier(self, job: Job) -> Found | None:
        """The valid bag that is there already for a job taken, another run's among them.

        Raises MismatchError if it was made with something else and that is not to be redone, and
        OutputError where the folder of this one output takes no files.
        """
        found = self._found[job]
        if found is None:
            expected = self._expected[job.model]
            found = self._found[job] = find_earlier(job, self._settings, expected)
        if isinstance(found, OutputError):
            raise found
        return found

    def _look_at(self, job: Job) -> None:
        """Look for the earlier bag of a job; one that cannot be read costs its own row."""
        try:
            self._found[job] = find_earlier(job, self._settings, self._expected[job.model])
        except MismatchError:
            raise
        except OutputError as error:
            self._found[job] = error

    def _takeable(
        self, slides: Iterable[Sequence[Job]], postponed: list[Sequence[Job]]
    ) -> Iterator[Sequence[Job]]:
        for jobs in slides:
            ours, others = list[Job](), list[Job]()
            for job in jobs:
                # Who has the first of a slide's jobs decodes it, and is left the others.
                (ours if self._is_ours(job, may_take=not others) else others).append(job)
            if others:
                postponed.append(others)
            if ours:
                yield ours

    def _is_ours(self, job: Job, *, may_take: bool) -> bool:
        """Whether a job is this run's: nothing is to be written, or its claim could be taken."""
        if job not in self._found:
            self._look_at(job)
        try:
            return self._is_there(job) or (may_take and self.take(job))
        except OSError as error:
            told = files.cannot_write(self._settings.out / job.output, error)
            if files.is_of_the_place(told):
                raise told from error
            self._found[job] = told
            return True

    def _is_there(self, job: Job) -> bool:
        """Whether nothing is to be written; then a claim that a killed run left goes, too."""
        settings = self._settings
        may_write = settings.overlay or settings.on_mismatch == "redo"
        if may_write or not isinstance(self._found[job], Found):
            return False
        if isinstance(settings.out, Path):
            with suppress(OSError):
                if _lock_path(settings.out, job).exists() and self.take(job):
                    self.release(job)
        return True


def _lock_path(out: Path, job: Job) -> Path:
    output = out / job.output
    digest = hashlib.sha256(output.name.encode()).hexdigest()[:16]
    return output.with_name(f".{digest}.xmag-lock")


def open_lock(path: Path, *, shared: bool) -> int:
    """The descriptor of the empty file at `path` that is there to be locked, made if need be.

    In a folder of several users anyone may have put something else there: a link is not followed,
    and what was there is neither written to nor given other rights. One that is made here is this
    user's alone, or, where it is `shared`, open to whoever may write to the folder. Raises OSError,
    whose text says so where something else is there.
    """
    while True:
        with suppress(FileExistsError):
            return _make_lock(path, shared)
        with suppress(FileNotFoundError):  # removed just now, with its claim
            return _open_lock(path)


def _make_lock(path: Path, shared: bool) -> int:
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    if not shared or sys.platform == "win32":
        return fd
    with suppress(OSError):  # not every file system has owners and rights
        folder = path.parent.stat()
        may_write = folder.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
        if may_write & stat.S_IWGRP and os.fstat(fd).st_gid != folder.st_gid:
            with suppress(PermissionError):
                os.fchown(fd, -1, folder.st_gid)
        os.fchmod(fd, 0o600 | may_write | may_write << 1)
    return fd


def _open_lock(path: Path) -> int:
    flags = os.O_RDWR | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    for attempt in range(_ATTEMPTS):
        try:
            fd = os.open(path, flags)
            break
        except PermissionError:
            # The moment between making it and giving the others their rights to it.
            if attempt == _ATTEMPTS - 1:
                raise
            time.sleep(_PAUSE_S)
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.EMLINK, errno.EISDIR, errno.ENXIO):
                raise _no_lock(path) from error
            raise
    found = os.fstat(fd)
    if stat.S_ISREG(found.st_mode) and found.st_nlink <= 1 and found.st_size == 0:
        return fd
    os.close(fd)
    raise _no_lock(path)


def _no_lock(path: Path) -> OSError:
    return OSError(
        f"{path.name}, which is to be locked there, is a link or something else than the empty file"
        " that xmag makes: remove it"
    )


def _is_at(fd: int, path: Path) -> bool:
    """Whether the open file still is what the path names."""
    try:
        return os.path.samestat(os.fstat(fd), path.lstat())
    except FileNotFoundError:
        return False
