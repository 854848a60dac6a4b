"""``python -m genscale``, the same as ``genscale``."""

from genscale.cli.main import main

main()
