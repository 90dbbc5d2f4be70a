"""The command line: each sub-command is one thin typed function in a file of its own.

What a sub-command does belongs in the library; here its arguments get names, help and defaults,
and its result is printed. `ffnlab.cli.main` finds the function, lets tyro parse and call it, and
turns errors of use into one line.
"""

__all__: list[str] = []
