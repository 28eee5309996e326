"""Files as such: read whole, checked, written whole or not at all."""
