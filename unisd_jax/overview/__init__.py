"""One page on many runs: read what their directories hold, group it honestly, draw it, write HTML and Markdown."""
