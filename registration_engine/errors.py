"""What the engine refuses, by kind. Messages say what, which, got, expected."""


class RegistrationError(Exception):
    """Base of everything the engine raises on purpose."""


class InvalidVolumeError(RegistrationError, ValueError):
    """An image, mask or field cannot be registered as it is: shape, NaN, constant, too few slices."""


class NoOverlapError(RegistrationError):
    """Fixed and moving share no physical space after every start that was tried."""


class OutOfDeviceMemoryError(RegistrationError):
    """The device has too little memory for this pair and preset."""


class ImplausibleResultError(RegistrationError):
    """Folding or displacement beyond the preset: nothing is better than this result."""


class InvalidRequestError(RegistrationError, ValueError):
    """What was asked for does not exist here: a preset, a device."""


class DivergedError(RegistrationError):
    """A training run's loss is no number any more."""
