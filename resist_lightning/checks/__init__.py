"""Workers agree, or stop."""
