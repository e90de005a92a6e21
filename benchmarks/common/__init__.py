"""What every room stands on: what can be measured, the machine, results files, the terminal's table."""
