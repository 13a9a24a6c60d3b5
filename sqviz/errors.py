"""What can go wrong, by name. Every message says what was given, what is allowed, and how to fix it."""


class SqvizError(ValueError):
    """Base of the errors that sqviz raises for input it cannot work with."""


class UnknownArchitecture(SqvizError):
    """The model's architecture has no row in `sqviz.models.arch.ARCHS`."""


class NoTokenizer(SqvizError):
    """Text was given to a model that has no tokenizer."""


class TextTooShort(SqvizError):
    """The text has fewer tokens than one segment."""


class NonFinite(SqvizError):
    """A NaN or an infinity was met where only finite values make sense."""


class NoSuchLayer(SqvizError):
    """A layer or linear name, index or pattern matches nothing in the model."""


class CannotFold(SqvizError):
    """The input of a linear has no producer into which a smoothing factor can be folded exactly."""


class NotEquivalent(SqvizError):
    """A transformation that must not change the logits did."""


class TooLarge(SqvizError, MemoryError):
    """Work that would not fit into memory, refused before the machine runs out of it."""


class Unavailable(SqvizError):
    """A backend was asked for that cannot run on this machine; the message says why."""


class DownloadError(OSError):
    """The embedded model could not be fetched, or what arrived is not what was expected."""


class Cancelled(Exception):
    """Long work was stopped on request. The model and earlier results are as they were."""
