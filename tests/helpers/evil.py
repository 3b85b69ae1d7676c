"""What a pickle from a stranger may do."""

import os
from pathlib import Path


class MakesFolder:
    """Makes a folder when it is unpickled, if whoever reads it lets it."""

    def __init__(self, path: Path) -> None:
        self._path = str(path)

    def __reduce__(self):
        return os.mkdir, (self._path,)
