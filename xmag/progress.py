"""tqdm progress bars, by default on terminals and in notebooks alone."""

import sys
import threading
from importlib.util import find_spec
from typing import Any

from tqdm import tqdm
from tqdm.notebook import tqdm as tqdm_widget


def progress_bar(progress: bool | None, **options: Any) -> "tqdm[Any]":
    """A tqdm bar, shown if `progress`; None shows it on a terminal and in a notebook.

    It is a widget in a notebook that has ipywidgets, and text on stderr everywhere else.
    """
    # IPython is never imported for this: a kernel that runs this code has imported it already.
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    notebook = type(shell).__name__ == "ZMQInteractiveShell"
    if progress is None:
        progress = sys.stderr.isatty() or notebook
    if progress and notebook and find_spec("ipywidgets") is not None:
        return _Widget(**options)
    return _Bar(disable=not progress, file=sys.stderr, **options)


class _Bar(tqdm):  # type: ignore[type-arg]  # tqdm is generic for checkers alone
    """A tqdm text bar without side effects: no monitoring thread, no multiprocessing lock.

    tqdm's own lock is shared with child processes, and making one fixes the start method of
    multiprocessing for the whole program.
    """

    monitor_interval = 0


class _Widget(tqdm_widget):  # type: ignore[type-arg]
    """A tqdm notebook widget without the side effects that `_Bar` avoids."""

    monitor_interval = 0


_BAR_LOCK = threading.RLock()
_Bar.set_lock(_BAR_LOCK)
_Widget.set_lock(_BAR_LOCK)
