"""Bits per byte of exported models, and the report."""
