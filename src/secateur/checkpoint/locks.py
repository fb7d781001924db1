"""Locks between processes. The system drops them when a process ends in any way, so a killed run blocks nobody."""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path


def take_lock(path: Path, *, wait: bool = False) -> int | None:
    """Lock a file, made when it is not there. Returns its descriptor, or None when another process holds the lock.

    With ``wait`` it returns only once the lock is held.

    Raises:
        OSError: when the file cannot be made, or its disk knows no locks.
    """
    lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(lock, msvcrt.LK_LOCK if wait else msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(lock, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(lock).st_nlink == 0:  # its last holder removed it while we waited
                raise BlockingIOError
    except OSError as error:
        os.close(lock)
        if isinstance(error, BlockingIOError) or error.errno in (errno.EACCES, errno.EDEADLK):
            return None
        raise OSError(error.errno, f"{os.strerror(error.errno or 0)}: this disk knows no locks", str(path)) from error
    return lock
