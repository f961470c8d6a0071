"""`python -m sfd_jax.cli.demo`."""

import sys

from sfd_jax.cli.demo import main
from sfd_jax.cli.main import open_door

sys.exit(open_door(main, "demo", sys.argv[1:]))
