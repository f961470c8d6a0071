"""The commands. Each parses flags, calls other packages (objects are built in `experiment`), and prints.

To add a command, write a module here with a docstring that is its help text and `main(argv) -> int`, and add a
line to `main.COMMANDS`. Nothing outside this folder imports it.
"""
