"""The version, in a module of its own: what records it need not import the package's head."""

__version__ = "0.1.0"
