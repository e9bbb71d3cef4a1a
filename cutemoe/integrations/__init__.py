"""Doors into other packages. Each module imports its package, so none is imported from here."""
