"""What a daemon keeps for the one that comes after it: keys and values in a file that outlives a SIGKILL.

Each change is in the kernel's page cache before the call returns, so that what was answered is kept however the
daemon ends; nothing is synced to a disk, since nothing of it is of use after the machine has restarted. Trouble
with the file never stops the daemon: it is said, what could not be written is remembered, and written later.
"""

import contextlib
import hashlib
import json
import logging
import os
import sqlite3
import stat
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import quote

log = logging.getLogger(__name__)

RETRY = 5.0
"""Seconds until what could not be written is tried again, twice as long after each failure."""
LONGEST_RETRY = 300.0
PATIENCE = 5.0
"""Seconds to wait, once at the start, for a daemon that is about to end at the same mount point."""
LONGEST_NAME = 200
"""Bytes of the file's name before it is shortened to a hash."""
LOG_PAGES = 256
"""Pages of 4 KiB that SQLite may append to its log before it merges them."""
FORMAT = 1
"""Of what is kept; a file of another format is not read."""

CallLater = Callable[[float, Callable[[], None]], object]


class Store:
    """Keys and values of one mount point.

    Args:
        directory: made, private to this user; None: nothing is kept.
        mountpoint: gives the file its name.
        call_later: has a function called after so many seconds.

    Attributes:
        trouble: why the file is not up to date, or None.
    """

    def __init__(self, directory: str | None, mountpoint: str, call_later: CallLater) -> None:
        self._directory = directory
        self._path = os.path.join(directory or "", _file_name(mountpoint))
        self._call_later = call_later
        self._db: sqlite3.Connection | None = None
        # By key as the file holds it: a name in it may be no UTF-8.
        self._pending: dict[bytes, str | None] = {}
        self._holding = False
        self._delay = RETRY
        self.trouble: str | None = None

    # The beginning

    def open(self) -> dict[str, Any]:
        """Take over what the daemon before left, in the order of the keys; empty where it left nothing of use."""
        if self._directory is None:
            return {}
        try:
            self._make_private(self._directory)
            self._connect()
            found = self._left()
        except (sqlite3.Error, OSError) as error:
            if _is_damage(error):
                self._set_aside(error)
            else:
                self._close()
                self._fail(error)
            return {}
        return found

    @staticmethod
    def _make_private(directory: str) -> None:
        with contextlib.suppress(FileExistsError):
            os.mkdir(directory, 0o700)
        found = os.lstat(directory)
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
            raise PermissionError(f"{directory} is no directory of ours")
        # Its mode is not ours to change: somebody chose the directory, and may use it for more.
        if found.st_mode & 0o022:
            raise PermissionError(f"others may write in {directory}")

    def _connect(self) -> None:
        """Open the file, and hold it: who comes while we do gets "locked"."""
        while self._db is None:
            os.close(os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600))
            db = sqlite3.connect(self._path, timeout=PATIENCE, isolation_level=None)
            db.text_factory = _text
            try:
                # Held alone, SQLite needs no memory shared with others: a full disk is an error, not a SIGBUS.
                db.execute("pragma locking_mode = exclusive")
                db.execute("pragma journal_mode = wal")
                db.execute("pragma synchronous = off")
                db.execute(f"pragma wal_autocheckpoint = {LOG_PAGES}")
                db.execute("create table if not exists kept (key text primary key, value text) without rowid")
                _check(db)
            except BaseException:
                db.close()
                raise
            if os.path.exists(self._path):
                self._db = db
            else:
                # The daemon before us, for which we waited, has taken the file away.
                db.close()

    def _left(self) -> dict[str, Any]:
        assert self._db is not None
        present = [FORMAT, _boot()]
        found = dict(_readable(self._db.execute("select key, value from kept order by key")))
        if found.pop("about", present) != present:
            log.warning("%s is of another boot or version: not read", self._path)
            found.clear()
            self._db.execute("delete from kept")
        self.put("about", present)
        return found

    def _set_aside(self, error: Exception) -> None:
        log.warning(
            "%s is damaged (%s): nothing comes back from it; it is kept as %s.damaged",
            self._path, error, self._path,
        )  # fmt: skip
        self._close()
        with contextlib.suppress(OSError):
            os.replace(self._path, f"{self._path}.damaged")
        self._remove_files()
        try:
            self._connect()
            self.put("about", [FORMAT, _boot()])
        except (sqlite3.Error, OSError) as again:
            self._fail(again)

    # Keeping

    def put(self, key: str, value: Any) -> None:
        """Keep a value (of JSON) under `key`."""
        self._write(key, json.dumps(value))

    def drop(self, key: str) -> None:
        """Forget what is kept under `key`."""
        self._write(key, None)

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """What is put and dropped inside is kept at its end; a daemon killed before that has kept none of it."""
        self._holding = True
        try:
            yield
        finally:
            self._holding = False
            self._write_pending()

    def __len__(self) -> int:
        """How many values the file holds."""
        if self._db is None:
            return 0
        (count,) = self._db.execute("select count(*) from kept where key != 'about'").fetchone()
        return int(count)

    def _write(self, key: str, text: str | None) -> None:
        if self._directory is None:
            return
        self._pending[os.fsencode(key)] = text
        if not self._holding:
            self._write_pending()

    def _write_pending(self) -> None:
        if self._db is None or self.trouble is not None or not self._pending:
            return
        try:
            self._commit_pending()
        except sqlite3.Error as error:
            self._fail(error)

    def _commit_pending(self) -> None:
        """All of it or nothing."""
        assert self._db is not None
        self._db.execute("begin")
        try:
            for key, text in self._pending.items():
                if text is None:
                    self._db.execute("delete from kept where key = cast(? as text)", (key,))
                else:
                    self._db.execute("insert or replace into kept values (cast(? as text), ?)", (key, text))
            self._db.execute("commit")
        except BaseException:
            if self._db.in_transaction:
                self._db.execute("rollback")
            raise
        self._pending.clear()

    # Trouble

    def _fail(self, error: Exception) -> None:
        if self.trouble is None:
            self._delay = RETRY
            log.warning(
                "%s cannot be written (%s): a crash would bring back what it holds so far", self._path, error
            )
        self.trouble = str(error)
        self._call_later(self._delay, self._retry)
        self._delay = min(self._delay * 2, LONGEST_RETRY)

    def _retry(self) -> None:
        if self._directory is None:
            return
        try:
            if self._db is None:
                self._begin_late()
            assert self._db is not None
            # What is in the log and the file needs no room twice. Where even that fails, there may be room yet.
            with contextlib.suppress(sqlite3.Error):
                self._db.execute("pragma wal_checkpoint(truncate)").fetchall()
            self._commit_pending()
        except (sqlite3.Error, OSError) as error:
            self._fail(error)
            return
        self.trouble = None
        log.warning("%s is written again", self._path)

    def _begin_late(self) -> None:
        """What lies there is of nobody's use any more: this daemon has begun without it."""
        assert self._directory is not None
        self._make_private(self._directory)
        self._connect()
        assert self._db is not None
        self._db.execute("delete from kept")
        self._pending[b"about"] = json.dumps([FORMAT, _boot()])

    # The end

    def close(self, *, forget: bool) -> None:
        """Let go of the file, which stays for who comes next, or with `forget` is removed."""
        if forget and self._db is not None:
            # While it is still ours: who waits for it looks again.
            self._remove_files()
        self._close()
        self._directory = None

    def _close(self) -> None:
        db, self._db = self._db, None
        if db is not None:
            with contextlib.suppress(sqlite3.Error):
                db.close()

    def _remove_files(self) -> None:
        for tail in ("", "-wal", "-journal"):
            with contextlib.suppress(OSError):
                os.unlink(self._path + tail)


