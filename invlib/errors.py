"""Every error that invlib raises on purpose; each names the thing, the value found and what was expected."""


class InvlibError(Exception):
    """Base of all errors that invlib raises on purpose."""


class ObservationError(InvlibError, ValueError):
    """An update, its labels or its description do not fit the model (all faults are listed at once)."""


class RecoveryError(InvlibError, ValueError):
    """A closed form does not apply to what was observed, for example a bias gradient that is all zero."""


class ConfigError(InvlibError, ValueError):
    """A setting is unknown or out of range."""


class UnknownNameError(InvlibError, ValueError):
    """A model, weights, data set or sample name does not exist; the message lists those that do."""


class DataError(InvlibError, RuntimeError):
    """A data file is missing, corrupt or cannot be fetched."""


class DeviceError(InvlibError, RuntimeError):
    """A device or implementation was asked for by name and cannot run here."""


class DependencyError(DeviceError):
    """An optional package is needed and not installed; the message says what installs it."""


class WorkerError(InvlibError, RuntimeError):
    """A process that ran attacks for this one ended before its work was done."""


class DoubtWarning(UserWarning):
    """Something may not be as it was said: a result is given, and stands under a doubt."""
