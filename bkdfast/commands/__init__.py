"""The commands of `bkdfast` that are more than a few lines; `bkdfast.cli` puts them together."""
