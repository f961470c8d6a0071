"""`python -m sfd_jax COMMAND ...`: what `sfd COMMAND ...` does, without the console script."""

from sfd_jax.cli.main import entry_point

entry_point()
