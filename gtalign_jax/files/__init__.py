"""Files and folders on their way to their place: whole or not at all, and nothing else is lost."""
