"""Published experiments as bash scripts: prepare, convert, train, convert back, evaluate."""
