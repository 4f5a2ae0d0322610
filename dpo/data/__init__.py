"""Preference data: formats, validation, Parquet, tokenisation, packing. Imports no torch."""
