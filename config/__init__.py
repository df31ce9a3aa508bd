class UserError(Exception):
    """A mistake of the user: one clear sentence that names the thing, its value and the remedy."""
