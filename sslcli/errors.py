"""What can go wrong for a user, and the exit code each kind of trouble ends with.

SslError                 something failed                          exit 1
├── UserError            the user can put it right                 exit 2
│   ├── PresetError      a preset, or an override of it, is wrong
│   ├── DataError        the images are not what the job needs
│   └── WeightsError     a weights file or checkpoint cannot be used
├── DivergedError        the numbers stopped being numbers         exit 1
├── CollapsedError       the features say the same of every image  exit 1
└── StoppedOnRequest     a signal asked us to stop; resumable      exit 75
"""

EXIT_FAILURE = 1
EXIT_USER = 2
EXIT_RESUMABLE = 75
EXIT_INTERRUPTED = 130


class SslError(Exception):
    """A failure with a one-line explanation; `hint` says what to do about it."""

    exit_code = EXIT_FAILURE

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UserError(SslError):
    """Something the user said or pointed at cannot work; the hint says what would."""

    exit_code = EXIT_USER


class PresetError(UserError):
    """A preset cannot be found, read or validated; the message lists every problem with its file and line."""


class DataError(UserError):
    """The images cannot serve the job: none there, unreadable under `on_error: stop`, too few for a batch."""


class WeightsError(UserError):
    """A weights file or checkpoint is missing, damaged, foreign or does not match the network."""


class DivergedError(SslError):
    """The loss or the gradient is no longer finite."""


class CollapsedError(SslError):
    """The network no longer tells images apart, and the preset says to stop then."""


class StoppedOnRequest(SslError):
    """A signal asked the job to stop; it wrote a checkpoint and can be resumed."""

    exit_code = EXIT_RESUMABLE
