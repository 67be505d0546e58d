"""One thin file per command: arguments in, library call, print, exit code. The table is in `dettools.cli`."""
