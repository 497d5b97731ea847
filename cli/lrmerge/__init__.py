"""The command line of lrmerge: parse, call, render. No mathematics lives here."""
