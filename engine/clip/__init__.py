"""The model as a value: architecture, names, files, GmP, merge, blend and export."""
