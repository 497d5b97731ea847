"""``python -m lrmerge``."""

from lrmerge.app import main

main()
