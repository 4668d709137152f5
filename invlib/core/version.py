"""The version of the package, which the archives of a release take from here."""

__version__ = "0.2.0"
