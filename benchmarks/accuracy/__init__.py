"""What methods, widths and formats lose."""
