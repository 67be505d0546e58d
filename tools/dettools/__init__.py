"""The companion command: one file per command in `commands`, the table of them in `cli`."""
