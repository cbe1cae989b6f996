"""The version, in one place: hatchling, the report and the PNG metadata read it here."""

__version__ = "0.1.0"
