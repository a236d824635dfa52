"""The record of a run: its file, summary and picture."""
