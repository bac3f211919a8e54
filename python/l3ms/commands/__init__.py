"""The command `l3ms`, a file per command; `command_line` joins them, and turns what went wrong into one line and an exit code.

torch and transformers are imported by the commands that need them, when their options have been read.
"""
