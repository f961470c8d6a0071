"""The front doors: each parses, calls and prints; what it calls lives in the other rooms.

To add a door: a module here with a docstring that explains it to the user and `main(argv) -> int`, and a
line in `main.DOORS`. Nothing outside of this folder imports it.
"""
