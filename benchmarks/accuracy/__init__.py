"""Questions, answers and grades: GSM8K, word problems, the harness's tasks, and paired tests."""
