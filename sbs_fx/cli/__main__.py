"""`python -m sbs_fx.cli`, as `torchrun` and `accelerate launch` start it."""

from sbs_fx.cli import main

main()
