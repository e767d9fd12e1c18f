"""The one exception that is shown to the user as it is."""


class UserError(ValueError):
    """Something the user can mend: one plain sentence that says what is wrong, in which file, and what to do."""
