"""For the sceptic and the researcher: each script answers one question. See README.md."""
