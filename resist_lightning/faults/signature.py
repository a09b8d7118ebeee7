"""Signs lines in the store, to tell those of this run's workers from strangers'. Standard library only."""

from __future__ import annotations

import hashlib
import hmac

_LONGEST_LINE = 1_000_000  # some hundred bytes, and the text of an error
_TAG_LETTERS = 32  # 128 bits


class Signature:
    """Proves that a line comes from a worker of this run: a keyed hash (HMAC-SHA256) of its place and its text.

    Args:
        key: random bytes that only the workers know.
    """

    def __init__(self, key: bytes) -> None:
        self._key = key

    def sign(self, place: str, line: str) -> str:
        """The line as it is posted: its tag, then its text."""
        return self._tag(place, line.encode()) + line

    def verify(self, place: str, posted: bytes) -> str | None:
        """The text of a line that was read at ``place``; None if no worker has posted it there."""
        if not _TAG_LETTERS <= len(posted) <= _LONGEST_LINE:
            return None
        tag, line = posted[:_TAG_LETTERS], posted[_TAG_LETTERS:]
        # In constant time, so that nobody can guess a tag letter by letter.
        if not hmac.compare_digest(tag, self._tag(place, line).encode()):
            return None
        return line.decode()

    def _tag(self, place: str, line: bytes) -> str:
        # The place is hashed too: a line of one worker is invalid in another's place.
        signed = place.encode() + b"\0" + line
        return hmac.new(self._key, signed, hashlib.sha256).hexdigest()[:_TAG_LETTERS]
