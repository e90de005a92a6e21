"""What every room stands on: what can be measured, the machine, the terminal's table."""
