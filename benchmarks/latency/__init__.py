"""Speed and memory of open models: what is asked, the clock, the rounds, rows and their intervals."""
