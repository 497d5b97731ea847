"""One file per verb: extract, compress, merge, convert, apply, inspect, compare."""
