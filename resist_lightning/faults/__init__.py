"""How a lost worker is noticed."""
