"""Frameworks whose models the rest of cutloss does not know by itself."""
