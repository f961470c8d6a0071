"""The commands: each parses, calls and prints; what it calls lives in other packages, what it builds in `experiment`.

To add a command: a module here with a docstring that explains it to the user and `main(argv) -> int`, and a
line in `main.COMMANDS`. Nothing outside of this folder imports it.
"""
