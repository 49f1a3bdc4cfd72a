"""The errors that xmag raises, and the one warning category it uses.

    XmagError
    ├── InputError (also ValueError)           an argument does not make sense
    │   └── SeveralScansError                  a file holds several scans, and none was chosen
    ├── MissingExtraError (also ImportError)   an optional part is not installed
    ├── SlideError                             a slide cannot be read
    │   ├── UnsupportedSlideError              a format, pixel type or layout that is not read
    │   ├── DamagedSlideError                  the file is there, but its content is broken
    │   ├── SlideScaleError                    no usable µm/px, or too coarse for what is asked
    │   └── ClosedSlideError                   used after close()
    ├── ModelError
    │   ├── WeightsError                       weights that do not fit, are damaged or not finite
    │   └── HubError                           a model that cannot be fetched
    ├── BagError                               a feature file or bag that is not right
    └── OutputError                            a result cannot be written where it was asked for
        └── MismatchError                      what is there was made with something else

    XmagWarning (also UserWarning)             the result stands, but it rests on an assumption

Every message says what was seen, what was expected and what to do about it.
"""

import sys
from typing import Any


class XmagError(Exception):
    """Base of every error that xmag raises on purpose."""


class InputError(XmagError, ValueError):
    """An argument does not make sense."""


class SeveralScansError(InputError):
    """A file holds several scans, and none was chosen; `scans` has the (width, height) of each."""

    scans: tuple[tuple[int, int], ...] = ()


def not_fitted(message: str) -> InputError:
    """The error of an estimator that is not fitted, an InputError and an AttributeError.

    Where scikit-learn is loaded, it is its NotFittedError too, so that who catches that catches
    this one.
    """
    exceptions = sys.modules.get("sklearn.exceptions")
    other = AttributeError if exceptions is None else exceptions.NotFittedError
    error: InputError = type("NotFittedError", (_UnfittedError, other), {})(message)
    return error


class _UnfittedError(InputError):
    def __reduce__(self) -> tuple[Any, ...]:  # a class made on the spot has no name to pickle by
        return not_fitted, self.args


class MissingExtraError(XmagError, ImportError):
    """An optional part of xmag is not installed; the message names the ``pip install``."""


class SlideError(XmagError):
    """A slide cannot be read."""


class UnsupportedSlideError(SlideError):
    """A format, pixel type or layout that xmag does not read."""


class DamagedSlideError(SlideError):
    """The slide file is there, but its content is broken."""


class SlideScaleError(SlideError):
    """The slide has no usable µm/px, or is too coarse for what was asked."""


class ClosedSlideError(SlideError):
    """A slide was used after it was closed."""


class ModelError(XmagError):
    """A model cannot be loaded or used."""


class WeightsError(ModelError):
    """Weights that do not fit the model, are damaged, or are not finite."""


class HubError(ModelError):
    """A model that cannot be fetched from the Hub."""


class BagError(XmagError):
    """A feature file or a bag that is not what it should be."""


class OutputError(XmagError):
    """A result cannot be written where it was asked for."""


class MismatchError(OutputError):
    """Existing output was made with other weights, tiles or preprocessing."""


class XmagWarning(UserWarning):
    """The result stands, but it rests on an assumption that the message names."""
