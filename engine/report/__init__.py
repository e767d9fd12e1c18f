"""Charts and tables, from numbers only."""
