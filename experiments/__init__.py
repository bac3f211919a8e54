"""The experiments: `run.py` is the command, a folder each. README.md says how one is described."""
