"""Knows machines and no kernel: devices, back end choice, operator registration, settings."""
