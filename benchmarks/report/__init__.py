"""What was found, told: one record, the advice, the page and its drawings, two results compared."""
