"""The text to train on and its vocabulary."""

import bz2
import collections
import dataclasses
import pathlib
import re

from cutloss.cli.usage import UserError

BUNDLED = pathlib.Path(__file__).resolve().parent.parent / "data" / "novels.txt.bz2"

# Every character belongs to exactly one piece, so that joining the pieces gives the text back. A
# word carries the blank before it, as in the usual subword vocabularies.
_PIECE = re.compile(r" ?[^\W\d_]+(?:'[^\W\d_]+)?| ?\d+|--+| ?[^\w\s]|\s|_+")
_BYTES = 256


def read_text(path=None):
    """The bundled novels, or a file of the user's."""
    if path is None:
        return bz2.decompress(BUNDLED.read_bytes()).decode("utf-8")
    try:
        return pathlib.Path(path).read_bytes().decode("utf-8", errors="replace")
    except OSError as error:
        raise UserError(f"--text {path} cannot be read: {error.strerror}") from None


@dataclasses.dataclass
class Vocabulary:
    """Ids 0..255 are bytes, the others whole words, the most frequent first.

    A word that is not among them is spelled in bytes, so that every text has ids.
    """

    words: list
    size: int  # ids that the classifier knows; more than there are words where the text is short

    def __post_init__(self):
        self._ids = {word: _BYTES + i for i, word in enumerate(self.words)}

    @classmethod
    def of(cls, text, size):
        if size <= _BYTES:
            raise UserError(f"--vocab must be more than {_BYTES} (an id for each byte), got {size}")
        counts = collections.Counter(_PIECE.findall(text))
        # A word of one byte has its id already.
        words = [w for w, _ in counts.most_common() if len(w.encode()) > 1]
        return cls(words[: size - _BYTES], size)

    @property
    def known(self):
        """Ids that stand for something; the rest of the classifier only fills it up to size."""
        return _BYTES + len(self.words)

    def encode(self, text):
        ids = []
        for piece in _PIECE.findall(text):
            known = self._ids.get(piece)
            if known is None:
                ids.extend(piece.encode())
            else:
                ids.append(known)
        return ids

    def decode(self, ids):
        pieces = (bytes([i]) if i < _BYTES else self.words[i - _BYTES].encode() for i in ids)
        return b"".join(pieces).decode("utf-8", errors="replace")
