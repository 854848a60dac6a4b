"""The same recipe on many machines: job scripts, manifests, and processes on other hosts."""
