"""What a call says, checked: its options and operands, how rows count, what is decided."""