def _is_damage(error: Exception) -> bool:
    """Whether it is what lies there that cannot be used, not the way to it."""
    if isinstance(error, sqlite3.OperationalError):
        # The file has been read, and is of another format, or has other tables.
        return error.sqlite_errorcode == sqlite3.SQLITE_ERROR
    return isinstance(error, sqlite3.DatabaseError)


def _check(db: sqlite3.Connection) -> None:
    """Raises sqlite3.DatabaseError where the file is damaged."""
    (found,) = db.execute("pragma quick_check(1)").fetchone()
    if found != "ok":
        raise sqlite3.DatabaseError(found)


def _file_name(mountpoint: str) -> str:
    name = quote(mountpoint, safe="", errors="surrogateescape")
    if len(name) > LONGEST_NAME:
        name = hashlib.sha256(os.fsencode(mountpoint)).hexdigest()
    return f"{name}.db"


def _boot() -> str:
    with open("/proc/sys/kernel/random/boot_id") as file:
        return file.read().strip()


def _text(raw: bytes) -> str:
    """As it was put; what is damaged is found out when it is used."""
    return os.fsdecode(raw)


def _readable(rows: Iterator[tuple[Any, Any]]) -> Iterator[tuple[str, Any]]:
    for key, text in rows:
        try:
            yield str(key), json.loads(text)
        except (TypeError, ValueError):
            log.warning("what was kept of %s is damaged: dropped", ascii(key))
